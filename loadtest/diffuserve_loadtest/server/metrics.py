"""Reads the in-flight model's figures from a server's metrics endpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator

from diffuserve.serving.http import open_url
from diffuserve.tensors import STABLE_DIFFUSION

_PREFIX = "diffuserve_"


def read_metrics(url: str, model: str = STABLE_DIFFUSION) -> dict[str, float]:
    """Values by the names in `diffuserve.stats.METRICS`; of a histogram, NAME_sum and NAME_count."""
    text = read_text(url)
    return {name: value for name, labels, value in _ours(text, model) if "le=" not in labels}


def read_text(url: str) -> str:
    """The whole page; raises `OSError` if nothing answers."""
    with open_url(url, timeout_s=10) as response:
        return response.read().decode()


def values_and_buckets(
    text: str, model: str = STABLE_DIFFUSION
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The values as of `read_metrics`, and of each histogram the cumulative counts by upper bound."""
    values: dict[str, float] = {}
    buckets: dict[str, dict[str, float]] = {}
    for name, labels, value in _ours(text, model):
        bound = re.search(r'le="([^"]+)"', labels)
        if bound:
            buckets.setdefault(name.removesuffix("_bucket"), {})[bound[1]] = value
        else:
            values[name] = value
    return values, buckets


def _ours(text: str, model: str) -> Iterator[tuple[str, str, float]]:
    for name, labels, value in re.findall(r"^(\w+)\{([^}]*)\} (\S+)$", text, re.MULTILINE):
        if name.startswith(_PREFIX) and f'model="{model}"' in labels:
            yield name.removeprefix(_PREFIX), labels, float(value)
