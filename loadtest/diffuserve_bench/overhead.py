"""What serving costs: one request alone through Triton, against the same stages in this process.

The two alternate, so that whatever else the machine does falls on both alike.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from diffuserve.triton.address import TritonAddress
from diffuserve.triton.launcher import TritonServer
from diffuserve_bench.mixture import PROMPT, SAMPLER
from diffuserve_client import Client
from diffuserve_client.local import LocalClient
from diffuserve_loadtest.report.report import Report, Table


def measure_overhead(bundle: Path, repository: Path, *, steps: int, guidance_scale: float, runs: int) -> Report:
    """Draws the same image alternately in this process and through a server of its own."""
    settings: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale, "sampler": SAMPLER, "seed": 7}
    local_s: list[float] = []
    served_s: list[float] = []
    address = TritonAddress.on_free_ports()
    with TritonServer(repository, address), Client(address.grpc) as served, LocalClient(bundle) as local:
        for run in range(runs + 2):
            for client, times_s in ((local, local_s), (served, served_s)):
                started_s = time.perf_counter()
                client.generate(PROMPT, **settings)
                if run >= 2:  # the first two fill caches and allocate
                    times_s.append(time.perf_counter() - started_s)
    ratio = statistics.median(served_s) / statistics.median(local_s)
    rows = [
        (name, f"{statistics.median(times_s):.3f}", f"{min(times_s):.3f}", f"{max(times_s):.3f}")
        for name, times_s in (("in process", local_s), ("served", served_s))
    ]
    return Report(
        "overhead",
        {"bundle": str(bundle), "runs": runs, **settings},
        {"local_s": local_s, "served_s": served_s, "ratio": ratio},
        [Table("One request alone", ("seconds", "median", "min", "max"), rows)],
        [f"served / in process: {ratio:.2f}"],
    )
