"""What is said of files that are not safetensors, whatever they are called."""

from __future__ import annotations

import gzip
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from diffuserve.errors import CheckpointError
from diffuserve_export.checkpoint.checkpoint import open_checkpoint
from diffuserve_export.checkpoint.safetensors_file import TensorInfo, read_header


def zipped() -> bytes:
    """As torch.save writes since 1.6."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
    return buffer.getvalue()


OTHERS: dict[str, tuple[bytes, str]] = {
    "pickle": (
        pickle.dumps({"state_dict": {}}, protocol=2),
        "is a pickle, .*not opened.*Get the checkpoint as .safetensors",
    ),
    "newer pickle": (pickle.dumps({"state_dict": {}}, protocol=5), "is a pickle"),
    "zipped pickle": (zipped(), "is a pickle, .* only safetensors are read"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265146304\n",
        "is a git-lfs pointer that stands for the file, .* git lfs pull",
    ),
    "page": (b"\n<!DOCTYPE html>\n<html><title>Log in</title></html>", "is a web page, .* log in"),
    "error as JSON": (b'{"error": "Unauthorized"}', "is a JSON text, .*server's error message"),
    "error as text": (b"Access to this model is restricted.", "is a text, .*server's error message"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(64), "is a GGUF file, .* in fp32, bf16 or fp16"),
    "gzip": (gzip.compress(b"x" * 100), "is a compressed archive, .*Unpack it"),
    "Keras": (b"\x89HDF\r\n\x1a\n" + bytes(64), "is an HDF5 file"),
    "empty": (b"", "is empty. Download it again"),
    "zeros": (bytes(100), "is damaged or cut short"),
}


@pytest.mark.parametrize("name", ["model.safetensors", "MODEL.CKPT"])
@pytest.mark.parametrize("case", OTHERS)
def test_what_a_file_is_instead(case: str, name: str, tmp_path: Path) -> None:
    content, message = OTHERS[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} {message}"):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("length", [0x280, 0x480, 0x7B, 0x13C, 0x8B1F])
def test_a_file_cut_short_is_called_so_whatever_its_headers_length_looks_like(length: int, tmp_path: Path) -> None:
    """The length comes first, and may begin as a pickle, a JSON text, a web page or an archive does."""
    path = tmp_path / "a.safetensors"
    save_file({"a": np.zeros(4, np.float32)}, path)
    header = path.read_bytes()[8:]
    header = header[: header.rindex(b"}") + 1].ljust(length)
    path.write_bytes(length.to_bytes(8, "little") + header + bytes(16))
    assert read_header(path).tensors["a"].shape == (4,)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"a\.safetensors is damaged or cut short"):
        read_header(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_header(tmp_path / "missing.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        read_header(tmp_path)


def test_a_header(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": np.zeros((2, 3), np.float16), "b": np.zeros((), np.int64)}, path, metadata={"title": "x"})
    header = read_header(path)
    assert header.metadata == {"title": "x"}
    assert header.tensors == {"a": TensorInfo(path, "F16", (2, 3)), "b": TensorInfo(path, "I64", ())}
    assert [tensor.size for tensor in header.tensors.values()] == [6, 1]
