"""The Dockerfile, as far as it can be held against the project without Docker."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_PREFIX = "/opt/diffuserve"


@dataclass
class Stage:
    """`base`: the image or stage it starts from; `instructions`: (word, rest of the line), continuations joined."""

    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, word: str) -> list[str]:
        return [rest for instruction, rest in self.instructions if instruction == word]


def read_stages() -> dict[str, Stage]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    stages: dict[str, Stage] = {}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stages[name] = Stage(base)
        elif word and stages:
            stages[name].instructions.append((word, rest))
    return stages


STAGES = read_stages()


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_what_is_served_from(name: str) -> None:
    stage = STAGES[name]
    assert stage.base == STAGES[f"{name}-build"].base  # the virtual environment's interpreter is the same
    assert stage.all("COPY") == [f"--from={name}-build {_PREFIX} {_PREFIX}"]
    assert stage.all("USER") == ["10001"]
    assert not any("pip" in run or "apt" in run for run in stage.all("RUN"))
    [check] = stage.all("HEALTHCHECK")
    assert "/v2/health/ready" in check
    assert stage.all("CMD") == ['["serve", "--repository", "/models", "--host", "0.0.0.0"]']


def test_triton_is_a_release_without_published_vulnerabilities() -> None:
    [version] = re.findall(r"^ARG TRITON_VERSION=(\d+\.\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert tuple(map(int, version.split("."))) >= (26, 7)
    assert STAGES["gpu"].base == "nvcr.io/nvidia/tritonserver:${TRITON_VERSION}-py3"


@pytest.mark.parametrize("name", ["cpu-build", "gpu-build"])
def test_everything_that_is_copied_is_there_and_sent_to_the_builder(name: str) -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for rest in STAGES[name].all("COPY") for source in rest.split()[:-1]}
    assert copied == sent
    assert all((ROOT / source).exists() for source in copied)


def test_versions_are_pinned() -> None:
    for name in ("cpu-build", "gpu-build"):
        installs = [run for run in STAGES[name].all("RUN") if "install" in run]
        assert installs
        assert all("--constraint constraints.txt" in run for run in installs)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_cpu_target_installs(tmp_path: Path) -> None:
    """Runs the RUN lines themselves, in a folder that has what the COPY lines put there and nothing else."""
    source, prefix = tmp_path / "source", tmp_path / "prefix"
    source.mkdir()
    stage = STAGES["cpu-build"]
    for rest in stage.all("COPY"):
        *names, target = rest.split()
        for name in names:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, source / target)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment["PATH"] = f"{Path(sys.base_prefix) / 'bin'}:/usr/bin:/bin"
    for run in stage.all("RUN"):
        command = run.replace(_PREFIX, str(prefix))
        done = subprocess.run(["/bin/sh", "-ec", command], cwd=source, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    shutil.rmtree(source)  # nothing may be read from it any more
    installed = prefix / "bin"

    def output_of(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for arguments in (["--version"], ["serve", "--help"], ["assemble", "--help"]):
        output_of(installed / "diffuserve", *arguments)
    engines = output_of(installed / "diffuserve", "engines")
    for engine in ("onnxruntime", "openvino"):
        assert re.search(rf"^{engine} +fp32 +can run", engines, re.MULTILINE)
    find = "import pathlib, diffuserve.triton.installation as i; print(i.find_installation(pathlib.Path('run')).binary)"
    assert Path(output_of(installed / "python3", "-c", find).strip()).is_file()
