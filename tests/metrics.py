"""Reads a server's metrics endpoint. What it tells is brought up to date at intervals."""

from __future__ import annotations

import re
import urllib.request

from diffuserve.triton.address import TritonAddress
from diffuserve_client import Client
from tests.gate import Gate
from tests.waiting import LONG_S, wait_for

# What `counted` draws, after it has counted.
COUNTING = 2


def read_metrics(url: str) -> dict[tuple[str, str], float]:
    """Values by metric name and model."""
    with urllib.request.urlopen(url, timeout=LONG_S) as response:
        text = response.read().decode()
    values = {}
    for name, labels, value in re.findall(r"^(\w+)\{([^}]*)\} (\S+)$", text, re.MULTILINE):
        model = re.search(r'model="([^"]*)"', labels)
        values[name, model[1] if model else ""] = float(value)
    return values


def values(address: TritonAddress) -> dict[str, float]:
    """Those of our own model, by their names in `diffuserve.stats.METRICS`."""
    return {
        name.removeprefix("diffuserve_"): value
        for (name, model), value in read_metrics(address.metrics).items()
        if model == "stable_diffusion"
    }


def waiting_and_running(address: TritonAddress) -> list[float]:
    """Requests before and past their first step."""
    found = values(address)
    return [found.get("requests_waiting", 0), found.get("requests_running", 0)]


def counted(address: TritonAddress, client: Client, gate: Gate) -> dict[str, float]:
    """`values` with all that has happened until now, while nothing runs. It draws `COUNTING` images afterwards, of a row and a
    step each, which are the same each time.

    The gauges are brought up to date first. So when the first of two requests is seen to wait, all that came before it is about
    to be told; when the second is, it has been.
    """
    with gate.closed():
        requests = [client.stream("an apple", seed=1, steps=1, guidance_scale=1) for _ in range(COUNTING)]
        for waiting, events in enumerate(requests, 1):
            next(events)
            wait_for([waiting, 0], lambda: waiting_and_running(address))
        found = values(address)
    for events in requests:
        assert list(events)
    return found
