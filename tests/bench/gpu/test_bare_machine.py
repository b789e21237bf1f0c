"""On a machine where little is installed: what a phase needs and is not there makes it skip, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffuserve_bench.gpu.settings import Settings
from tests.bench.gpu.test_runner import ends

_ROOT = Path(__file__).parents[3]
# Of what is installed for the tests, what no phase but those of PyTorch and of the tests may ask for.
_ABSENT = (
    "accelerate",
    "click",
    "diffuserve_client",
    "diffuserve_export",
    "diffusers",
    "grpc",
    "jinja2",
    "lightning",
    "locust",
    "matplotlib",
    "openvino",
    "psutil",
    "tenacity",
    "tensorrt",
    "tensorrt_rtx",
    "torch",
    "tqdm",
    "transformers",
    "tritonclient",
    "yaml",
)
_BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def lines_of_run(arguments: Sequence[str], absent: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Runs the command in a process, whose children inherit that these packages cannot be imported."""
    (folder / "sitecustomize.py").write_text(_BLOCKER.format(absent=tuple(absent)))
    path = os.pathsep.join(map(str, (folder, _ROOT, _ROOT / "loadtest")))
    program = [sys.executable, "-m", "diffuserve_bench.gpu", "--device", "cpu", *arguments]
    run = subprocess.run(
        program, cwd=folder, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, timeout=240
    )
    assert run.returncode == 0
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_phases_import_little(settings: Settings, tmp_path: Path) -> None:
    phases = "ceilings,model,unet,loop,stages,images,torch,diffusers,bundle"
    arguments = ["--phases", phases, "--model", str(settings.model), "--bundle", str(settings.bundle)]
    lines = lines_of_run(arguments, _ABSENT, tmp_path)
    without_torch = ("skipped", "needs torch, which is not installed")
    assert ends(lines) == {
        "ceilings": without_torch,
        "model": ("ended", ""),
        "unet": ("ended", ""),
        "loop": ("ended", ""),
        "stages": ("ended", ""),
        "images": ("ended", ""),
        "torch": without_torch,
        "diffusers": without_torch,
        "bundle": ("ended", ""),
    }
    assert not [line for line in lines if line["kind"] == "part"]
    assert (tmp_path / "bench-results" / "gpu.jsonl").read_text().splitlines() == [json.dumps(line) for line in lines]


def test_without_anything_but_numpy(settings: Settings, tmp_path: Path) -> None:
    arguments = ["--phases", "model, unet=100", "--model", str(settings.model), "--seconds", "200"]
    lines = lines_of_run(arguments, (*_ABSENT, "msgspec", "onnx", "onnxruntime"), tmp_path)
    assert ends(lines) == dict.fromkeys(("model", "unet"), ("skipped", "needs msgspec, which is not installed"))
    begun = [line["deadline_s"] for line in lines if line.get("state") == "begun"]
    assert begun == [120, 100]


def test_it_starts_without_any_package() -> None:
    program = [sys.executable, "-S", "-m", "diffuserve_bench.gpu", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT / "loadtest")}
    run = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert "phases, and the seconds that each may take" in run.stdout


def test_options_that_are_wrong(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(_ROOT / "loadtest")}
    for options, message in (
        (["--phases", "unet,lop"], "there is no phase 'lop'; there are: ceilings, tests, model, unet"),
        (["--phases", "unet=fast"], "it is 'fast'; it must be a number of seconds above 0"),
        (["--seconds", "0"], "it is '0'; it must be a number of seconds above 0"),
        (["--model", str(tmp_path)], "is not a bundle: it has no manifest.json"),
    ):
        program = [sys.executable, "-S", "-m", "diffuserve_bench.gpu", *options]
        run = subprocess.run(program, env=environment, capture_output=True, text=True)
        assert run.returncode == 2
        assert message in " ".join(run.stderr.split())
