from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.gate import Gate


@pytest.fixture
def guarded(repository: Path, tmp_path: Path) -> tuple[Path, Gate]:
    """A copy of the repository with a gate before its UNet."""
    copy, gate = Path(shutil.copytree(repository, tmp_path / "repository")), Gate(tmp_path)
    gate.guard(copy)
    return copy, gate
