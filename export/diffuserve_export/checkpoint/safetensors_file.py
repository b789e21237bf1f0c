"""What the header of a safetensors file says, without reading a weight; and what a file is that only bears the name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffuserve.errors import CheckpointError

_DOWNLOAD = "Download it again."
_PICKLE = (
    "a pickle",
    "It was not opened, since a pickle can run any code when it is; only safetensors are read. Get the checkpoint as "
    ".safetensors.",
)
_ARCHIVE = ("a compressed archive", "Unpack it.")
# How files begin that are found under the names of weights: what each is, and how to fix it.
_OTHERS: Mapping[bytes, tuple[str, str]] = {
    b"PK\x03\x04": _PICKLE,  # PyTorch's, in a zip archive
    **{bytes([0x80, protocol]): _PICKLE for protocol in range(2, 6)},
    b"version https://git-lfs": (
        "a git-lfs pointer that stands for the file",
        "Download the real one: git lfs pull, in its repository.",
    ),
    b"GGUF": ("a GGUF file", "Get the checkpoint as .safetensors in fp32, bf16 or fp16."),
    b"<": (
        "a web page",
        "The server answered with a page, as it does where one must log in or accept terms. " + _DOWNLOAD,
    ),
    b"{": ("a JSON text", "It may be a server's error message. " + _DOWNLOAD),
    b"\x1f\x8b": _ARCHIVE,
    b"7z\xbc\xaf": _ARCHIVE,
    b"Rar!": _ARCHIVE,
    b"\x89HDF": ("an HDF5 file", "Get the checkpoint as .safetensors."),
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file.

    `file`: that it lies in; `dtype`: as safetensors names them, such as F16; `shape`: its dimensions.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """`tensors`: by name; `metadata`: what whoever wrote the file put there."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def read_header(file: Path) -> Header:
    """Whatever the file is called: its content decides.

    Raises:
        CheckpointError: it is not a safetensors file, or a damaged one; its length is compared with what the header says.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            tensors = {
                name: TensorInfo(file, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()
            }
            return Header(tensors, opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(_reason(file, error)) from error


def _reason(file: Path, error: Exception) -> str:
    """What is wrong with a file that cannot be opened."""
    try:
        with file.open("rb") as opened:
            start = opened.read(512)
    except OSError as unreadable:
        return f"{file} cannot be read: {unreadable.strerror}. {_DOWNLOAD}"
    if not start:
        return f"{file} is empty. {_DOWNLOAD}"
    if start[8:9] == b"{":  # a safetensors file's header, before which its length stands, which may look like anything
        return f"{file} is damaged or cut short: {error}. {_DOWNLOAD}"
    start = start.lstrip(b"\xef\xbb\xbf \r\n\t")
    for beginning, (what, fix) in _OTHERS.items():
        if start.startswith(beginning):
            return f"{file} is {what}, and no safetensors file. {fix}"
    if start.isascii() and all(byte >= 0x20 or byte in b"\r\n\t" for byte in start):
        return f"{file} is a text, and no safetensors file. It may be a server's error message. {_DOWNLOAD}"
    return f"{file} is damaged or cut short: {error}. {_DOWNLOAD}"
