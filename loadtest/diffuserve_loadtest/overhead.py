"""What serving costs: one request alone through Triton, against the same stages in this process.

The two alternate, so that whatever else the machine does falls on both alike.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffuserve.triton.address import Address
from diffuserve.triton.launcher import TritonServer
from diffuserve_client import Client
from diffuserve_client.local import LocalClient

PROMPT = "a slice of pizza, glossy"


@dataclass(frozen=True)
class Overhead:
    """Seconds of each run, in the order in which they were taken."""

    settings: dict[str, Any]
    local_s: list[float]
    served_s: list[float]

    @property
    def ratio(self) -> float:
        """Served over in-process, medians."""
        return statistics.median(self.served_s) / statistics.median(self.local_s)


def measure_overhead(bundle: Path, repository: Path, *, steps: int, guidance_scale: float, runs: int) -> Overhead:
    """Draws the same image alternately in this process and through a server of its own."""
    settings: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale, "sampler": "dpmpp_2m", "seed": 7}
    local_s: list[float] = []
    served_s: list[float] = []
    address = Address.on_free_ports()
    with TritonServer(repository, address), Client(address.grpc) as served, LocalClient(bundle) as local:
        for run in range(runs + 2):
            for client, times_s in ((local, local_s), (served, served_s)):
                started_s = time.perf_counter()
                client.generate(PROMPT, **settings)
                if run >= 2:  # the first two fill caches and allocate
                    times_s.append(time.perf_counter() - started_s)
    return Overhead(settings, local_s, served_s)
