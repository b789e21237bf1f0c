from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from diffuserve_export.export_command import command
from tests.conftest import Once
from tests.export.tiny import write_checkpoint


@pytest.fixture(scope="session")
def shared_checkpoint(once: Once) -> Path:
    """A random tiny checkpoint that no test may change."""
    return once("checkpoint", lambda folder: write_checkpoint(folder / "tiny")) / "tiny"


@dataclass(frozen=True)
class KilledExport:
    """What was there after an export to `output` was killed: the names beside the output, and in its partial folder."""

    output: Path
    pid: int
    beside: tuple[str, ...]
    written: tuple[str, ...]


# Kills itself when the UNet's turn has come.
_KILLED = """
import os, signal
from diffuserve_export import export
from diffuserve_export.export_command import command

def export_or_die(module, stage, *rest):
    if stage == "unet":
        os.kill(os.getpid(), signal.SIGKILL)
    write(module, stage, *rest)

write, export.onnx_from_module = export.onnx_from_module, export_or_die
command()
"""


@pytest.fixture(scope="session")
def killed_export(shared_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> KilledExport:
    """An export of the checkpoint that died by SIGKILL once the text encoder was written."""
    output = tmp_path_factory.mktemp("bundles") / "tiny"
    arguments = [sys.executable, "-c", _KILLED, str(shared_checkpoint), "--output", str(output)]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL) as process:
        assert process.wait() == -signal.SIGKILL
    partial = output.parent / f".tiny.partial-{process.pid}"
    return KilledExport(
        output,
        process.pid,
        beside=tuple(sorted(path.name for path in output.parent.iterdir())),
        written=tuple(sorted(path.name for path in partial.iterdir())),
    )


@pytest.fixture(scope="session")
def tiny_bundle(shared_checkpoint: Path, once: Once) -> Path:
    """The checkpoint's bundle; no test may change it."""

    def export(folder: Path) -> None:
        arguments = [str(shared_checkpoint), "--output", str(folder / "tiny")]
        result = CliRunner().invoke(command, arguments, catch_exceptions=False)
        assert result.exit_code == 0
        assert "worst error" in result.output

    return once("bundle-of-tiny", export) / "tiny"


@pytest.fixture
def checkpoint(shared_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(shared_checkpoint, tmp_path / "tiny"))
