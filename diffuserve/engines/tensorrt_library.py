"""TensorRT and TensorRT for RTX: two libraries of one interface, and what sets them apart."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffuserve.errors import BundleError


@dataclass(frozen=True)
class Library:
    """`engine`: the engine that it is, and the extra that installs it; `title`: NVIDIA's name; `module`: what is imported;
    `tag`: before its version in the names of plans; `install`: the command;
    `architectures`: those that it knows, where it builds plans for any of them on any machine, and compiles the kernels
    on the card that runs a plan. Empty where kernels are chosen by trying them on the GPU that a plan is built for.
    """

    engine: str
    title: str
    module: str
    tag: str
    install: str
    architectures: tuple[str, ...] = ()

    @property
    def compiles_when_loaded(self) -> bool:
        """Whether kernels are compiled where a plan runs, and not where it is built."""
        return bool(self.architectures)

    def load(self) -> Any:
        """The module.

        Raises:
            BundleError: it is not installed.
        """
        try:
            return importlib.import_module(self.module)
        except ImportError as error:
            raise BundleError(f"The engine {self.engine} is not installed. Install it: {self.install}") from error

    def version(self) -> str:
        """As the names of plans have it, such as "rtx1.7.1.116"; errors as `load`."""
        return f"{self.tag}{self.load().__version__}"

    def check_architectures(self, names: Sequence[str]) -> tuple[str, ...]:
        """The names of GPU architectures that plans are to be built for, such as "sm89", each once and in order.

        Raises:
            BundleError: it does not run on one of these.
        """
        if unknown := [name for name in names if name not in self.architectures]:
            raise BundleError(
                f"{self.title} does not run on {', '.join(map(repr, unknown))}. It runs on: {', '.join(self.architectures)}."
            )
        return tuple(each for each in self.architectures if each in names)


TENSORRT = Library(
    engine="tensorrt",
    title="TensorRT",
    module="tensorrt",
    tag="trt",
    # What is on the package index fetches the libraries themselves from NVIDIA's own index.
    install="pip install 'diffuserve[tensorrt]' --extra-index-url https://pypi.nvidia.com",
)
TENSORRT_RTX = Library(
    engine="tensorrt-rtx",
    title="TensorRT for RTX",
    module="tensorrt_rtx",
    tag="rtx",
    install="pip install 'diffuserve[tensorrt-rtx]'",
    architectures=("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),  # `tensorrt_rtx.ComputeCapability`, release 1.7
)
# By engine.
LIBRARIES = {library.engine: library for library in (TENSORRT, TENSORRT_RTX)}
