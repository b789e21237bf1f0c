"""Which packages there are stands in several files, since each tool wants a list of its own: each must have them all."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.test_dockerfile import STAGES
from tests.test_imports import MAY_IMPORT

ROOT = Path(__file__).parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOOL = PYPROJECT["tool"]
# import name: folder of the package, and the folder that goes on sys.path
FOLDERS = {"diffuserve": "diffuserve"} | {
    path.parent.name: path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("*/diffuserve_*/__init__.py")
}
ROOMS = sorted({folder.partition("/")[0] for name, folder in FOLDERS.items() if name != "diffuserve"})


def test_there_are_packages_to_look_for() -> None:
    assert {"diffuserve", "diffuserve_client", "diffuserve_training"} <= FOLDERS.keys()


def test_pyproject() -> None:
    wheel = TOOL["hatch"]["build"]["targets"]["wheel"]
    assert sorted(wheel["packages"]) == sorted(FOLDERS.values())
    assert sorted(wheel["dev-mode-dirs"]) == sorted([".", *ROOMS])
    assert sorted(TOOL["ruff"]["src"]) == sorted([".", *ROOMS])
    assert sorted(TOOL["mypy"]["mypy_path"]) == sorted(ROOMS)
    assert sorted(TOOL["mypy"]["packages"]) == sorted(FOLDERS)


@pytest.mark.parametrize("name", ["cpu-build", "gpu-build"])
def test_the_dockerfile(name: str) -> None:
    """.dockerignore is held to what is copied by tests/test_dockerfile.py."""
    assert {f"{folder} {folder}" for folder in ("diffuserve", *ROOMS)} <= set(STAGES[name].all("COPY"))


def test_the_table_of_arrows() -> None:
    assert {name: MAY_IMPORT[name][0] for name in MAY_IMPORT if name != "triton_repo"} == FOLDERS


def test_the_table_of_the_architecture() -> None:
    rows = (ROOT / "docs" / "architecture.md").read_text().splitlines()
    for name, folder in FOLDERS.items():
        assert any(row.startswith(f"| `{folder.partition('/')[0]}/` | `{name}` |") for row in rows), name
