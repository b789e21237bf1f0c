"""Puts a finished folder in place of an older one, so that whoever looks never finds half of it.

Beside the folder NAME lie, while an export runs, `.NAME.partial-PID`, which is being written, and for a moment
`.NAME.old-PID`, the one that is replaced. Those of a process that has died are cleaned up by the next export.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Yields an empty folder to write into; it becomes `output` at the end, or is removed if the block raises."""
    output.parent.mkdir(parents=True, exist_ok=True)
    clean_up_after_dead(output)
    partial, old = _beside(output, "partial"), _beside(output, "old")
    partial.mkdir()
    try:
        yield partial
        if output.exists():
            output.replace(old)
        partial.replace(output)
    finally:
        _restore_or_remove(old, output)
        shutil.rmtree(partial, ignore_errors=True)


def clean_up_after_dead(output: Path) -> None:
    """Removes what exports to `output` left behind when they were killed, and nothing that a running one writes."""
    pattern = re.compile(rf"\.{re.escape(output.name)}\.(partial|old)-(\d+)")
    for folder in output.parent.iterdir():
        match = pattern.fullmatch(folder.name)
        if match is None or not folder.is_dir() or _is_alive(int(match[2])):
            continue
        if match[1] == "old":
            _restore_or_remove(folder, output)
        else:
            shutil.rmtree(folder)


def _beside(output: Path, kind: str) -> Path:
    return output.parent / f".{output.name}.{kind}-{os.getpid()}"


def _restore_or_remove(old: Path, output: Path) -> None:
    """An older folder goes back if nothing took its place, which happens when an export dies in between."""
    if old.is_dir() and not output.exists():
        old.replace(output)
    shutil.rmtree(old, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # this process is about to begin: the folder is of one that had the same number
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
