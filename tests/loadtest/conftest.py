from __future__ import annotations

import os

import pytest


@pytest.fixture
def unhurried(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """In programs that are started, a generator may send requests as late as it will: on a busy machine it does."""
    folder = tmp_path_factory.mktemp("unhurried")
    (folder / "sitecustomize.py").write_text(
        "from diffuserve_loadtest.sending import records\nrecords.LATE_S = float('inf')\n"
    )
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
