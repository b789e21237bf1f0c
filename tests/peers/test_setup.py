"""What peers are made of: their files, their environments, and what the command line says when something is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from diffuserve.errors import LaunchError
from diffuserve_peers import environments
from diffuserve_peers.contenders import Sources, contenders_from, setup_lines
from diffuserve_peers.environments import python_of, requirements_of
from diffuserve_peers.peers_command import command

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "loadtest" / "peers"


def test_setup_lines_are_those_that_somebody_writes_or_types(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text('"""What it is."""\n\nimport x\n# why\nx.run()  # here\n')
    (tmp_path / "requirements.txt").write_text("x==1\n\n")
    (tmp_path / "config.yaml").write_text("size: 8\n")
    (tmp_path / "README.md").write_text("x\n")
    assert setup_lines(tmp_path, ["pip install -r requirements.txt", "python server.py"]) == 6


def test_each_contender_is_counted() -> None:
    contenders = contenders_from(Sources(Path(), Path(), Path(), PEERS, Path()))
    assert {each.name: each.setup_lines for each in contenders if each.name.startswith("diffuserve")} == {
        "diffuserve_torchserve": 4,
        "diffuserve_triton": 4,
        "diffuserve_triton_none": 4,
        "diffuserve_triton_request": 4,
    }
    peers = {each.name: each.setup_lines for each in contenders if not each.name.startswith("diffuserve")}
    assert sorted(peers) == sorted(path.name for path in PEERS.iterdir() if path.is_dir())
    assert all(30 < lines < 60 for lines in peers.values())


def test_peers_have_our_versions_of_what_we_use_too() -> None:
    ours = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    ours = {name.lower().replace("_", "-"): version for name, version in ours.items()}
    for peer, lines in requirements_of(PEERS).items():
        versions = dict(line.split("==") for line in lines)
        assert {"torch", "diffusers", "transformers", "accelerate"} <= set(versions), peer
        for name, version in versions.items():
            assert version == ours.get(name, version), f"{peer}: {name}"


@pytest.fixture
def installs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Calls of venv and pip, which are not made."""
    calls: list[list[str]] = []

    def call(arguments: list[str]) -> None:
        calls.append(arguments)
        if "venv" in arguments:
            Path(arguments[-1]).mkdir(parents=True)

    monkeypatch.setattr(environments, "_call", call)
    return calls


def test_an_environment_is_made_once_for_each_content_of_the_requirements(
    tmp_path: Path, installs: list[list[str]]
) -> None:
    peer, cache = tmp_path / "peer", tmp_path / "cache"
    peer.mkdir()
    (peer / "requirements.txt").write_text("x==1\n")
    python = python_of(peer, cache)
    assert python.is_relative_to(cache)
    assert [call[:3] for call in installs] == [[sys.executable, "-m", "venv"], [str(python), "-m", "pip"]]
    assert python_of(peer, cache) == python
    assert len(installs) == 2
    (peer / "requirements.txt").write_text("x==2\n")
    assert python_of(peer, cache) != python
    assert len(installs) == 4


def test_an_environment_that_was_not_finished_is_made_again(tmp_path: Path, installs: list[list[str]]) -> None:
    (tmp_path / "requirements.txt").write_text("x==1\n")
    python = python_of(tmp_path, tmp_path / "cache")
    folder = python.parents[1]
    (folder / "complete").unlink()
    (folder / "half").touch()
    python_of(tmp_path, tmp_path / "cache")
    assert not (folder / "half").exists()
    assert (folder / "complete").exists()


def test_what_pip_says_is_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="No module named nothing_of_this_name"):
        environments._call([sys.executable, "-m", "nothing_of_this_name"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "many"], "must be numbers with commas between"),
        (["--repository", "nowhere"], "diffuserve assemble BUNDLE"),
        (["--repository", ".", "--archive", "nowhere"], "diffuserve archive BUNDLE"),
        (["--repository", ".", "--archive", ".", "--peers", "nowhere"], "--peers"),
        (
            ["--repository", ".", "--archive", ".", "--peers", str(PEERS), "--only", "nobody"],
            "no contender 'nobody'; there are fastapi_lock",
        ),
    ],
)
def test_what_is_missing_is_named(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(command, options)
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())
