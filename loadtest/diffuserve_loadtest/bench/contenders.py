"""What is compared: in-flight batching under each policy, and the two ways of batching whole requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffuserve.policies import DEFAULT_POLICY


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


NONE = Contender("none")
REQUEST = Contender("request")


def inflight_under(policies: Sequence[str]) -> list[Contender]:
    """In-flight batching under each policy."""
    return [Contender("inflight", policy) for policy in policies]
