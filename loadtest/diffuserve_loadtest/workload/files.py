"""Workloads as YAML: those that are shipped, those of a user, and one for another process."""

from __future__ import annotations

import math
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from diffuserve.errors import InvalidRequest
from diffuserve_loadtest.workload.arrivals import Replay
from diffuserve_loadtest.workload.workload import Workload

_SHIPPED = resources.files("diffuserve_loadtest.workload") / "shipped"


def shipped_workloads() -> list[str]:
    """Names of those that come with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _SHIPPED.iterdir() if entry.name.endswith(".yaml"))


def read_workload(name: str) -> Workload:
    """A shipped workload by its name, or one from a file by its path.

    Raises:
        InvalidRequest: there is no such workload, or its file does not say what it must.
    """
    import yaml

    try:
        if name in shipped_workloads():
            text, folder = (_SHIPPED / f"{name}.yaml").read_text(), Path()
        else:
            text, folder = Path(name).read_text(), Path(name).parent
    except OSError as error:
        raise InvalidRequest(
            f"There is no workload {name!r} ({error.strerror}); give a YAML file, or one of {', '.join(shipped_workloads())}."
        ) from None
    try:
        workload = msgspec.convert(yaml.safe_load(text), Workload)
    except (yaml.YAMLError, msgspec.ValidationError) as error:
        raise InvalidRequest(f"The workload {name} cannot be read: {error}.") from None
    _check(name, workload)
    if isinstance(workload.arrivals, Replay):
        file = str((folder / workload.arrivals.file).absolute())
        workload = msgspec.structs.replace(workload, arrivals=msgspec.structs.replace(workload.arrivals, file=file))
    return workload


def to_yaml(workload: Workload) -> str:
    """What `read_workload` reads back."""
    import yaml

    text: str = yaml.safe_dump(_without_none(msgspec.to_builtins(workload)), sort_keys=False)
    return text


def _check(name: str, workload: Workload) -> None:
    if not workload.warm_up_s < workload.duration_s < math.inf:
        raise InvalidRequest(
            f"The workload {name} warms up for {workload.warm_up_s} s of {workload.duration_s} s; leave some time to measure."
        )


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(item) for item in value]
    return value
