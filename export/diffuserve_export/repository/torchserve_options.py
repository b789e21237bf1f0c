"""What TorchServe itself is told of an archive, besides what our handler is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffuserve.errors import ConfigurationError
from diffuserve.options import check, option

# Its keys in model-config.yaml.
_KEYS = {
    "min_workers": "minWorkers",
    "max_workers": "maxWorkers",
    "batch_size": "batchSize",
    "max_batch_delay_ms": "maxBatchDelay",
    "startup_timeout_s": "startupTimeout",
    "device": "deviceType",
}


@dataclass(frozen=True)
class TorchServing:
    """How TorchServe runs an archive.

    Raises:
        ConfigurationError: a number is out of its range, or there would be fewer workers at most than at least.
    """

    batch_size: int = option(8, "Requests that share a batch, at most.", least=1, most=1024)
    max_batch_delay_ms: int = option(50, "Milliseconds that TorchServe waits for them.", least=0, most=60_000)
    min_workers: int = option(1, "Processes, each with the whole model.", least=1, most=64)
    max_workers: int = option(1, "The same, at most.", least=1, most=64)
    startup_timeout_s: int = option(
        600, "Seconds that loading may take; a worker that takes longer is started again.", least=1, most=24 * 3600
    )
    device: str = option("cpu", "Where the engines run.", choices=("cpu", "gpu"))

    def __post_init__(self) -> None:
        check(self)
        if self.max_workers < self.min_workers:
            raise ConfigurationError(
                f"max_workers is {self.max_workers}, less than min_workers, which is {self.min_workers}."
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TorchServing:
        """Reads them from a model-config.yaml."""
        return cls(**{name: config[key] for name, key in _KEYS.items()})

    def to_config(self) -> dict[str, Any]:
        """The keys of a model-config.yaml."""
        return {key: getattr(self, name) for name, key in _KEYS.items()}
