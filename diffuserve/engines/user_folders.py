"""The user's own folders for what engines compile."""

from __future__ import annotations

import os
import stat
from pathlib import Path


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
        parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True, mode=0o700)
        return folder if _is_private(folder) else None
    except OSError:
        return None


def _is_private(folder: Path) -> bool:
    """Whether it is a folder, and no link, of this user, which nobody else may use or exchange."""
    found, above = folder.lstat(), folder.parent.stat()
    return (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.getuid()
        and not found.st_mode & 0o077
        and not above.st_mode & stat.S_IWOTH
    )
