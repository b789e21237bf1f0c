"""Components on PyTorch, on the CPU or the first NVIDIA GPU, in this process. docs/engines.md tells
what of it has run on a GPU.

PyTorch has a format of its own for programs (torch.export), which is not read: what reads it also unpickles, so a file could
do anything. A program is made of the ONNX graph that every engine runs; see `diffuserve.torch_graphs`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.engines.dtypes import check_dtypes
from diffuserve.engines.gpu import gpu_architectures
from diffuserve.engines.processor import refuse_without_bf16
from diffuserve.engines.unavailable import NO_GPU, Unavailable
from diffuserve.errors import BundleError, StageFailed
from diffuserve.tensors import NUMPY_DTYPE
from diffuserve.torch_copies import to_device, to_host
from diffuserve.torch_graphs.lookups import check_rows

if TYPE_CHECKING:
    import torch

    from diffuserve.bundle.manifest import Component

CUDA = "torch-cuda"
INSTALL = "pip install 'diffuserve[torch]'"
PRECISIONS = {"torch": ("fp32", "bf16"), CUDA: ("fp16", "bf16", "fp32")}

ArraysOrTensors = Mapping[str, Any]


class TorchEngine:
    """One ONNX graph, in the precision that it is in. Calls from several threads run one after another.

    Args:
        path: the .onnx file; weights beside it are found by their names.
        component: what the manifest says of it; its engine is "torch" or "torch-cuda".
        threads: threads of one call on a CPU; 0 means one for each core.

    Attributes:
        device: where it runs, a `torch.device`.

    Raises:
        BundleError: PyTorch is not installed or sees no GPU, the processor does not compute in the component's precision,
            or the graph has what this engine does not know.
    """

    def __init__(self, path: Path, component: Component, threads: int = 0) -> None:
        library = imported_torch()
        _check_can_run(library, path, component)
        from diffuserve.engines.torch_program import Program

        self.device: torch.device = library.device("cuda", 0) if component.engine == CUDA else library.device("cpu")
        self._program = Program(path, component, self.device, threads)
        self._dtypes = {spec.name: np.dtype(NUMPY_DTYPE[spec.dtype]) for spec in component.tensors.inputs}
        self._lock = threading.Lock()

    def __call__(self, inputs: ArraysOrTensors) -> dict[str, Any]:
        """Runs the model; see `diffuserve.stages.Engine`.

        Args:
            inputs: (B, ...) by name: arrays, or tensors on `device`.

        Returns:
            The outputs by name: arrays, or for tensors tensors on `device`, made in the current stream and not waited for.

        Raises:
            ValueError: an input is missing, unknown, of another dtype or shape, or elsewhere, or an array has a number that is
                no row of the table which it is for.
            StageFailed: PyTorch fails, such as for want of memory.
        """
        import torch

        on_device = any(isinstance(value, torch.Tensor) for value in inputs.values())
        if on_device:
            self._check_tensors(inputs)
        else:
            check_dtypes(inputs, self._dtypes)
            check_rows(inputs, self._program.table_rows)
        try:
            with self._lock, torch.no_grad():
                if on_device:
                    return self._program(inputs)
                return self._to_host(self._program({name: self._to_device(each) for name, each in inputs.items()}))
        except torch.OutOfMemoryError as error:
            raise StageFailed(
                f"The memory of {self.device} is full: {error} Make the calls smaller: diffuserve serve --limit max_rows=N"
            ) from error
        except RuntimeError as error:
            raise StageFailed(f"PyTorch failed: {error}") from error

    def _check_tensors(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """As `check_dtypes`; compiled code would take them for what they are not."""
        found = {name: f"{tensor.dtype} on {tensor.device}" for name, tensor in inputs.items()}
        expected = {name: f"torch.{dtype} on {self.device}" for name, dtype in self._dtypes.items()}
        if found != expected:
            raise ValueError(f"The inputs are {found}; expected: {expected}.")

    def _to_device(self, array: NDArray[Any]) -> torch.Tensor:
        import torch

        if self.device.type == "cpu":
            return torch.from_numpy(array if array.flags.writeable else array.copy())
        return to_device(array, self.device, pinned=True)

    def _to_host(self, outputs: Mapping[str, torch.Tensor]) -> dict[str, NDArray[Any]]:
        import torch

        if self.device.type == "cpu":
            return {name: tensor.numpy() for name, tensor in outputs.items()}
        copies = to_host(outputs.values(), pinned=True)
        torch.cuda.current_stream(self.device).synchronize()
        return {name: copy.numpy() for name, copy in zip(outputs, copies, strict=True)}


def imported_torch() -> Any:
    """The module.

    Raises:
        BundleError: it is not installed.
    """
    # Read when it is loaded. Several models share the cores: threads that spin while they wait for each other keep each
    # other, and other models', from running, and where a core is busy a call takes ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import torch
    except ImportError as error:
        raise BundleError(f"The engine torch is not installed. Install it: {INSTALL}") from error
    return torch


def cuda_unavailable(library: Any, architectures: Sequence[str]) -> Unavailable | None:
    """Why PyTorch cannot use a GPU here; None if it can.

    Args:
        library: the module `torch`.
        architectures: the GPUs that the driver sees.
    """
    if library.version.cuda is None:
        return Unavailable(
            f"PyTorch {library.__version__} was built without CUDA", "install a build with it: https://pytorch.org"
        )
    if not architectures:
        return NO_GPU
    if not library.cuda.is_available():
        return Unavailable(
            f"PyTorch {library.__version__} cannot use the GPU with this driver",
            f"install a driver for CUDA {library.version.cuda}, or PyTorch for an older CUDA: https://pytorch.org",
        )
    return None


def _check_can_run(library: Any, path: Path, component: Component) -> None:
    if component.precision not in PRECISIONS[component.engine]:
        raise BundleError(
            f"The engine {component.engine} runs {', '.join(PRECISIONS[component.engine])}, and {path} is in "
            f"{component.precision!r}. Choose another: diffuserve engines BUNDLE --select {component.engine}"
        )
    if component.engine == CUDA:
        if missing := cuda_unavailable(library, gpu_architectures()):
            raise BundleError(f"{path} is to run on an NVIDIA GPU, which PyTorch cannot do here: {missing}.")
    elif component.precision == "bf16":
        refuse_without_bf16(f"which {path} is for")
