"""Admission where other models share the device: what they have to do counts, and what they have accepted is kept in time."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from diffuserve.batching.admission import _MARGIN, _MOST_DUE, _TELL_EVERY_S, Admission
from diffuserve.batching.ledger import Entry, Ledger
from diffuserve.batching.load import Due, Load, share_beside, shared_s

SHAPE = (4, 8, 8)
SIZE = math.prod(SHAPE)


class Room:
    """What the models of one server have told each other, in this process."""

    def __init__(self) -> None:
        self.loads: dict[str, Load] = {}
        self.now_s = 0.0

    def admission(self, name: str, row_s: float) -> Admission:
        """That of a model whose calls cost `row_s` seconds a row alone."""
        admission = Admission(Ledger(), 32, neighbours=_Member(self, name), clock=lambda: self.now_s)
        for rows in (1, 2, 4, 8) * 5:
            admission.calls.observe(rows * SIZE, row_s * rows)
        return admission


class _Member:
    def __init__(self, room: Room, name: str) -> None:
        self._room, self._name = room, name

    def publish(self, load: Load) -> None:
        self._room.loads[self._name] = load

    def loads(self) -> Sequence[Load]:
        return [load for name, load in self._room.loads.items() if name != self._name]


def accept(admission: Admission, entry: Entry) -> None:
    admission._ledger.add(entry)
    admission.tell()


def release(admission: Admission, entry: Entry) -> None:
    admission._ledger.remove(entry)
    admission.tell()


def entry(evaluations: int, *, end_s: float = math.inf, rows: int = 1, priority: int = 5) -> Entry:
    return Entry(SHAPE, rows, evaluations, priority, end_s)


@pytest.mark.parametrize(
    ("alone_s", "others_s", "expected_s"),
    [(3.0, (), 3.0), (3.0, (10.0,), 6.0), (3.0, (1.0,), 4.0), (3.0, (3.0, 1.0, 9.0), 10.0)],
)
def test_models_share_the_device_equally(alone_s: float, others_s: Sequence[float], expected_s: float) -> None:
    assert shared_s(alone_s, others_s) == expected_s


def test_what_a_model_tells() -> None:
    room = Room()
    admission = room.admission("a", 0.01)
    admission.observe_outside(0.5)
    urgent, usual, unlimited = entry(10, end_s=3.0, priority=4), entry(20, end_s=9.0), entry(30, rows=2)
    for each in (urgent, usual, unlimited):
        accept(admission, each)
    told = room.loads["a"]
    assert (told.requests, told.outside_s, told.busy_s) == (3, 0.5, 0.0)
    # Ten rounds of four rows, ten of three and ten of two; the urgent one is done after ten rounds of its own.
    assert told.seconds == pytest.approx(0.9)
    assert sorted(told.due) == [Due(pytest.approx(0.1), 3.0), Due(pytest.approx(0.7), 9.0)]
    room.now_s = 2.0
    for each in (urgent, usual, unlimited):
        release(admission, each)
    assert room.loads["a"] == Load(outside_s=0.5, busy_s=2.0, told_s=2.0)


def test_what_is_told_is_bounded() -> None:
    room = Room()
    admission = room.admission("a", 0.01)
    for number in range(_MOST_DUE + 50):
        accept(admission, entry(10, end_s=1000.0 - number))
    assert {due.end_s for due in room.loads["a"].due} == {1000.0 - number for number in range(50, _MOST_DUE + 50)}


def test_others_hear_how_far_it_is_but_not_of_every_call() -> None:
    room = Room()
    admission = room.admission("a", 0.01)
    each = entry(100)
    accept(admission, each)
    for left in (99, 98):
        each.evaluations_left = left
        room.now_s += 0.6 * _TELL_EVERY_S
        admission.observe_call(SIZE, 0.01)
        assert room.loads["a"].seconds == pytest.approx(1.0 if left == 99 else 0.98)


def test_a_newcomer_that_another_models_load_makes_late() -> None:
    room = Room()
    ours, other = room.admission("ours", 0.01), room.admission("other", 0.02)
    newcomer = entry(10, rows=4, end_s=_MARGIN * 0.5)  # 0.4 s alone
    assert ours.excess_s(newcomer, 0.0) == 0
    accept(other, entry(3, rows=1))  # 0.06 s
    assert ours.excess_s(newcomer, 0.0) == 0
    accept(other, entry(5, rows=1))  # 0.16 s with the first
    assert ours.excess_s(newcomer, 0.0) == pytest.approx(_MARGIN * 0.06)
    accept(other, entry(1000, rows=9))  # takes half of the device and not more
    assert ours.excess_s(newcomer, 0.0) == pytest.approx(_MARGIN * 0.3)
    assert ours.excess_s(entry(10, rows=4, end_s=_MARGIN * 0.81), 0.0) == 0
    assert ours.requests_elsewhere == 3
    for each in list(other._ledger):
        release(other, each)
    assert ours.excess_s(newcomer, 0.0) == 0


def test_a_newcomer_that_would_make_another_models_request_late() -> None:
    room = Room()
    ours, other = room.admission("ours", 0.01), room.admission("other", 0.02)
    other.observe_outside(0.1)
    accept(other, entry(10, end_s=_MARGIN * 0.35))  # 0.2 s alone, and 0.1 s outside
    assert ours.excess_s(entry(5), 0.0) == 0  # 0.05 s
    assert ours.excess_s(entry(10), 0.0) == pytest.approx(_MARGIN * 0.05)
    accept(ours, entry(2))
    assert ours.excess_s(entry(4), 0.0) == pytest.approx(_MARGIN * 0.01)
    # One that is late in any case keeps nobody out.
    accept(ours, entry(1000))
    assert ours.excess_s(entry(1000), 0.0) == 0


def test_an_idle_model_refuses_only_what_the_others_make_late() -> None:
    room = Room()
    ours, other = room.admission("ours", 0.01), room.admission("other", 0.01)
    accept(other, entry(1000))
    assert ours.excess_s(entry(100, end_s=_MARGIN * 1.5), 0.0) == pytest.approx(_MARGIN * 0.5)
    # Late even alone: the forecast may be out of date, and only calls can tell.
    assert ours.excess_s(entry(100, end_s=_MARGIN * 0.9), 0.0) == 0


@pytest.mark.parametrize(("others", "expected"), [(0, 1), (1, 1 / 2), (2, 1 / 3), (0.25, 0.875), (1.5, 5 / 12)])
def test_the_share_of_the_device_beside_others(others: float, expected: float) -> None:
    assert share_beside(others) == pytest.approx(expected)


def test_a_call_counts_as_what_it_would_take_alone() -> None:
    """However many others share the device, and also those that come and go during a call."""
    room = Room()
    ours, other, third = (room.admission(name, 0.01) for name in ("ours", "other", "third"))

    def learn(seconds_of_a_row: float) -> None:
        for rows in (1, 2, 4, 8) * 40:
            room.now_s += seconds_of_a_row * rows
            ours.observe_call(rows * SIZE, seconds_of_a_row * rows)

    busy = entry(1000)
    accept(other, busy)
    accept(third, busy)
    learn(3 * 0.05)
    assert ours.calls.seconds(1, SIZE) == pytest.approx(0.05, rel=0.01)
    release(other, busy)
    learn(2 * 0.03)
    assert ours.calls.seconds(1, SIZE) == pytest.approx(0.03, rel=0.01)
    release(third, busy)
    learn(0.04)
    assert ours.calls.seconds(1, SIZE) == pytest.approx(0.04, rel=0.01)
    for rows in (1, 2, 4, 8) * 40:
        room.now_s += 0.01 * rows
        accept(other, busy)
        room.now_s += 2 * 0.05 * rows
        release(other, busy)
        ours.observe_call(rows * SIZE, 0.11 * rows)
    assert ours.calls.seconds(1, SIZE) == pytest.approx(0.06, rel=0.01)


@pytest.mark.parametrize("loads", [(0.4, 0.4), (3.0, 3.0), (10.0, 0.3), (0.0, 10.0)])
def test_two_models_under_overload_finish_nearly_all_that_they_accept(loads: tuple[float, float]) -> None:
    """In virtual time: Poisson arrivals at two models of different costs, whose calls share the device equally."""
    choose = random.Random(1)  # noqa: S311 - a load, no secret
    room, timeout_s, call_s = Room(), 2.0, 0.005
    row_s = (0.02, 0.01)
    models = [_Model(room, str(number), row_s[number], call_s) for number in range(2)]
    rates_per_s = [load / (seconds * 20) for load, seconds in zip(loads, row_s, strict=True)]
    due_s = [choose.expovariate(rate) if rate else math.inf for rate in rates_per_s]
    while room.now_s < 120:
        for number, (model, rate) in enumerate(zip(models, rates_per_s, strict=True)):
            while due_s[number] <= room.now_s:
                model.arrive(
                    entry(choose.choice((8, 12, 20)), rows=choose.choice((1, 2)), end_s=room.now_s + timeout_s)
                )
                due_s[number] += choose.expovariate(rate)
        running = [model for model in models if model.starts()]
        step_s = min([0.001 if not running else math.inf, *(model.left_s * len(running) for model in running)])
        room.now_s += step_s
        for model in running:
            model.work(step_s / len(running))
    assert not sum(model.expired for model in models)
    assert sum(model.finished_s for model in models) / room.now_s > 0.8 * min(1.0, sum(loads))


class _Model:
    """Advances all that it has accepted by one evaluation in a call."""

    def __init__(self, room: Room, name: str, row_s: float, call_s: float) -> None:
        self._room, self._row_s, self._call_s = room, row_s, call_s
        self._admission = room.admission(name, row_s)
        self._batch: list[Entry] = []
        self._evaluations: dict[Entry, int] = {}
        self._started_s = 0.0
        self.left_s = 0.0
        self.expired, self.finished_s = 0, 0.0

    def arrive(self, newcomer: Entry) -> None:
        if self._admission.excess_s(newcomer, self._room.now_s) == 0:
            self._evaluations[newcomer] = newcomer.evaluations_left
            accept(self._admission, newcomer)

    def starts(self) -> bool:
        """Whether a call runs, one that begins now if there is anything to do."""
        if not self._batch and len(self._admission._ledger):
            self._batch = list(self._admission._ledger)
            self._started_s = self._room.now_s
            self.left_s = self._call_s + self._row_s * sum(each.rows for each in self._batch)
        return bool(self._batch)

    def work(self, seconds: float) -> None:
        """Seconds that it had the device."""
        self.left_s -= seconds
        if self.left_s > 1e-9:
            return
        rows = sum(each.rows for each in self._batch)
        self._admission.observe_call(rows * SIZE, self._room.now_s - self._started_s)
        for each in self._batch:
            each.evaluations_left -= 1
            if each.end_s < self._room.now_s:
                self.expired += 1
                release(self._admission, each)
            elif not each.evaluations_left:
                self.finished_s += each.rows * self._evaluations[each] * self._row_s
                release(self._admission, each)
        self._batch = []
