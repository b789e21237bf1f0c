"""What is compared: in-flight batching under each policy, and the two ways of batching whole requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffuserve.batching.costs import CallCosts
from diffuserve.batching.selection import Selection
from diffuserve.pipeline import selection_from_serving
from diffuserve.serving_options import Serving


@dataclass(frozen=True)
class Contender:
    """A server, or a loop in this process, with the batching and policy of `serving`."""

    serving: Serving

    @property
    def name(self) -> str:
        inflight = self.serving.batching == "inflight"
        return f"inflight {self.serving.policy}" if inflight else self.serving.batching

    @property
    def parameters(self) -> dict[str, str]:
        """Of the in-flight model."""
        return {"batching": self.serving.batching, "policy": self.serving.policy}

    def selection(self, max_rows: int, costs: CallCosts) -> Selection:
        """For a loop in this process; the arguments are those of `diffuserve.pipeline.selection_from_serving`."""
        return selection_from_serving(self.serving, max_rows, costs)


NONE = Contender(Serving(batching="none"))
REQUEST = Contender(Serving(batching="request"))
INFLIGHT = Contender(Serving())


def inflight_under(policies: Sequence[str]) -> list[Contender]:
    """In-flight batching under each policy."""
    return [Contender(Serving(policy=policy)) for policy in policies]
