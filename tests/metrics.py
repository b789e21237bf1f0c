"""Reads a server's metrics endpoint."""

from __future__ import annotations

import re
import urllib.request


def read_metrics(url: str) -> dict[tuple[str, str], float]:
    """Values by metric name and model."""
    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read().decode()
    values = {}
    for name, labels, value in re.findall(r"^(\w+)\{([^}]*)\} (\S+)$", text, re.MULTILINE):
        model = re.search(r'model="([^"]*)"', labels)
        values[name, model[1] if model else ""] = float(value)
    return values
