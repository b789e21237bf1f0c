"""The README's commands and code run as they stand there, against a real server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from diffuserve.triton.launcher import TritonServer
from tests.waiting import LONG_S

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def run(command: str, folder: Path, server: TritonServer) -> None:
    """In a shell, as a reader would, but against this session's server and out of the way of the reader's files."""
    command = command.replace("localhost:8001", server.address.grpc).replace("localhost:8000", server.address.http)
    if "diffuserve generate" in command:
        command += f" --url {server.address.grpc}"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["/bin/bash", "-euc", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=LONG_S
    )
    assert done.returncode == 0, done.stderr


def test_the_commands_it_opens_with_are_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^    |`)make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("command", re.findall(r"^    (diffuserve generate .*)$", README, re.MULTILINE))
def test_generate(command: str, tmp_path: Path, server: TritonServer) -> None:
    run(command, tmp_path, server)
    assert list(tmp_path.glob("*.png"))


def test_curl(tmp_path: Path, server: TritonServer) -> None:
    [command] = re.findall(r"^    (curl .*\\\n.*\n.*)$", README, re.MULTILINE)
    jq = f'{sys.executable} -c \'import json, sys; print(json.load(open("answer.json"))["image"])\''
    command = command.replace("jq -er .image answer.json", jq)
    run(f"set -o pipefail; {command}", tmp_path, server)
    assert (tmp_path / "pizza.png").read_bytes().startswith(b"\x89PNG")


def test_python(tmp_path: Path, server: TritonServer) -> None:
    [code] = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(code.replace("localhost:8001", server.address.grpc))
    run(f"{sys.executable} {script}", tmp_path, server)
    assert (tmp_path / "pizza.png").exists()


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_links(link: str) -> None:
    assert link.startswith("https://") or (ROOT / link).exists()


def test_the_range_of_python_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [(least, most)] = re.findall(r">=3\.(\d+),<3\.(\d+)", project["requires-python"])
    said = f"Python 3.{least} to 3.{int(most) - 1}"
    assert said in README
    assert said in (ROOT / "diffuserve" / "triton" / "installation.py").read_text()
    minors = [text.rpartition(".")[2] for text in project["classifiers"] if "Python :: 3." in text]
    assert minors == [str(minor) for minor in range(int(least), int(most))]
