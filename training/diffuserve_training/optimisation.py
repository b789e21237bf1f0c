"""The optimiser and its schedule, the same for every training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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
