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
from diffuserve.engines.torch_compiler import (
    compiler_lacks,
    compiling_is_off,
    inductor_folder,
    runs_triton,
    scratch_folder,
)
from diffuserve.errors import BundleError
from diffuserve.tensors import HEIGHT, LATENT_HEIGHT, LATENT_WIDTH, NUMPY_DTYPE, TOKENS, WIDTH
from diffuserve.torch_graphs.cuda_graphs import GraphedCalls
from diffuserve.torch_graphs.exporting import Dims, check_shapes, exported, input_dims
from diffuserve.torch_graphs.fusing import fuse_for_torch
from diffuserve.torch_graphs.lookups import table_rows
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
    """`table_rows`: see `diffuserve.torch_graphs.lookups`; calls do not look at the numbers of their inputs.

    Args:
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
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
            # cuDNN plans its attention anew for every number of rows, which changes in nearly every call.
            torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            model = onnx.load(path, load_external_data=False)
        except Exception as error:  # protobuf's exceptions are none that onnx tells of
            raise BundleError(f"{path} is not an ONNX graph: {error}. Export the checkpoint again.") from error
        try:
            self._dims = input_dims(model.graph)
            self.table_rows = table_rows(model.graph)
            fuse_for_torch(model)
            module = OnnxModule(model, path.parent, device)
        except BundleError:
            raise
        except Exception as error:  # a damaged graph, or no memory for it
            raise BundleError(
                f"PyTorch cannot load {path}: {error}. Export the checkpoint again, or choose another engine: diffuserve "
                "engines BUNDLE --select auto"
            ) from error
        _check_names(path, component, module)
        self._inputs, self._outputs = module.input_names, module.output_names
        # How many elements the largest value has for each of the first input.
        call, self._largest = _compiled(module, self._dims, path, component, device, self._threads)
        # What makes or takes images keeps a GPU busy by itself, and a graph keeps all the memory that it uses.
        has_images = any(HEIGHT in spec.dims for spec in (*component.tensors.inputs, *component.tensors.outputs))
        self._call: Call = GraphedCalls(call) if device.type == "cuda" and not has_images else call

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Args:
            inputs: by name, on the device, of the graph's dtypes.

        Returns:
            The outputs by name; nothing waits for them.

        Raises:
            ValueError: a shape is not the graph's, or too large for compiled code.
        """
        check_shapes({name: tensor.shape for name, tensor in inputs.items()}, self._dims)
        self._set_threads()
        tensors = [inputs[name] for name in self._inputs]
        rows, first = len(tensors[0]), tensors[0]
        largest = max(1.0, self._largest * first[0].numel())  # of one row
        if largest > MOST_ELEMENTS:
            raise ValueError(
                f"A row of shape {tuple(first.shape[1:])} makes values of {largest:.0f} numbers; compiled code is for at most "
                f"{MOST_ELEMENTS}. Make the images smaller, or set TORCH_COMPILE_DISABLE=1."
            )
        most = int(MOST_ELEMENTS / largest)
        pieces = [self._call([_ready(tensor[at : at + most]) for tensor in tensors]) for at in range(0, rows, most)]
        outputs = pieces[0] if len(pieces) == 1 else [torch.cat(parts) for parts in zip(*pieces, strict=True)]
        return dict(zip(self._outputs, outputs, strict=True))

    def _set_threads(self) -> None:
        """PyTorch keeps the number by thread."""
        if self._threads and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)


def _check_names(path: Path, component: Component, module: OnnxModule) -> None:
    """Raises BundleError if the graph has other inputs or outputs than the manifest says."""
    found = set(module.input_names), set(module.output_names)
    expected = tuple({spec.name for spec in specs} for specs in (component.tensors.inputs, component.tensors.outputs))
    if found != expected:
        raise BundleError(
            f"{path} makes {sorted(found[1])} of {sorted(found[0])}; expected: {sorted(expected[1])} of "
            f"{sorted(expected[0])}. Export the checkpoint again."
        )


def _ready(tensor: torch.Tensor) -> torch.Tensor:
    """As compiled code reads it: without gaps, and where a vector of numbers may begin."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % _ALIGNED_BYTES else tensor


def _compiled(
    module: OnnxModule, dims: Dims, path: Path, component: Component, device: torch.device, threads: int
) -> tuple[Call, float]:
    """What runs the module, and how many elements its largest value has for each of the first input; 0 where that does not
    matter. PyTorch's tracer and compiler raise whatever comes, and none of it is a reason not to run."""
    lack = compiling_is_off()
    if not lack:
        decides = {"revision": _REVISION, "threads": threads, "device": _device_name(device)}
        cache = CompiledCache(path, component, torch.__version__, decides)
        kept = cache.loaded(lambda entry: Package(entry / _PACKAGE_NAME, module), Exception)
        if kept is not None:
            return kept, kept.largest
        lack = compiler_lacks(device)
        if not lack or device.type == "cuda":  # on a GPU PyTorch may still compile at calls
            try:
                program = exported(module, dims, _example(component, device))
            except Exception as error:
                lack = _failure(path, error)
            else:
                if not lack:
                    log.info("compiling %s for %s, which takes minutes at the first start", path, device)
                    try:
                        package = _made(cache, program, module)
                        return package, package.largest
                    except Exception as error:
                        lack = _failure(path, error)
                if device.type == "cuda" and runs_triton(device):
                    _warn_once(
                        f"On {device} PyTorch compiles at every start, and again for each image size, which makes requests "
                        f"wait: {lack}"
                    )
                    return _compiled_at_calls(program), 0
    _warn_once(f"On {device} PyTorch runs without being compiled, which is slower: {lack}")
    return lambda inputs: module(*inputs), 0


def _compiled_at_calls(program: torch.export.ExportedProgram) -> Call:
    """Compiled by PyTorch when a call needs it: for any number of rows from 2 on, and for each size of image and prompt. What
    cannot be compiled runs as it is."""
    torch._dynamo.config.suppress_errors = True
    compiled = torch.compile(program.module(check_guards=False), dynamic=False)

    def call(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        for tensor in inputs:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        outputs: Sequence[torch.Tensor] = compiled(*inputs)
        return outputs

    return call


def _made(cache: CompiledCache, program: torch.export.ExportedProgram, module: OnnxModule) -> Package:
    with scratch_folder() as scratch:
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


def _failure(path: Path, error: Exception) -> str:
    log.debug("cannot compile", exc_info=error)
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"PyTorch cannot compile {path}: {first_line}"


@functools.cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)
