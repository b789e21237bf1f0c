"""What both stages share: the optimiser, and random numbers that follow from the step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning
import numpy as np
import torch

from diffuserve_training.config import Optimisation


def adamw(parameters: Iterable[torch.nn.Parameter], optimisation: Optimisation) -> dict[str, Any]:
    """AdamW and its schedule, as Lightning takes them."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=optimisation.learning_rate,
        betas=optimisation.betas,
        weight_decay=optimisation.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, optimisation.rate)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def generator_for(module: lightning.LightningModule) -> torch.Generator:
    """A generator whose numbers follow from the seed, the step and the device."""
    optimisation: Any = module.optimisation
    words = np.random.SeedSequence((optimisation.seed, module.global_step, module.global_rank)).generate_state(1)
    return torch.Generator().manual_seed(int(words[0]))
