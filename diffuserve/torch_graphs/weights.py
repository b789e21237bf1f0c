"""An ONNX graph's constants as tensors. Those in a file beside the graph are mapped, and read when they are needed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffuserve.errors import BundleError
from diffuserve.torch_graphs.operators import DTYPES

if TYPE_CHECKING:
    from onnx import TensorProto

# NumPy has no bf16: a tensor is made of bits, and seen as what it is.
_BITS = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<u8"}


def tensor_of(proto: TensorProto, folder: Path) -> torch.Tensor:
    """Args:
        proto: a constant of a graph.
        folder: where the graph's file is, and that of its weights.

    Raises:
        BundleError: its type is none that exported graphs have, or its data is not where the graph says.
    """
    from onnx import TensorProto, numpy_helper

    dtype = DTYPES.get(proto.data_type)
    if dtype is None:
        raise BundleError(f"{proto.name} is of ONNX's type {proto.data_type}, which exported graphs do not have.")
    dims = tuple(proto.dims)
    if proto.data_location == TensorProto.EXTERNAL:
        return torch.from_numpy(_mapped(proto, folder, dtype.itemsize)).view(dtype).reshape(dims)
    if proto.raw_data:
        bits = np.frombuffer(proto.raw_data, _BITS[dtype.itemsize]).copy()
        return torch.from_numpy(bits).view(dtype).reshape(dims)
    return torch.from_numpy(np.array(numpy_helper.to_array(proto))).to(dtype).reshape(dims)


def _mapped(proto: TensorProto, folder: Path, item_bytes: int) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    place = {entry.key: entry.value for entry in proto.external_data}
    path = folder / place.get("location", "")
    count, offset = math.prod(proto.dims), int(place.get("offset", 0))
    if not path.is_file() or path.resolve().parent != folder.resolve():
        raise BundleError(f"The weights {proto.name} are to be in {path}, which is no file beside the graph.")
    if offset < 0 or offset + count * item_bytes > path.stat().st_size:
        raise BundleError(f"{path} ends before the weights {proto.name}. Export the checkpoint again.")
    # Copied where it is written to, which nobody does: PyTorch warns of memory that it could not write.
    return np.memmap(path, _BITS[item_bytes], "c", offset, (count,))
