"""The real peers and ours: each starts, draws diffusers' image, and leaves nothing. Peers are installed first."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from diffuserve.serving.process import SHARED_MEMORY
from diffuserve.trials.similarity import psnr_db
from diffuserve_export.repository.archive import archive_from_bundle
from diffuserve_peers.comparison import compare_peers, draw_one, uniform
from diffuserve_peers.contenders import Contender, Sources, contenders_from
from diffuserve_peers.figures import SAME_DB
from tests.conftest import CHECKPOINT
from tests.waiting import LONG_S

ROOT = Path(__file__).parents[2]
STEPS = 8
NAMES = [each.name for each in contenders_from(Sources(Path(), Path(), Path(), ROOT / "loadtest" / "peers", Path()))]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def contenders(bundle: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Contender]:
    archive = tmp_path_factory.mktemp("mar") / "tiny-emoji.mar"
    archive_from_bundle(bundle, archive)
    # Where `diffuserve loadtest peers` has them: installing takes minutes.
    sources = Sources(CHECKPOINT, repository, archive, ROOT / "loadtest" / "peers", ROOT / ".peers")
    return {contender.name: contender for contender in contenders_from(sources)}


@pytest.fixture(scope="module")
def reference(reference_pipeline: Any) -> Image.Image:
    """The comparison's first request, drawn by diffusers in this process."""
    import torch
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler.from_config(reference_pipeline.scheduler.config)
    reference_pipeline.scheduler, kept = scheduler, reference_pipeline.scheduler
    try:
        image: Image.Image = reference_pipeline(
            "a slice of pizza, glossy, number 0",
            num_inference_steps=STEPS,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(0),
        ).images[0]
    finally:
        reference_pipeline.scheduler = kept
    return image


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where servers put temporary files; a short path, since sockets are among them."""
    with tempfile.TemporaryDirectory(prefix="peer-") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        monkeypatch.setenv("TMPDIR", name)
        yield Path(name)


@pytest.mark.parametrize("name", NAMES)
def test_it_draws_the_image_and_leaves_nothing(
    name: str,
    contenders: dict[str, Contender],
    reference: Image.Image,
    temporary: Path,
) -> None:
    since = time.time()
    with contenders[name].start() as server:
        drawn = draw_one(server, uniform(STEPS))
        assert server.pid is not None
        processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    assert psnr_db(np.asarray(Image.open(io.BytesIO(drawn))), np.asarray(reference)) > SAME_DB
    assert psutil.wait_procs(processes, timeout=LONG_S)[1] == []  # what was killed ends a little later
    assert shared_memory_of_nobody(since) == []
    assert [path.name for path in temporary.iterdir() if path.name != ".ses"] == []  # ONNX Runtime's own


def test_a_comparison_from_start_to_end(contenders: dict[str, Contender]) -> None:
    names = ("fastapi_lock", "diffuserve_triton")
    report = compare_peers(
        [contenders[name] for name in names], uniform((2, 4)), backlog=8, seconds=5, rounds=2, settings={}
    )
    assert report.measured["slowest_saturation_per_s"] > 0
    for name in names:
        mine = report.measured["contenders"][name]
        assert mine["errors"] == 0
        assert len(mine["saturations_per_s"]) == 2
        assert len(mine["first_image_s"]) == 3
        assert mine["peak_bytes"] > 100 << 20
    # The same requests at the same times, for everybody.
    first, second = (report.measured["contenders"][name]["latencies_s"] for name in names)
    assert {load: len(values) for load, values in first.items()} == {
        load: len(values) for load, values in second.items()
    }


def shared_memory_of_nobody(since: float) -> list[Path]:
    """What has been made there by Python's multiprocessing, or a server of this process, and no process has in use; `since`:
    seconds since the epoch."""
    patterns = (f"diffuserve_{os.getpid()}_*", "sem.*", "psm_*", "pymp-*")
    made = {str(path) for pattern in patterns for path in SHARED_MEMORY.glob(pattern) if path.stat().st_mtime > since}
    for process in psutil.process_iter() if made else ():
        with contextlib.suppress(psutil.Error, OSError):
            made -= {region.path for region in process.memory_maps()}
    return [*map(Path, sorted(made))]
