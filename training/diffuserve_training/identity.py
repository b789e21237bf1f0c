"""Which training a run is of: it goes on only with what it began with, and is never handed back as another's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from diffuserve.files import write_whole
from diffuserve_training.config import ConfigError, Optimisation

LAST = "last.ckpt"  # Lightning's name for where a run goes on
_IDENTITY = "training.sha256"


def begin_run(run: Path, *parts: Any) -> Path:
    """A run's folder, for this training alone; to be called before anything is made in it.

    Args:
        run: the folder, inside the one that is given as `--output`.
        parts: all that the training follows from, save `steps`: bytes, or what msgspec writes as JSON.

    Returns:
        `run`.

    Raises:
        ConfigError: a checkpoint in it is of another training, or of one that is not told.
    """
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else msgspec.json.encode(part, enc_hook=str, order="deterministic")
        digest.update(len(data).to_bytes(8, "big") + data)
    file, identity = run / _IDENTITY, digest.hexdigest().encode()
    if (run / LAST).is_file():
        if not file.is_file() or file.read_bytes() != identity:
            raise ConfigError(
                f"{run.parent} holds another training's run: its configuration (apart from `steps`), data or first weights differ. "
                f"Name another --output, or remove {run} to begin anew."
            )
    else:
        run.mkdir(parents=True, exist_ok=True)
        write_whole(file, identity)
    return run


def without_steps(optimisation: Optimisation) -> Optimisation:
    """What has to be the same when a training goes on: it may have more steps."""
    return msgspec.structs.replace(optimisation, steps=1)


def file_digest(path: Path) -> bytes:
    """Raises `ConfigError`: it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None


def weights_digest(*modules: Any, only: tuple[str, ...] = ("",)) -> bytes:
    """Of fp32 weights on the CPU.

    Args:
        modules: of PyTorch.
        only: beginnings of the names of those that count.
    """
    digest = hashlib.sha256()
    for name, weight in _weights(modules):
        if name.startswith(only):
            digest.update(name.encode())
            digest.update(weight.detach().contiguous().reshape(-1).numpy())
    return digest.digest()


def _weights(modules: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    for module in modules:
        yield from sorted(module.state_dict().items())
