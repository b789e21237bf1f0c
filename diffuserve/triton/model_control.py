"""Loading a model again, by Triton's HTTP API, for which Triton must run with explicit model control.

The launcher makes a key at every start, without which that API answers nobody. It stands on Triton's command line, so it
keeps out the network and not other users of the machine.

`pb_utils.load_model` would do the same without HTTP. But in Triton 2.51 it sometimes crashes the calling process when the
load fails, and that process holds every request.
"""

from __future__ import annotations

import os
import secrets
import urllib.error
from dataclasses import dataclass, field

from diffuserve.errors import StageFailed
from diffuserve.serving.http import open_url

MODEL_CONTROL_VARIABLE = "DIFFUSERVE_MODEL_CONTROL"
_HEADER = "diffuserve-key"
# The largest models take a few minutes where disks are slow.
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class ModelControl:
    """`url`: of the server's HTTP port."""

    url: str
    key: str = field(default_factory=secrets.token_hex, repr=False)

    @classmethod
    def from_environment(cls) -> ModelControl | None:
        """That of the launcher which started this process, or None if it was started in another way."""
        url, _, key = os.environ.get(MODEL_CONTROL_VARIABLE, "").partition(" ")
        return cls(url, key) if key else None

    def to_environment(self) -> str:
        """The value of `MODEL_CONTROL_VARIABLE`."""
        return f"{self.url} {self.key}"

    def flags(self) -> list[str]:
        """Triton's."""
        restricted = f"model-repository:{_HEADER}={self.key}"
        return [
            "--model-control-mode=explicit",
            "--load-model=*",
            f"--http-restricted-api={restricted}",
            f"--grpc-restricted-protocol={restricted}",
        ]

    def reload(self, model: str) -> None:
        """Blocks until the model is ready again.

        Raises:
            StageFailed: it could not be loaded.
        """
        # Loading alone would do nothing: Triton takes a model whose process has died for a good one.
        for verb in ("unload", "load"):
            url = f"{self.url}/v2/repository/models/{model}/{verb}"
            try:
                open_url(url, timeout_s=_TIMEOUT_S, data=b"{}", headers={_HEADER: self.key}).close()
            except urllib.error.HTTPError as error:
                raise StageFailed(f"Triton could not {verb} {model}: {error.read().decode(errors='replace')}") from None
            except OSError as error:
                raise StageFailed(f"Triton could not {verb} {model}: {error}") from None
