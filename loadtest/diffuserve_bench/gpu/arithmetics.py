"""Where the loop's arithmetic can be beside an engine, and the engine alone as it is called from there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffuserve.batching.arithmetic import Arithmetic
from diffuserve.defaults import CALL_TIMEOUT_S
from diffuserve.pipeline import arithmetic_on
from diffuserve.stages import ArraysByName, Engine, device_of
from diffuserve_bench.gpu.torch_device import wait_for


@dataclass(frozen=True)
class Beside:
    """Implements `diffuserve.stages.Engine`: the engine alone, until its outputs are there.

    `name`: of the figures, "host" or "device".
    """

    engine: Engine
    name: str
    arithmetic: Arithmetic

    def inputs(self, arrays: ArraysByName) -> dict[str, Any]:
        """Arrays of the host where the arithmetic is."""
        return {name: self.arithmetic.place(array) for name, array in arrays.items()}

    def __call__(self, inputs: ArraysByName) -> dict[str, Any]:
        outputs = self.engine(inputs)
        if self.name == "device" and (device := device_of(self.engine)) is not None:
            wait_for(device)
        return outputs


def arithmetics_beside(engine: Engine) -> list[Beside]:
    """The one that a pipeline would take first."""
    host = Beside(engine, "host", arithmetic_on(None, CALL_TIMEOUT_S))
    if (device := device_of(engine)) is None:
        return [host]
    return [Beside(engine, "device", arithmetic_on(device, CALL_TIMEOUT_S)), host]
