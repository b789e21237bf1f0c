"""A call of many rows as several of fewer. Each row's result depends on that row alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.engines.example_inputs import Arrays


def split_rows(inputs: Mapping[str, NDArray[Any]], most: int) -> list[Arrays]:
    """As few pieces as there can be of at most `most` rows each, of about the same number of rows."""
    rows = len(next(iter(inputs.values())))
    count = math.ceil(rows / most)
    pieces = {name: np.array_split(array, count) for name, array in inputs.items()}
    return [{name: parts[number] for name, parts in pieces.items()} for number in range(count)]


def join_rows(outputs: Sequence[Mapping[str, NDArray[Any]]]) -> Arrays:
    """The outputs of the pieces as those of one call."""
    if len(outputs) == 1:
        return dict(outputs[0])
    return {name: np.concatenate([arrays[name] for arrays in outputs]) for name in outputs[0]}
