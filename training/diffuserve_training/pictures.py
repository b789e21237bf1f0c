"""A folder of pictures with captions, as LoRAs are trained on."""

from __future__ import annotations

import codecs
import json
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import msgspec
import numpy as np
from numpy.typing import NDArray

from diffuserve.errors import InvalidRequest
from diffuserve_training.config import ConfigError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
_NOT_READ = (".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".svg")
_CAPTION_SUFFIXES = (".txt", ".caption")  # the second is what kohya's scripts look for unless told otherwise
_METADATA, _PROMPT = "metadata.jsonl", "prompt"
_SOURCES = {".txt": "of .txt", ".caption": "of .caption", _METADATA: "of metadata.jsonl", _PROMPT: "the prompt"}
# UTF-32's little-endian mark begins with UTF-16's.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


@dataclass(frozen=True)
class Picture:
    """Attributes:
    path: the file.
    caption: without white space around it; it may be empty.
    source: where the caption is from, one of `_SOURCES`.
    """

    path: Path
    caption: str
    source: str


class _Line(msgspec.Struct):
    """Of metadata.jsonl; it may have other fields."""

    file_name: str
    text: str


def read_pictures(folder: Path, prompt: str | None) -> list[Picture]:
    """Every picture of a folder in the order of their names; hidden files and folders inside it are left out.

    Args:
        folder: described in `diffuserve_training.config.Lora`.
        prompt: the caption of those that have none.

    Raises:
        ConfigError: there are no pictures, one has no caption or is of a format that is not read, a caption has no picture, or
            captions cannot be read.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder of pictures.")
    files = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_dir())
    texts = {_key(path.stem + path.suffix.lower()): path for path in files}
    paths = {_key(path.name): path for path in files if path.suffix.lower() in (*_SUFFIXES, *_NOT_READ)}
    if "metadata.csv" in texts and "metadata.jsonl" not in texts:
        raise ConfigError(
            f"{folder}/metadata.csv is not read: write its captions to metadata.jsonl, or to texts beside the pictures."
        )
    captions = _metadata(folder / _METADATA, paths)
    for path in paths.values():
        if path.suffix.lower() in _NOT_READ:
            raise ConfigError(f"{path} is of a format that is not read: save it as PNG, or move it out of the folder.")
    if not paths:
        raise ConfigError(f"{folder} holds no pictures ({', '.join(_SUFFIXES)}).")
    names = {_key(path.stem) for path in paths.values()}
    for path in texts.values():
        if path.suffix.lower() in _CAPTION_SUFFIXES and _key(path.stem) not in names:
            raise ConfigError(
                f"{path} is the caption of no picture: that of 1.png is 1.txt. Rename it, or move it out of the folder."
            )
    pictures = []
    for key, path in paths.items():
        beside = [texts[name] for suffix in _CAPTION_SUFFIXES if (name := _key(path.stem + suffix)) in texts]
        if beside:
            pictures.append(Picture(path, _text_of(beside[0]).strip(), beside[0].suffix.lower()))
        elif key in captions:
            pictures.append(Picture(path, captions[key], _METADATA))
        elif prompt is not None:
            pictures.append(Picture(path, prompt.strip(), _PROMPT))
        else:
            raise ConfigError(
                f"{path} has no caption: write {path.stem}.txt beside it, a line in metadata.jsonl, or `prompt` in the configuration."
            )
    return pictures


def summary(pictures: Sequence[Picture]) -> str:
    """How many, and where their captions are from: "3 pictures; captions: 2 of .txt, 1 the prompt"."""
    counts = Counter(picture.source for picture in pictures)
    parts = [f"{counts[source]} {words}" for source, words in _SOURCES.items() if counts[source]]
    if empty := sum(not picture.caption for picture in pictures):
        parts.append(f"{empty} empty")
    return f"{len(pictures)} picture{'s' * (len(pictures) > 1)}; captions: {', '.join(parts)}"


def _key(name: str) -> str:
    """macOS writes accents in names apart from their letters, and most else does not."""
    return unicodedata.normalize("NFC", name)


def _text_of(path: Path) -> str:
    """Raises `ConfigError`: it is neither UTF-8 nor marked as UTF-16 or UTF-32. Of others none can be told from the rest."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    mark, encoding = next(((mark, name) for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), (b"", "utf-8"))
    try:
        text = data.removeprefix(mark).decode(encoding)
        if "\0" not in text:
            return text
        reason = "it has null characters, as UTF-16 without a byte order mark has"
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {len(mark) + error.start}"
    raise ConfigError(
        f"{path} is not text in UTF-8, nor in UTF-16 or UTF-32 with a byte order mark ({reason}). "
        "Convert it; if it is Latin-1: iconv -f LATIN1 -t UTF-8 OLD > NEW."
    )


def _metadata(path: Path, names: Collection[str]) -> dict[str, str]:
    """The captions in a metadata.jsonl, by key. Lines end at \\n and nowhere else (jsonlines.org)."""
    captions: dict[str, str] = {}
    if not path.is_file():
        return captions
    for number, line in enumerate(_text_of(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            said = msgspec.convert(json.loads(line, strict=False), _Line)
            said.text.encode()  # which a lone surrogate cannot be
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f'{path}, line {number}: {error}. It must be like {{"file_name": "1.png", "text": "a caption"}}.'
            ) from None
        name = _key(str(PurePosixPath(said.file_name)))
        if name not in names:
            raise ConfigError(
                f"{path}, line {number}: {name!r} is not a picture in {path.parent}. Correct or remove the line."
            )
        if name in captions:
            raise ConfigError(f"{path}, line {number}: {name!r} has a caption in an earlier line. Remove one of them.")
        captions[name] = said.text.strip()
    return captions


def load_square(path: Path, size_px: int) -> NDArray[np.uint8]:
    """The middle of a picture, (size, size, 3) uint8, read by `diffuserve.images.reading`.

    Raises:
        ConfigError: it cannot be read.
    """
    from PIL import Image, ImageOps

    from diffuserve.images.reading import read_picture_file

    try:
        picture = Image.fromarray(read_picture_file(path))
    except InvalidRequest as error:
        raise ConfigError(f"{path} is not a picture that can be read. {error}") from None
    return np.asarray(ImageOps.fit(picture, (size_px, size_px), Image.Resampling.LANCZOS))
