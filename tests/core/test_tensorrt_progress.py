"""The bars of TensorRT's builder."""

from __future__ import annotations

from dataclasses import dataclass

from diffuserve.engines.tensorrt_progress import PhaseBars


@dataclass
class Bar:
    name: str
    total: int
    n: int = 0
    closed: bool = False

    def update(self, steps: int) -> None:
        assert steps >= 0
        assert not self.closed
        self.n += steps

    def close(self) -> None:
        assert not self.closed
        self.closed = True


class Bars(PhaseBars):
    def __init__(self) -> None:
        self.all: list[Bar] = []
        super().__init__(self._open)

    def _open(self, name: str, total: int) -> Bar:
        self.all.append(Bar(name, total))
        return self.all[-1]


def test_phases_within_each_other() -> None:
    bars = Bars()
    bars.start("build", 2)
    bars.start("profile", 10)
    bars.step("profile", 0)
    bars.step("profile", 4)
    bars.step("build", 0)
    bars.finish("profile")
    bars.finish("build")
    assert bars.all == [Bar("build", 2, 1, closed=True), Bar("profile", 10, 5, closed=True)]


def test_one_name_that_is_open_twice() -> None:
    bars = Bars()
    for steps in (10, 20):
        bars.start("tactics", steps)
    bars.step("tactics", 7)
    bars.step("tactics", 2)  # of the other one
    bars.finish("tactics")
    assert [bar.closed for bar in bars.all] == [False, True]
    bars.step("tactics", 0)
    bars.finish("tactics")
    assert bars.all == [Bar("tactics", 10, 1, closed=True), Bar("tactics", 20, 8, closed=True)]
    bars.start("tactics", 5)
    assert not bars.all[-1].closed


def test_phases_that_were_never_opened() -> None:
    bars = Bars()
    bars.step("unknown", 3)
    bars.finish("unknown")
    assert not bars.all
