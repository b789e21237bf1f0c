"""Whether what a stage returns is finite: neither NaN nor infinite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.tensors import FINITE


def finite_rows(outputs: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Args:
        outputs: a stage's, (B, ...) by name of `diffuserve.tensors`. Every number of a row counts; of an image, which is
            bytes, what the VAE decoder says of it in `FINITE`.

    Returns:
        (B,) bool: the rows that hold nothing else.
    """
    finite = [
        (array if name == FINITE else np.isfinite(array)).reshape(len(array), -1).all(axis=1)
        for name, array in outputs.items()
    ]
    rows: NDArray[np.bool_] = np.logical_and.reduce(finite)
    return rows
