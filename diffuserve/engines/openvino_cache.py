"""Models that OpenVINO has compiled, kept on disk so that the next start does not compile them again.

OpenVINO has a cache of its own, but it writes each file in place: a process that starts while another writes would read
half of one. Here a file is written aside and renamed, and named after everything that decides what is in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffuserve.bundle import Component
from diffuserve.engines.processor import processor_flags, processor_name
from diffuserve.files import write_whole

log = logging.getLogger(__name__)

_DEVICE = "CPU"
_SUFFIX = ".openvino"


def compiled_model(path: Path, component: Component, properties: Mapping[str, Any]) -> Any:
    """An `openvino.CompiledModel` of the .onnx file `path`, from the cache if it is there, else compiled and cached.

    A cache that cannot be written or read costs time and nothing else.

    Args:
        path: the .onnx file.
        component: its checksums name the cached file.
        properties: OpenVINO's, by name.
    """
    import openvino

    core = openvino.Core()
    name = cache_name(component, properties)
    folders = cache_folders(path)
    for folder in folders:
        file = folder / name
        if file.is_file():
            try:
                return core.import_model(file.read_bytes(), _DEVICE, dict(properties))
            except RuntimeError as error:
                log.warning("%s cannot be read (%s); compiling %s again", file, error, path)
                with contextlib.suppress(OSError):
                    file.unlink()
    compiled = core.compile_model(path, _DEVICE, dict(properties))
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / name, compiled.export_model().getbuffer())
        except OSError:
            continue
        remove_cached(path, component, keep=name)
        break
    return compiled


def cache_folders(path: Path) -> list[Path]:
    """Where a model's compiled form may lie: beside it, or where that cannot be written in the user's cache folder."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():  # the XDG specification says to ignore relative names
        return [path.parent, named / "diffuserve"]
    try:
        return [path.parent, Path.home() / ".cache" / "diffuserve"]
    except RuntimeError:  # a user without a home, as containers may have
        return [path.parent]


def cache_name(component: Component, properties: Mapping[str, Any]) -> str:
    """One name for each combination of files, OpenVINO version, processor and properties: another one is compiled anew."""
    import openvino

    decides = {
        "files": [file.sha256 for file in component.files],
        "version": openvino.get_version(),
        "processor": [processor_name(), *sorted(processor_flags())],
        "properties": dict(properties),
    }
    return _prefix(component) + hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16] + _SUFFIX


def remove_cached(path: Path, component: Component, keep: str = "") -> None:
    """Removes what was compiled of a component's files, for any version, processor and precision, but for `keep`."""
    for folder in cache_folders(path):
        for file in folder.glob(f"{_prefix(component)}*{_SUFFIX}"):
            if file.name != keep:
                with contextlib.suppress(OSError):
                    file.unlink()


def _prefix(component: Component) -> str:
    """The files' own part of the name, since models share the user's cache folder."""
    files = "".join(file.sha256 for file in component.files)
    return hashlib.sha256(files.encode()).hexdigest()[:16] + "-"
