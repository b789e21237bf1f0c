"""The user's own folders for what engines compile."""

from __future__ import annotations

import functools
import logging
import os
import stat
from pathlib import Path

log = logging.getLogger(__name__)


def user_cache_folder() -> Path | None:
    """As the XDG specification has it; None for a user without a home, as containers may have."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():  # the specification says to ignore relative names
        return named / "diffuserve"
    try:
        return Path.home() / ".cache" / "diffuserve"
    except RuntimeError:
        return None


def private_cache_folder() -> Path | None:
    """The folder for what is run when it is read: native code, and caches that Python unpickles. It is made if need be; None
    where there is none that this user alone may write to.

    A bundle may come from a stranger, so nothing of that kind is ever read from beside a model.
    """
    parent = user_cache_folder()
    if parent is None:
        return None
    folder = parent / "native"
    try:
        # Of modes of their own, since a process without a umask would open them to all.
        parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        if _is_private(folder):
            return folder
    except OSError as error:
        _warn_once(
            f"{folder} cannot be used ({error}), so what PyTorch compiles is not kept. Name a folder that this user may write "
            "to in $XDG_CACHE_HOME"
        )
        return None
    _warn_once(
        f"{folder} is not used, so what PyTorch compiles is not kept: it must be a folder of this user's and no link, which "
        f"nobody else may use (chmod 700), in one of this user's or root's that not everybody may write to (chmod o-w {parent})"
    )
    return None


def _is_private(folder: Path) -> bool:
    """Whether it is a folder, and no link, of this user, which nobody else may use or exchange."""
    found, above = folder.lstat(), folder.parent.stat()
    return (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.getuid()
        and not found.st_mode & 0o077
        and above.st_uid in (os.getuid(), 0)  # its owner could exchange what is in it
        and not above.st_mode & stat.S_IWOTH
    )


@functools.cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)
