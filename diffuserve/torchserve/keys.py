"""TorchServe's file of keys, which it writes at every start."""

from __future__ import annotations

import json
from pathlib import Path

from diffuserve.errors import LaunchError


def read_inference_token(key_file: Path) -> str:
    """What requests carry, as `Authorization: Bearer TOKEN`; raises as `read_token`."""
    return read_token(key_file, "inference")


def read_token(key_file: Path, kind: str) -> str:
    """The token for requests of a kind, inference or management.

    Raises:
        LaunchError: there is no such file, or it holds no keys.
    """
    try:
        token = json.loads(key_file.read_bytes())[kind]["key"]
    except OSError as error:
        raise LaunchError(
            f"TorchServe's keys cannot be read: {key_file}: {error.strerror}. `diffuserve serve --server torchserve` says "
            "where they are."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise LaunchError(f"{key_file} does not hold TorchServe's keys.") from None
    return str(token)
