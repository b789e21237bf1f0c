"""A program compiled ahead of time by PyTorch (AOTInductor), in a file that is only loaded later.

A package is native code. It holds no weights: those of the module are used where they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from diffuserve.torch_graphs.exporting import largest_value

Call = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]

# Packages count elements in 32 bits.
MOST_ELEMENTS = 2**31 - 1
_NAME = "model"  # of the one program in a package
_LARGEST = "diffuserve_largest_value"


def compile_package(program: torch.export.ExportedProgram, path: Path) -> None:
    """Compiles a program for the device that it was traced on, which takes a minute or more for a UNet.

    Args:
        program: its example says which sizes to be fast at.
        path: of the package to write; ends with .pt2.

    Raises:
        Exception: it cannot be compiled; PyTorch has many kinds.
    """
    import torch._inductor

    (first, *_), _ = program.example_inputs
    largest = largest_value(program) / first.numel()
    settings: dict[str, Any] = {
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.metadata": {_LARGEST: str(largest)},
        # Whoever calls a package keeps its values that small, by `Package.largest`.
        "assume_32bit_indexing": True,
        # They would be compiled for this program alone.
        "aot_inductor.precompile_headers": False,
    }
    if first.device.type != "cpu":
        settings["cpp.vec_isa_ok"] = False  # finding out what the processor has takes as long as all else in C++
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # of PyTorch, about itself
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)


class Package:
    """A package that is loaded.

    Attributes:
        largest: how many elements its largest value has for each of the first input's. No value may have more than
            `MOST_ELEMENTS`.

    Args:
        path: of the package. It must be one that this user has made: what is in it is run.
        module: whose weights are used; on the device that it was compiled for.

    Raises:
        Exception: it cannot be loaded; PyTorch has many kinds.
    """

    def __init__(self, path: Path, module: torch.nn.Module) -> None:
        # PyTorch's own function finds out first what the processor has, by ten compilations: a minute, to warn if the package
        # was made on another one. Calls come one at a time, and without its own locks a call can become a CUDA graph.
        self._loader = torch._C._aoti.AOTIModelPackageLoader(str(path), _NAME, True, 1, -1)
        weights = dict(module.named_buffers())
        self._weights = {name: weights[name] for name in self._loader.get_constant_fqns()}
        # In the active buffer; all of them; used where they are.
        self._loader.load_constants(self._weights, False, True, True)
        self.largest = float(self._loader.get_metadata()[_LARGEST])

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Args:
            inputs: in the order of the program's.

        Returns:
            The outputs in theirs.
        """
        outputs: Sequence[torch.Tensor] = self._loader.boxed_run(list(inputs))
        return outputs
