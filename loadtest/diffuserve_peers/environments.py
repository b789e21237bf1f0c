"""Environments of the peers: a virtual environment each, made once for each content of its requirements.txt."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import click

from diffuserve.errors import LaunchError

_INSTALL_TIMEOUT_S = 1800


def python_of(peer: Path, cache: Path) -> Path:
    """The interpreter of a peer's environment, which is made first if it is missing or its requirements have changed.

    Args:
        peer: a folder with a requirements.txt.
        cache: folder of the environments.

    Raises:
        LaunchError: pip failed.
    """
    requirements = peer / "requirements.txt"
    digest = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = cache.absolute() / f"{peer.name}-{digest}"
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():  # an environment cannot be made aside and renamed: its scripts know where they are
        click.echo(f"Installing {requirements} ...", err=True)
        shutil.rmtree(folder, ignore_errors=True)
        _call([sys.executable, "-m", "venv", str(folder)])
        _call([str(python), "-m", "pip", "install", "--quiet", "--requirement", str(requirements)])
        complete.touch()
    return python


def requirements_of(peers: Path) -> dict[str, list[str]]:
    """What each peer is made of, by its folder's name: the lines of its requirements.txt."""
    return {path.parent.name: path.read_text().split() for path in sorted(peers.glob("*/requirements.txt"))}


def _call(arguments: list[str]) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S, check=False)
    if done.returncode:
        raise LaunchError(f"{' '.join(arguments[1:])} failed: {done.stderr.strip()[-500:]}")
