"""A component's graph as a program of PyTorch: compiled where that can be done, as it is otherwise."""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffuserve.engines.compiled_cache import CompiledCache
from diffuserve.engines.processor import usable_cores
from diffuserve.engines.torch_compiler import compiler_lacks, inductor_folder, runs_triton
from diffuserve.errors import BundleError
from diffuserve.tensors import HEIGHT, LATENT_HEIGHT, LATENT_WIDTH, NUMPY_DTYPE, TOKENS, WIDTH
from diffuserve.torch_graphs.cuda_graphs import GraphedCalls
from diffuserve.torch_graphs.exporting import FreeDims, exported, free_dims
from diffuserve.torch_graphs.fusing import fuse_for_torch
from diffuserve.torch_graphs.module import OnnxModule
from diffuserve.torch_graphs.packages import MOST_ELEMENTS, Call, Package, compile_package

if TYPE_CHECKING:
    from diffuserve.bundle.manifest import Component

log = logging.getLogger(__name__)

_PACKAGE_NAME = "model.pt2"
# Raised whenever `diffuserve.torch_graphs` makes other programs of the same graph.
_REVISION = 1
# What is compiled for most carefully; it runs at any other size too.
_ROWS = 4
_SIZES = {TOKENS: 77, LATENT_HEIGHT: 64, LATENT_WIDTH: 64, HEIGHT: 512, WIDTH: 512}
_ALIGNED_BYTES = 16


class Program:
    """Args:
        path: the .onnx file; weights beside it are found by their names.
        component: what the manifest says of it.
        device: where it runs.
        threads: threads of one call on a CPU; 0 means one for each core.

    Raises:
        BundleError: the graph has what `diffuserve.torch_graphs` does not know, or it is damaged.
    """

    def __init__(self, path: Path, component: Component, device: torch.device, threads: int) -> None:
        import onnx

        self._threads = threads or usable_cores() if device.type == "cpu" else 0
        self._set_threads()
        inductor_folder()
        if device.type == "cuda":
            # fp32 is to be fp32, and not to be multiplied with 10 digits.
            torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
            torch.backends.cuda.matmul.fp32_precision = "ieee"
            # cuDNN plans its attention anew for every number of rows, which changes in nearly every call.
            torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            model = onnx.load(path, load_external_data=False)
        except Exception as error:  # protobuf's exceptions are none that onnx tells of
            raise BundleError(f"{path} is not an ONNX graph: {error}. Export the checkpoint again.") from error
        free = free_dims(model.graph)
        fuse_for_torch(model)
        module = OnnxModule(model, path.parent, device)
        self._inputs, self._outputs = module.input_names, module.output_names
        # How many elements the largest value has for each of the first input.
        call, self._largest = _compiled(module, free, path, component, device, self._threads)
        self._call: Call = GraphedCalls(call) if device.type == "cuda" else call

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Args:
            inputs: by name, on the device, of the graph's dtypes.

        Returns:
            The outputs by name; nothing waits for them.
        """
        self._set_threads()
        tensors = [inputs[name] for name in self._inputs]
        rows, first = len(tensors[0]), tensors[0]
        most = max(1, int(MOST_ELEMENTS / max(1.0, self._largest * first[0].numel())))
        pieces = [self._call([_ready(tensor[at : at + most]) for tensor in tensors]) for at in range(0, rows, most)]
        outputs = pieces[0] if len(pieces) == 1 else [torch.cat(parts) for parts in zip(*pieces, strict=True)]
        return dict(zip(self._outputs, outputs, strict=True))

    def _set_threads(self) -> None:
        """PyTorch keeps the number by thread."""
        if self._threads and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)


def _ready(tensor: torch.Tensor) -> torch.Tensor:
    """As compiled code reads it: without gaps, and where a vector of numbers may begin."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % _ALIGNED_BYTES else tensor


def _compiled(
    module: OnnxModule, free: FreeDims, path: Path, component: Component, device: torch.device, threads: int
) -> tuple[Call, float]:
    """What runs the module, and how many elements its largest value has for each of the first input; 0 where that does not
    matter."""
    lack = compiler_lacks(device)
    if not lack:
        try:
            package = _package(module, free, path, component, device, threads)
        except Exception as error:  # PyTorch's compiler raises whatever comes
            log.debug("cannot compile", exc_info=True)
            lack = f"PyTorch cannot compile {path}: {_first_line(error)}"
        else:
            return package, package.largest
    if device.type == "cuda" and runs_triton(device):
        _warn_once(
            f"On {device} PyTorch compiles at every start, and again for some sizes, which stops requests for minutes: {lack}"
        )
        traced = exported(module, free, _example(component, device)).module(check_guards=False)
        compiled = torch.compile(traced, dynamic=True)
        return lambda inputs: compiled(*inputs), 0
    _warn_once(f"On {device} PyTorch runs without being compiled, which is slower: {lack}")
    return lambda inputs: module(*inputs), 0


def _package(
    module: OnnxModule, free: FreeDims, path: Path, component: Component, device: torch.device, threads: int
) -> Package:
    """From the cache if it is there."""
    from diffuserve.engines.torch_compiler import scratch_folder

    cache = CompiledCache(
        path,
        component,
        torch.__version__,
        {"revision": _REVISION, "threads": threads, "device": _device_name(device)},
    )
    for entry in cache.entries():
        try:
            return Package(entry / _PACKAGE_NAME, module)
        except Exception as error:
            cache.discard(entry, error)
    log.info("compiling %s for %s, which is kept for the next start", path, device)
    with scratch_folder() as scratch:
        program = exported(module, free, _example(component, device))
        compile_package(program, scratch / _PACKAGE_NAME)
        with cache.writing() as folder:
            if folder is not None:
                shutil.copyfile(scratch / _PACKAGE_NAME, folder / _PACKAGE_NAME)
        return Package(scratch / _PACKAGE_NAME, module)


def _device_name(device: torch.device) -> Sequence[Any]:
    """What native code depends on, besides the processor."""
    if device.type == "cpu":
        return ["cpu"]
    return [torch.cuda.get_device_name(device), *torch.cuda.get_device_capability(device), torch.version.cuda]


def _example(component: Component, device: torch.device) -> dict[str, torch.Tensor]:
    return {
        spec.name: torch.zeros(spec.shape(_ROWS, _SIZES), dtype=getattr(torch, NUMPY_DTYPE[spec.dtype]), device=device)
        for spec in component.tensors.inputs
    }


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@functools.cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)
