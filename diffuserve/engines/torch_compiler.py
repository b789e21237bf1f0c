"""What PyTorch's compiler needs on this machine, and where it may write.

Its caches are unpickled and its packages are native code. By default they lie in a folder of /tmp whose name is known, so
that whoever makes it first decides what is run: here they lie in the user's own folder.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from diffuserve.engines.user_folders import private_cache_folder

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_FOLDERS = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
_DISABLE = "TORCH_COMPILE_DISABLE"  # PyTorch's own
_COMPILING = threading.Lock()


def compiling_is_off() -> str:
    """Why nothing is to be compiled, nor loaded that was; empty if it may be."""
    return f"${_DISABLE} is 1. Unset it" if os.environ.get(_DISABLE) == "1" else ""


def compiler_lacks(device: torch.device) -> str:
    """What is missing to compile for a device ahead of time, and how to get it; empty if nothing is."""
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler}. Install one (apt-get install g++) or name another in $CXX"
    if device.type == "cpu":
        return ""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is missing. Install it: pip install triton"
    if importlib.util.find_spec("setuptools") is None:
        return "the package setuptools is missing. Install it: pip install setuptools"
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None or not Path(CUDA_HOME, "include", "cuda.h").is_file():
        return "CUDA's headers are missing. Install NVIDIA's CUDA toolkit and name its folder in $CUDA_HOME"
    return ""


def runs_triton(device: torch.device) -> bool:
    """Whether PyTorch can compile at a call, which takes Triton, a C compiler and Python's headers; tried on a small
    function."""
    import torch

    try:
        return bool(torch.compile(torch.neg)(torch.ones(1, device=device)).item() == -1)
    except Exception:  # PyTorch's compiler raises whatever comes
        log.debug("Triton does not run", exc_info=True)
        return False


def inductor_folder() -> None:
    """Gives PyTorch's compiler a folder of the user's own, unless it has been given one; to be called before it is
    imported, which makes its folder."""
    if _FOLDERS[0] in os.environ:
        return
    private = private_cache_folder()
    if private is not None:
        os.environ[_FOLDERS[0]] = str(private / "inductor")
    else:
        folder = tempfile.mkdtemp(prefix="diffuserve-inductor-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ[_FOLDERS[0]] = folder


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for one compilation, in which PyTorch's compiler leaves all that it leaves; it is removed afterwards."""
    with _COMPILING, tempfile.TemporaryDirectory(prefix="diffuserve-compile-", ignore_cleanup_errors=True) as name:
        before = {variable: os.environ.get(variable) for variable in _FOLDERS}
        os.environ.pop(_FOLDERS[1], None)
        os.environ[_FOLDERS[0]] = name
        try:
            yield Path(name)
        finally:
            for variable, value in before.items():
                if value is None:
                    os.environ.pop(variable, None)
                else:
                    os.environ[variable] = value
