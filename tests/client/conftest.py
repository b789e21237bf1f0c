from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from diffuserve_client import watchdog
from tests.client.fake_triton import FakeTriton
from tests.clocks import Clock


@pytest.fixture
def triton() -> Iterator[FakeTriton]:
    with FakeTriton() as server:
        yield server


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock by which `Client` measures silence; for `AsyncClient` there is `tests.clocks.run_by`."""
    clock = Clock()
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=clock))
    return clock
