"""What a run was asked for, and how much of everything it measures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        matrix_side: of the square matrices whose product is the ceiling.
        copy_mib: of the piece of memory that is copied.
        calls: timed calls of each figure, of which the median counts.
        inner: calls in a row of what takes microseconds, so that starting them is not what is timed.
        rows: of UNet calls.
        random_calls: UNet calls of random numbers of rows.
        batches: of the other stages.
        steps: of the mixture's requests, equally frequent.
        loads: of the open loop, shares of what batches of whole requests reach at saturation, the first one first.
        backlog: requests that are sent at once to measure the saturation.
        arrivals: requests of each load.
        in_flight: requests of the closed loop.
        closed_steps: of each of those.
        pipeline_batches: images of diffusers' pipeline.
        pipeline_steps: of each of those.
    """

    matrix_side: int
    copy_mib: int
    calls: int
    inner: int
    rows: tuple[int, ...]
    random_calls: int
    batches: tuple[int, ...]
    steps: tuple[int, ...]
    loads: tuple[float, ...]
    backlog: int
    arrivals: int
    in_flight: int
    closed_steps: int
    pipeline_batches: tuple[int, ...]
    pipeline_steps: int


GPU = Sizes(
    matrix_side=8192,
    copy_mib=2048,
    calls=10,
    inner=20,
    rows=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32),
    random_calls=60,
    batches=(1, 2, 4, 8),
    steps=(10, 20, 30, 40, 50),
    loads=(0.8, 0.5, 0.95),
    backlog=40,
    arrivals=40,
    in_flight=16,
    closed_steps=20,
    pipeline_batches=(1, 16),
    pipeline_steps=20,
)
# On a CPU: to see that everything runs, and nothing of what it gives means anything.
DRY = Sizes(
    matrix_side=128,
    copy_mib=4,
    calls=2,
    inner=1,
    rows=(1, 2),
    random_calls=4,
    batches=(1, 2),
    steps=(2, 3),
    loads=(0.8,),
    backlog=4,
    arrivals=4,
    in_flight=2,
    closed_steps=2,
    pipeline_batches=(1,),
    pipeline_steps=2,
)


@dataclass(frozen=True)
class Settings:
    """Attributes:
    device: "cuda", or "cpu" for a dry run.
    work: folder for what is made on the way, gigabytes for a real model; it exists.
    model: folder of a bundle, with weights or without, whose speed is measured; None leaves out what needs one.
    bundle: folder of a bundle with weights whose images are compared; likewise.
    tests: folder of the tests.
    ways: engines and precisions, as "engine:precision"; none means all.
    """

    device: str
    work: Path
    model: Path | None = None
    bundle: Path | None = None
    tests: Path = Path("tests")
    ways: tuple[str, ...] = ()

    @property
    def sizes(self) -> Sizes:
        return GPU if self.device == "cuda" else DRY

    def to_json(self) -> dict[str, Any]:
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Settings:
        others = ("device", "ways")
        paths = {name: Path(value) for name, value in fields.items() if name not in others and value is not None}
        return cls(device=fields["device"], ways=tuple(fields["ways"]), **paths)
