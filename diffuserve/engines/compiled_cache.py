"""What engines have compiled of a component, kept on disk so that the next start does not compile it again.

An entry is a folder beside the model, or for native code in the user's private folder, named after everything that decides
what is in it and after the engine, written aside and renamed. It is what a start really loads, so its files are compared with
the samples that were taken when it was made (`diffuserve.bundle.file_samples`); an entry that differs is made anew.
(OpenVINO has a cache of its own, but it writes each file in place: a process that starts while another writes would
read half of one.) A cache that cannot be written or read costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from diffuserve.bundle.file_samples import FileSample, sample_file
from diffuserve.bundle.manifest import Component
from diffuserve.engines.processor import processor_flags, processor_name
from diffuserve.engines.user_folders import private_cache_folder, user_cache_folder

log = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")

# Engines that compile to native code, which is run when it is loaded.
NATIVE = ("torch", "torch-cuda")
_PARTIAL = ".partial"
# Of an entry: its other files' samples, sorted by name.
_SAMPLES_NAME = "samples.json"


class CompiledCache:
    """The entry of one component on one engine, with certain settings, on this processor.

    Args:
        path: the component's first file.
        component: its checksums name the entry.
        version: of the engine.
        settings: all else that decides what is compiled.
    """

    def __init__(self, path: Path, component: Component, version: str, settings: Mapping[str, Any]) -> None:
        decides = {
            "files": [file.sha256 for file in component.files],
            "version": version,
            "processor": [processor_name(), *sorted(processor_flags())],
            "settings": dict(settings),
        }
        hashed = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        self._path, self._component = path, component
        self._name = f"{_prefix(component)}{hashed[:16]}.{component.engine}"
        self._folders = cache_folders(path, component.engine)

    def entries(self) -> Iterator[Path]:
        """The folders that hold it as it was written; one, unless a model's folder has become writable since."""
        for entry in (folder / self._name for folder in self._folders):
            if not entry.is_dir():
                continue
            if is_whole(entry):
                yield entry
            else:
                self.discard(entry, "its files are not those that were written")

    def loaded(self, load: Callable[[Path], Loaded], *unusable: type[Exception]) -> Loaded | None:
        """What `load` makes of the entry's folder; None if there is none. One about which it raises one of `unusable` is
        removed."""
        for entry in self.entries():
            try:
                return load(entry)
            except unusable as error:
                self.discard(entry, error)
        return None

    def discard(self, entry: Path, reason: object) -> None:
        """Removes an entry that cannot be used."""
        log.warning("%s cannot be used (%s); compiling %s again", entry, reason, self._path)
        shutil.rmtree(entry, ignore_errors=True)

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path | None]:
        """Yields a folder that becomes the entry, and replaces what other versions or settings have left; None where
        nothing can be written. An OSError within is not raised: there is no entry then."""
        for folder in self._folders:
            try:
                folder.mkdir(mode=0o755, parents=True, exist_ok=True)
                partial = Path(tempfile.mkdtemp(suffix=_PARTIAL, prefix=f".{self._name}-", dir=folder))
            except OSError:
                continue
            try:
                yield partial
                (partial / _SAMPLES_NAME).write_bytes(msgspec.json.encode(_samples(partial)))
                partial.chmod(0o755)  # as its files are, and not for this user alone
                partial.rename(folder / self._name)
            except OSError as error:
                if not is_whole(folder / self._name):  # else another process has written it meanwhile
                    log.warning("%s cannot be written: %s", folder / self._name, error)
            else:
                remove_compiled(self._path, self._component, self._component.engine, keep=self._name)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            return
        yield None


def cache_folders(path: Path, engine: str) -> list[Path]:
    """Where a model's compiled form may lie: beside it, or where that cannot be written in the user's cache folder. Native
    code lies only where nobody else can have put it."""
    if engine in NATIVE:
        folder = private_cache_folder()
        return [] if folder is None else [folder]
    users = user_cache_folder()
    return [path.parent, *([] if users is None else [users])]


def is_whole(entry: Path) -> bool:
    """Whether an entry's files are those that were written, as far as their samples tell."""
    try:
        written = msgspec.json.decode((entry / _SAMPLES_NAME).read_bytes(), type=tuple[FileSample, ...])
        return written == _samples(entry)
    except (OSError, msgspec.DecodeError):
        return False


def compiled_beside(path: Path, component: Component) -> list[Path]:
    """The whole entries that lie beside a component's first file, for the engine that it is on."""
    if path.parent not in cache_folders(path, component.engine):
        return []
    return [entry for entry in sorted(path.parent.glob(f"{_prefix(component)}*.{component.engine}")) if is_whole(entry)]


def remove_compiled(path: Path, component: Component, engine: str, keep: str = "") -> None:
    """Removes what an engine has compiled of a component's files, for any version, processor and settings, but for
    `keep`."""
    for folder in cache_folders(path, engine):
        for entry in folder.glob(f"{_prefix(component)}*.{engine}"):
            if entry.name != keep:
                shutil.rmtree(entry, ignore_errors=True)


def _samples(entry: Path) -> tuple[FileSample, ...]:
    return tuple(sample_file(entry, path) for path in sorted(entry.iterdir()) if path.name != _SAMPLES_NAME)


def _prefix(component: Component) -> str:
    """The files' own part of the name, since models share the user's cache folder."""
    files = "".join(file.sha256 for file in component.files)
    return hashlib.sha256(files.encode()).hexdigest()[:16] + "-"
