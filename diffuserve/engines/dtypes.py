"""Inputs of an engine against the dtypes that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def check_dtypes(inputs: Mapping[str, NDArray[Any]], expected: Mapping[str, np.dtype[Any]]) -> None:
    """Raises ValueError where an input is missing, unknown or of another dtype: engines would convert it, or take it for what it
    is not.

    Args:
        inputs: of any shapes, by name.
        expected: of each input.
    """
    dtypes = {name: array.dtype for name, array in inputs.items()}
    if dtypes != expected:
        raise ValueError(f"The inputs are {_listed(dtypes)}; expected: {_listed(expected)}.")


def _listed(dtypes: Mapping[str, np.dtype[Any]]) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in sorted(dtypes.items()))
