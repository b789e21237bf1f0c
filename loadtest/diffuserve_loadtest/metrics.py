"""Reads the in-flight model's figures from a server's metrics endpoint."""

from __future__ import annotations

import re
import urllib.request

from diffuserve.tensors import STABLE_DIFFUSION

_PREFIX = "diffuserve_"


def read_metrics(url: str, model: str = STABLE_DIFFUSION) -> dict[str, float]:
    """Values by the names in `diffuserve.stats.METRICS`; of a histogram, NAME_sum and NAME_count."""
    with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310 - the benchmark's own server
        text = response.read().decode()
    return {
        name.removeprefix(_PREFIX): float(value)
        for name, labels, value in re.findall(r"^(\w+)\{([^}]*)\} (\S+)$", text, re.MULTILINE)
        if name.startswith(_PREFIX) and f'model="{model}"' in labels and "le=" not in labels
    }
