"""What a fault case is, and what it is given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from diffuserve.tensors import STABLE_DIFFUSION
from diffuserve.triton.launcher import TritonServer
from diffuserve_client import Client
from diffuserve_faults.background import Background
from diffuserve_faults.tally import Tally
from diffuserve_loadtest.server.metrics import read_metrics

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from diffuserve.triton.address import TritonAddress
    from diffuserve_faults.known_answers import KnownAnswer


class Trial:
    """A running server and what is known of it; a context manager that stops it.

    Args:
        repository: made by `diffuserve assemble`.
        address: where the server listens, and each successor.
        model: which of the server's is attacked.
        scale: share of the usual number of requests and seconds; tests use small ones.

    Attributes:
        server: the server now.
        warm: the server that has been warmed up, by the runner.
        answers: requests whose images are known, once the runner has drawn them.
        tally: of the case that runs.
        notes: what the case measured, by name.
        problems: what the case found wrong, besides requests that were lost.
        files_left: open files that Triton is known to keep after what the case did to it.
    """

    def __init__(
        self, repository: Path, address: TritonAddress, model: str = STABLE_DIFFUSION, scale: float = 1.0
    ) -> None:
        self.repository = repository
        self.address = address
        self.model = model
        self.scale = scale
        self.server = TritonServer(repository, address)
        self.warm: TritonServer | None = None
        self.answers: list[KnownAnswer] = []
        self.begin()

    def __enter__(self) -> Trial:
        self.server.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.__exit__(kind, error, trace)

    def begin(self) -> None:
        """Forgets the last case."""
        self.tally = Tally()
        self.notes: dict[str, float] = {}
        self.problems: list[str] = []
        self.files_left = 0

    def succeed(self) -> None:
        """Starts a new server at the same address, after the last one's end."""
        self.server.stop()
        self.server = TritonServer(self.repository, self.address)
        self.server.__enter__()

    def client(self, **settings: Any) -> Client:
        """A client of the model."""
        return Client(self.address.grpc, model=self.model, **settings)

    def background(self, tally: Tally | None = None, **settings: Any) -> Background:
        """Ordinary requests to the model, counted in the case's tally unless another is given."""
        return Background(self.address.grpc, self.answers, tally or self.tally, model=self.model, **settings)

    def metrics(self) -> dict[str, float]:
        """The model's, by the names of `diffuserve.stats.METRICS`."""
        return read_metrics(self.address.metrics, self.model)

    def times(self, count: int) -> int:
        """`count`, scaled; at least one."""
        return max(1, round(count * self.scale))

    def seconds(self, duration_s: float) -> float:
        """`duration_s`, scaled; at least one second."""
        return max(1.0, duration_s * self.scale)


class Case(Protocol):
    """One kind of fault."""

    def __call__(self, trial: Trial) -> None:
        """Attacks `trial.server`, counts in `trial.tally`, and leaves a server that should be healthy."""
        ...


Cases = dict[str, tuple[str, Case]]
"""By name: what is done, in a line, and the case."""


def merged(*parts: Mapping[str, tuple[str, Case]]) -> Cases:
    return {name: entry for part in parts for name, entry in part.items()}
