"""What in-flight models of one server tell each other through the run folder."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from diffuserve.batching.admission import _MOST_DUE
from diffuserve.batching.load import Due, Load
from diffuserve.serving.lifecycle import RUN_FOLDER_VARIABLE, DrainRequest, ModelSigns
from diffuserve.triton.neighbours import RunFolderNeighbours

# A model's process that lives until its input ends, and says something before.
OTHER = """
import sys
from diffuserve.batching.load import Load
from diffuserve.serving.lifecycle import ModelSigns
from diffuserve.triton.neighbours import RunFolderNeighbours
signs = ModelSigns.from_environment("other")
signs.live()
RunFolderNeighbours.from_environment("other").publish(Load(requests=2, seconds=1.5))
print("told", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    RunFolderNeighbours.prepare(tmp_path, ["ours", "other"])
    return tmp_path


Living = Callable[[str], tuple[ModelSigns, RunFolderNeighbours]]


@pytest.fixture
def living(run_folder: Path) -> Iterator[Living]:
    """Makes what the process of a model has."""
    with ExitStack() as stack:

        def live(model: str) -> tuple[ModelSigns, RunFolderNeighbours]:
            signs = ModelSigns(run_folder, model)
            signs.live()
            stack.callback(signs.end)
            return signs, RunFolderNeighbours(run_folder, model)

        yield live


def test_each_hears_of_the_others_and_not_of_itself(run_folder: Path, living: Living) -> None:
    RunFolderNeighbours.prepare(run_folder, ["third.load"])
    models = {name: living(name) for name in ("ours", "other", "third.load")}
    assert models["ours"][1].loads() == []
    told = Load(3, 0.75, 0.1, (Due(0.5, 17.25), Due(0.75, 18.0)), 12.0, 16.5)
    models["other"][1].publish(told)
    models["third.load"][1].publish(Load(1))
    assert models["ours"][1].loads() == [told, Load(1)]
    assert models["other"][1].loads() == [Load(1)]
    models["other"][1].publish(Load())
    assert models["ours"][1].loads() == [Load(), Load(1)]
    models["other"][0].end()
    assert models["ours"][1].loads() == [Load(1)]
    assert {path.suffix for path in run_folder.iterdir()} == {".load", ".alive"}


def test_what_a_dead_process_told_does_not_count(
    run_folder: Path, living: Living, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUN_FOLDER_VARIABLE, str(run_folder))
    _, ours = living("ours")
    with subprocess.Popen(
        [sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "told\n"
        assert ours.loads() == [Load(requests=2, seconds=1.5)]
        process.kill()
        process.wait()
        assert ours.loads() == []
    assert (run_folder / "other.load").stat().st_size


@pytest.mark.parametrize("content", [b"", b"{", b'{"requests": "many"}', b" " * 2**16 + b"{}"])
def test_what_cannot_be_read_does_not_count(run_folder: Path, living: Living, content: bytes) -> None:
    _, ours = living("ours")
    living("other")
    (run_folder / "other.load").write_bytes(content)
    assert ours.loads() == []


def test_the_longest_can_be_read(living: Living) -> None:
    (_, ours), (_, other) = living("ours"), living("other")
    longest = Load(10**9, 1 / 3e-300, 1 / 3e-300, (Due(1 / 3e-300, 1 / 3e-300),) * _MOST_DUE, 1 / 3e-300, 1 / 3e-300)
    other.publish(longest)
    assert ours.loads() == [longest]


def test_a_model_without_others_has_no_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_FOLDER_VARIABLE, raising=False)
    assert RunFolderNeighbours.from_environment("ours") is None
    monkeypatch.setenv(RUN_FOLDER_VARIABLE, str(tmp_path))
    RunFolderNeighbours.prepare(tmp_path, ["ours"])
    assert RunFolderNeighbours.from_environment("ours") is None
    RunFolderNeighbours.prepare(tmp_path, ["other"])
    assert RunFolderNeighbours.from_environment("ours") is not None


def test_a_folder_that_cannot_be_written_is_told_once(run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    neighbours = RunFolderNeighbours(run_folder / "gone", "ours")
    with caplog.at_level(logging.ERROR, "diffuserve"):
        neighbours.publish(Load(1))
        neighbours.publish(Load(2))
    assert [record.message.partition(" cannot be written")[0] for record in caplog.records] == [
        str(run_folder / "gone" / "ours.load")
    ]


# -- life and draining -------------------------------------------------------------------------------------------------


def test_signs_of_one_model_say_nothing_of_another(run_folder: Path, living: Living) -> None:
    ours, other = (ModelSigns(run_folder, name) for name in ("ours", "other"))
    assert not any(signs.lives or signs.died or signs.drained for signs in (ours, other))
    (our_process, _), (other_process, _) = living("ours"), living("other")
    other_process.report_drained()
    assert (ours.drained, other.drained) == (False, True)
    assert ours.lives and other.lives and not (ours.died or other.died)
    other_process.end()
    assert (ours.lives, other.lives) == (True, False)
    assert not (ours.died or other.died)
    assert our_process._held is not None
    our_process._held.close()  # as the kernel does when a process dies
    assert (ours.died, other.died) == (True, False)
    assert not ours.lives


def test_all_models_are_asked_to_drain_at_once(run_folder: Path) -> None:
    models = [ModelSigns(run_folder, name) for name in ("ours", "other")]
    assert not any(signs.drain_requested for signs in models)
    DrainRequest(run_folder).make()
    assert all(signs.drain_requested for signs in models)
