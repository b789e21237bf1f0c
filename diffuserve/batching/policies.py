"""The order in which paused latents get their next step, when not all fit into one UNet call.

A policy is a sort key over jobs of the same priority; the smallest goes first. All of them keep the promise that nobody
waits for another's last step, since the order is taken anew at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the names of the policies are for the command line, too, which loads no numpy
    from diffuserve.batching.jobs import Job

Policy = Callable[["Job", float], float]

# A request that has had no step for this long goes first, so that long ones are not starved by short ones.
_STARVING_S = 10.0


def fifo(job: Job, now_s: float) -> float:
    """First come, first served."""
    return job.arrival_s


def fair(job: Job, now_s: float) -> float:
    """Least attained service first (Nuyens and Wierman, Performance Evaluation 65, 2008): UNet rows run so far."""
    return job.rows_done


def srpt(job: Job, now_s: float) -> float:
    """Shortest remaining processing time first (Schrage, Operations Research 16, 1968), which minimises mean latency.

    The remaining work, in UNet rows, is known exactly. Ahead of all others go those that starve, the longest first.
    Ageing by the time since arrival instead would end in first come, first served on a server that is always full.
    """
    unserved_s = now_s - job.last_step_s
    return -unserved_s if unserved_s > _STARVING_S else job.rows_left


POLICIES: dict[str, Policy] = {"fifo": fifo, "fair": fair, "srpt": srpt}
# Least mean latency of the three at every load from half to full capacity (`diffuserve bench policies`).
DEFAULT_POLICY = "srpt"
