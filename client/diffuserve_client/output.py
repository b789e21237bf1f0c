"""Where images go: their names, and files that are never half written and never replace another by accident.

Names:
    -o pizza.png, one image in all      pizza.png
    -o pizza.png, several               pizza-1.png, pizza-2.png ... by prompt, then seed, then image
    no -o                               the prompt and the seed: a-slice-of-pizza-7.png
A name that is taken gets a number: pizza.png becomes pizza-1.png, pizza-2.png becomes pizza-2-1.png.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import uuid
from pathlib import Path

from diffuserve.errors import InvalidRequest

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
_EXTENSIONS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
_MAX_SLUG_CHARS = 48
_LONGEST_NUMBER = "-999999-999999"


def format_for(path: Path | None, format: str | None) -> str:
    """The image format that a file name and an explicit format agree on; png if there is neither.

    Raises:
        InvalidRequest: the extension is unknown, or the two differ.
    """
    if path is None:
        return format or "png"
    by_name = FORMATS.get(path.suffix.lower())
    if by_name is None:
        raise InvalidRequest(f"{str(path)!r} names no image format; end it with one of {', '.join(FORMATS)}.")
    if format not in (None, by_name):
        raise InvalidRequest(
            f"{str(path)!r} is a {by_name} file, but the format asked for is {format}. Drop one of the two."
        )
    return by_name


def path_for(path: Path | None, format: str, *, prompt: str, seed: int, number: int, total: int) -> Path:
    """The name of one image, before any number that a taken name gets.

    Args:
        path: what -o gave, or None.
        format: png, jpeg or webp.
        prompt, seed: what the image was drawn from.
        number: 1 .. total, the image's place among all of them.
        total: images of the whole run.
    """
    if path is None:
        return Path(f"{slug(prompt)}-{seed}{_EXTENSIONS[format]}")
    return path if total == 1 else path.with_stem(f"{path.stem}-{number}")


def slug(prompt: str) -> str:
    """The prompt as a file name without extension: letters and digits of any script, joined by hyphens."""
    words = "".join(char if char.isalnum() else " " for char in prompt.lower()).split()
    name = "-".join(words)
    if len(name) > _MAX_SLUG_CHARS:
        name = name[: _MAX_SLUG_CHARS + 1].rpartition("-")[0] or name[:_MAX_SLUG_CHARS]
    return name or "image"


def check_writable(path: Path) -> None:
    """Makes sure that a file can be written at `path`, by creating and removing one beside it.

    Raises:
        InvalidRequest: says what is in the way and how to fix it.
    """
    folder = path.parent
    if not folder.is_dir():
        raise InvalidRequest(f"The folder {str(folder)!r} does not exist. Create it: mkdir -p {folder}")
    try:
        if path.is_dir():
            raise InvalidRequest(f"{str(path)!r} is a folder; give the name of a file in it.")
        os.lstat(path.with_stem(path.stem + _LONGEST_NUMBER))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InvalidRequest(f"{str(path)!r} cannot be the name of a file: {error.strerror}.") from None
    probe = _unused_name(folder)
    try:
        probe.open("xb").close()
        probe.unlink()
    except OSError as error:
        raise InvalidRequest(f"Nothing can be written to the folder {str(folder)!r}: {error.strerror}.") from None


def save(path: Path, data: bytes, *, overwrite: bool) -> Path:
    """Writes a file that appears complete or not at all.

    Args:
        path: its name; a taken one gets a number unless `overwrite`.
        data: its content.
        overwrite: replace what is there.

    Returns:
        The name that it got.

    Raises:
        OSError: the disk is full, or the folder went away.
    """
    aside = _unused_name(path.parent)
    try:
        with aside.open("xb") as stream:
            stream.write(data)
        if overwrite:
            aside.replace(path)
            return path
        for candidate in _candidates(path):
            with contextlib.suppress(FileExistsError):
                _link(aside, candidate)
                return candidate
    finally:
        aside.unlink(missing_ok=True)
    raise AssertionError("the candidates never end")


def _candidates(path: Path) -> itertools.chain[Path]:
    return itertools.chain([path], (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(1)))


def _link(source: Path, target: Path) -> None:
    """Gives `source` the name `target` as well; raises FileExistsError if that is taken, also by somebody just now."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES):
            raise
        # A file system without hard links: take the name first, then move the content over it.
        target.open("xb").close()
        source.replace(target)


def _unused_name(folder: Path) -> Path:
    return folder / f".diffuserve-{uuid.uuid4().hex}.tmp"
