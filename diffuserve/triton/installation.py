"""Finds tritonserver: $TRITONSERVER, the PATH (as in NVIDIA's container), or the one inside the nvidia-pytriton wheel."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from diffuserve.errors import LaunchError


@dataclass(frozen=True)
class Installation:
    """A tritonserver and what it needs.

    `library_paths` go before LD_LIBRARY_PATH; `backend_directory` is None where the server knows its own.
    """

    binary: Path
    library_paths: tuple[Path, ...] = ()
    backend_directory: Path | None = None


def find_installation(run_folder: Path) -> Installation:
    """The server to start.

    Args:
        run_folder: a private folder; the wheel's backends are laid out there, since the wheel keeps them apart from
            the stub that matches this interpreter.

    Raises:
        LaunchError: there is none, or $TRITONSERVER names no file.
    """
    named = os.environ.get("TRITONSERVER")
    if named:
        if not os.access(named, os.X_OK):
            raise LaunchError(f"$TRITONSERVER is {named!r}, which is not an executable file. Correct or unset it.")
        return Installation(Path(named))
    found = shutil.which("tritonserver")
    if found:
        return Installation(Path(found))
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise LaunchError(
            "There is no tritonserver: $TRITONSERVER is not set, the PATH has none, and nvidia-pytriton is not installed. "
            "Install it: pip install 'diffuserve[serve]'"
        )
    return _from_wheel(Path(spec.origin).parent, run_folder)


def _from_wheel(package: Path, run_folder: Path) -> Installation:
    root = package / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise LaunchError(f"nvidia-pytriton has no Python-backend stub for Python {version}. Use Python 3.11 to 3.13.")
    backends = run_folder / "backends"
    shutil.copytree(root / "backends" / "python", backends / "python")
    shutil.copy2(stub, backends / "python" / stub.name)
    libraries = (Path(sysconfig.get_config_var("LIBDIR")), package.parent / "nvidia_pytriton.libs")
    return Installation(root / "bin" / "tritonserver", libraries, backends)
