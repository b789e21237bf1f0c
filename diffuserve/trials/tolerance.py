"""How far an engine's outputs may be from those of what it is compared with; docs/engines.md has what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from numpy.typing import NDArray

from diffuserve.tensors import StageSpec

# The largest error allowed, as a share of the output's standard deviation. fp32 in another order of summation gives
# about 1e-5; a wrong operator or a frozen shape gives an error near the deviation itself.
RELATIVE_TOLERANCE = {"fp32": 1e-3, "fp16": 0.03, "bf16": 0.2}
# The same for images, in levels of 255: two values on either side of a rounding boundary differ by one level, however
# close they are.
TOLERANCE_LEVELS = {"fp32": 1.0, "fp16": 4.0, "bf16": 8.0}
# The least that a whole image may have in common with diffusers' in fp32: the errors of all steps add up.
MIN_IMAGE_PSNR_DB = {"fp32": 50.0, "fp16": 30.0, "bf16": 20.0}


def tolerance_of(tensors: StageSpec, precision: str, expected: Mapping[str, NDArray[Any]]) -> float:
    """In the output's unit; of the output that varies least, where there are several.

    Args:
        tensors: the component's.
        precision: what the engine computes in.
        expected: outputs by name, of any shape, of what it is compared with at the native size.
    """
    if tensors.outputs[0].dtype == "UINT8":
        return TOLERANCE_LEVELS[precision]
    return RELATIVE_TOLERANCE[precision] * min(float(array.std()) for array in expected.values())


def min_image_psnr_db(precisions: Iterable[str]) -> float:
    """Of an image drawn by components in these precisions, in decibels: that of the least exact one."""
    return min(MIN_IMAGE_PSNR_DB[precision] for precision in precisions)
