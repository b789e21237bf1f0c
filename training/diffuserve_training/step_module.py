"""What every training here has in common: data and noise that follow from the step, and averaged weights."""

from __future__ import annotations

from typing import Any

import lightning
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from diffuserve.engines.processor import usable_cores
from diffuserve_training.averaging import Average
from diffuserve_training.config import Optimisation
from diffuserve_training.dataset import Steps
from diffuserve_training.optimisation import optimiser_of
from diffuserve_training.progress import Progress


class StepModule(lightning.LightningModule):
    """A training whose step n is the same in every run with the same seed.

    Attributes:
        most_workers: processes that may prepare batches beside a GPU; without one the processors train.

    Args:
        optimisation: how.
        seconds: how long, instead of so many steps.
    """

    most_workers = 0

    def __init__(self, optimisation: Optimisation, seconds: float | None = None) -> None:
        super().__init__()
        self.optimisation = optimisation
        self.progress = Progress(optimisation, seconds)

    def batch(self, step: int, seed: tuple[int, ...]) -> Any:
        """The data of a step on one device; all that is random in it follows from `seed`."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader[Any]:
        def batch_of(step: int) -> Any:
            return self.batch(step, (self.optimisation.seed, step, self.global_rank))

        workers = min(self.most_workers, usable_cores() - 2)
        steps = Steps(batch_of, lambda: self.global_step)
        if workers < 1 or self.device.type == "cpu":
            return DataLoader(steps, batch_size=None)
        return DataLoader(
            steps, batch_size=None, num_workers=workers, prefetch_factor=4, multiprocessing_context="fork"
        )

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """By our own call: Lightning's refuses fused optimisers under autocast, for the sake of a scaler that bf16 has not."""
        torch.nn.utils.clip_grad_norm_(self.parameters(), self.optimisation.clip_norm)

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """For what is random in a step besides its data; its numbers follow from the seed, the step and the device."""
        seeds = np.random.SeedSequence((self.optimisation.seed, self.global_step, self.global_rank))
        return torch.Generator(device).manual_seed(int(seeds.generate_state(1)[0]))


class AveragedModule(StepModule):
    """One that trains what requires gradients in `network`, and keeps `average` of its weights."""

    most_workers = 10

    def __init__(self, optimisation: Optimisation, network: nn.Module, seconds: float | None = None) -> None:
        super().__init__(optimisation, seconds)
        self.network: Any = network
        self.average = Average(network, optimisation.ema_decay)

    def configure_optimizers(self) -> Any:
        return optimiser_of(self.network, self.optimisation, self.progress)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        count = self.global_step
        super().optimizer_step(*args, **kwargs)
        # Not at the batch's end: Lightning writes its checkpoint before it tells the module of that.
        self.average.update(self.network, count)
