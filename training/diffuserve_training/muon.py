"""Muon, for the matrices inside a network, with AdamW for all else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

# Polar Express (Amsel et al., arXiv:2505.16932): each polynomial of degree five is the one that is nearest to one, in the maximum
# norm, on the range that those before it leave; here from 0.02 to 1. After three, such singular values lie within 0.907 and
# 1.093, and smaller ones, which are mostly noise, below.
_POLYNOMIALS = (
    (7.711, -22.1138, 16.2487),
    (3.2153, -2.4112, 0.5013),
    (2.2183, -1.594, 0.4107),
)
_ENDS = frozenset({"conv_in", "conv_out", "quant_conv", "post_quant_conv"})


def hidden_matrices(network: nn.Module) -> list[nn.Parameter]:
    """The trained weights of linear and convolutional layers, but for those at the ends, where rows are channels of a picture."""
    return [
        parameter
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not _ENDS.intersection(name.split("."))
        for kind, parameter in module.named_parameters(recurse=False)
        if kind == "weight" and parameter.requires_grad
    ]


def orthogonalised(matrices: Tensor) -> Tensor:
    """(..., m, n), any dtype, to bf16 with the same singular vectors and singular values near one."""
    wide = matrices.bfloat16()
    if transposed := wide.shape[-2] > wide.shape[-1]:
        wide = wide.mT
    wide = wide / (1.01 * wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for linear, cubic, quintic in _POLYNOMIALS:
        gram = wide @ wide.mT
        wide = linear * wide + (cubic * gram + quintic * (gram @ gram)) @ wide
    return wide.mT if transposed else wide


class Muon(torch.optim.Optimizer):
    """Jordan et al., https://kellerjordan.github.io/posts/muon: the momentum of a matrix, its singular values made equal. A
    convolution's kernel is a matrix with a row for each output channel. Autoencoder and UNet alike get by with a third of
    AdamW's steps or fewer.

    The rates of a group with `matrices` are Muon's, scaled by sqrt(max(1, rows / columns)); those of the others AdamW's.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        *,
        matrix_learning_rate: float,
        learning_rate: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        matrix_weight_decay: float = 0.0,
    ) -> None:
        groups = [
            {
                "params": list(matrices),
                "matrices": True,
                "lr": matrix_learning_rate,
                "weight_decay": matrix_weight_decay,
            },
            {"params": list(others), "matrices": False, "lr": learning_rate, "weight_decay": weight_decay},
        ]
        super().__init__(groups, {"momentum": momentum, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; `closure`, if there is one, computes them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not trained:
                continue
            if group["matrices"]:
                self._update_matrices(trained, group)
            else:
                self._update_others(trained, group)
        return loss

    def _update_matrices(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Those of one shape together, since a GPU has little to do for one alone."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        alike: dict[tuple[int, ...], list[Tensor]] = {}
        for parameter in parameters:
            alike.setdefault(tuple(parameter.shape), []).append(parameter)
        for shape, some in alike.items():
            gradients = [parameter.grad for parameter in some if parameter.grad is not None]
            momenta = [self.state[parameter]["momentum"] for parameter in some]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            ahead = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"])).flatten(2)  # Nesterov's
            rows, columns = ahead.shape[1:]
            rate = group["lr"] * max(1, rows / columns) ** 0.5
            updates = orthogonalised(ahead).to(some[0].dtype).reshape(-1, *shape)
            if group["weight_decay"]:
                torch._foreach_mul_(some, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(some, list(updates.unbind()), alpha=-rate)

    def _update_others(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter].update(
                    step=torch.zeros(()), mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter)
                )
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["mean"] for state in states],
            [state["square"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )
