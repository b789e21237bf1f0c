"""A device that there is none of: its tensors cannot meet the host's, and every byte that goes from one to the other is counted.

Only what PyTorch itself is asked to do is seen, below all Python: a copy cannot be made around it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

# The one device without memory that PyTorch itself has, so that its guards know the name.
DEVICE = torch.device("meta")
aten = torch.ops.aten


class DeviceTensor(torch.Tensor):
    """Says that it is on the device; its numbers are `held`."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> DeviceTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the device's mode")


class CountedDevice(TorchDispatchMode):
    """Bytes and copies, `to_device` and `to_host`; `calls`: operations on the device but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.to_device: list[int] = []
        self.to_host: list[int] = []
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._to_copy.default and torch.device(kwargs.get("device") or args[0].device) != args[0].device:
            return self._across(args[0], kwargs)
        if func is aten.copy_.default and args[0].device != args[1].device:
            into, source = args[:2]
            (self.to_host if isinstance(source, DeviceTensor) else self.to_device).append(_bytes(source))
            _held(into).copy_(_held(source))
            return into
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
        on_device = [isinstance(each, DeviceTensor) for each in tensors]
        if not any(on_device):
            assert not kwargs.get("device") or torch.device(kwargs["device"]).type == "cpu", func
            return func(*args, **kwargs)
        assert all(on_device), f"{func} of tensors in different places"
        assert func is not aten._local_scalar_dense.default, "a number is read from the device"
        self.calls += [] if func.is_view else [func.overloadpacket.__name__]
        result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        return tree_map(lambda each: DeviceTensor(each) if isinstance(each, torch.Tensor) else each, result)

    def _across(self, source: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        if isinstance(source, DeviceTensor):
            self.to_host.append(_bytes(source))
            return source.held.clone()
        self.to_device.append(_bytes(source))
        return DeviceTensor(source.clone())


def _held(value: Any) -> Any:
    return value.held if isinstance(value, DeviceTensor) else value


def _bytes(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()
