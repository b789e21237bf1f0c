from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from diffuserve_export.export_command import command
from tests.export.tiny import write_checkpoint


@pytest.fixture(scope="session")
def shared_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny checkpoint that no test may change."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@dataclass(frozen=True)
class KilledExport:
    """What was there after an export to `output` was killed: the names beside the output, and in its partial folder."""

    output: Path
    pid: int
    beside: tuple[str, ...]
    written: tuple[str, ...]


@pytest.fixture(scope="session")
def killed_export(shared_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> KilledExport:
    """An export of the checkpoint that died by SIGKILL once the text encoder was written."""
    output = tmp_path_factory.mktemp("bundles") / "tiny"
    code = "from diffuserve_export.export_command import command; command()"
    arguments = [sys.executable, "-c", code, str(shared_checkpoint), "--output", str(output)]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL) as process:
        partial = output.parent / f".tiny.partial-{process.pid}"
        deadline = time.monotonic() + 120
        try:
            while not (partial / "unet").is_dir():
                assert process.poll() is None, "the export ended before it could be killed"
                assert time.monotonic() < deadline, "the export did not get to the UNet"
                time.sleep(0.05)
        finally:
            process.kill()
    return KilledExport(
        output,
        process.pid,
        beside=tuple(sorted(path.name for path in output.parent.iterdir())),
        written=tuple(sorted(path.name for path in partial.iterdir())),
    )


@pytest.fixture(scope="session")
def tiny_bundle(shared_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint's bundle; no test may change it."""
    output = tmp_path_factory.mktemp("bundles") / "tiny"
    arguments = [str(shared_checkpoint), "--output", str(output)]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "worst error" in result.output
    return output


@pytest.fixture
def checkpoint(shared_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(shared_checkpoint, tmp_path / "tiny"))
