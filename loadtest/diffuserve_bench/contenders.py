"""What is compared: in-flight batching under each policy, and the two ways of batching whole requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffuserve.batching.costs import CallCosts
from diffuserve.batching.policies import DEFAULT_POLICY, POLICIES
from diffuserve.batching.request_selection import RequestSelection
from diffuserve.batching.selection import InflightSelection, Selection


@dataclass(frozen=True)
class Contender:
    """`batching` and `policy` as in the in-flight model's parameters."""

    batching: str
    policy: str = DEFAULT_POLICY

    @property
    def name(self) -> str:
        return f"inflight {self.policy}" if self.batching == "inflight" else self.batching

    @property
    def parameters(self) -> dict[str, str]:
        return {"batching": self.batching, "policy": self.policy}

    def selection(self, max_rows: int, costs: CallCosts) -> Selection:
        """For a loop in this process.

        Args:
            max_rows: of one call, at most.
            costs: of a call by rows.
        """
        if self.batching == "inflight":
            return InflightSelection(max_rows, POLICIES[self.policy], costs)
        return RequestSelection(max_rows, together=self.batching == "request")


NONE = Contender("none")
REQUEST = Contender("request")


def inflight_under(policies: Sequence[str]) -> list[Contender]:
    """In-flight batching under each policy."""
    return [Contender("inflight", policy) for policy in policies]
