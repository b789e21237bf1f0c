"""The optimiser and its schedule, the same for every training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffuserve_training.config import Optimisation
from diffuserve_training.muon import Muon, hidden_matrices
from diffuserve_training.progress import Progress


def optimiser_of(network: nn.Module, optimisation: Optimisation, progress: Progress) -> dict[str, Any]:
    """What trains the parameters of `network` that require gradients, and its schedule, as Lightning takes them."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer
    if optimisation.matrix_learning_rate is None:
        optimizer = torch.optim.AdamW(
            trained,
            lr=optimisation.learning_rate,
            betas=optimisation.betas,
            weight_decay=optimisation.weight_decay,
            fused=True,
        )
    else:
        matrices = hidden_matrices(network)
        taken = {id(matrix) for matrix in matrices}
        optimizer = Muon(
            matrices,
            [parameter for parameter in trained if id(parameter) not in taken],
            matrix_learning_rate=optimisation.matrix_learning_rate,
            learning_rate=optimisation.learning_rate,
            betas=optimisation.betas,
            weight_decay=optimisation.weight_decay,
            matrix_weight_decay=optimisation.matrix_weight_decay,
        )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, progress.rate)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
