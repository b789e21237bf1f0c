"""The optimiser: what it does to a matrix, which weights it takes for matrices, and AdamW for the rest."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from diffuserve_training.config import Optimisation
from diffuserve_training.muon import Muon, hidden_matrices, orthogonalised
from diffuserve_training.optimisation import optimiser_of
from diffuserve_training.progress import Progress


def a_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "conv_in": nn.Conv2d(3, 8, 3),
            "blocks": nn.Sequential(nn.Conv2d(8, 12, 3), nn.GroupNorm(4, 12), nn.Linear(12, 6)),
            "words": nn.Embedding(10, 12),
            "conv_out": nn.Conv2d(8, 3, 3),
        }
    )


def set_gradients(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (16, 144), (5, 5)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.T @ orthogonalised(matrix).float() @ right.T
    large = values > 0.02 * 1.01 * values.norm()
    assert large.any()
    assert (turned.diag()[large] - 1).abs().max() < 0.13  # 0.093, and bf16
    assert (turned - turned.diag().diag()).abs().max() < 0.1
    assert orthogonalised(torch.zeros(4, 6)).abs().max() == 0


def test_matrices_are_inner_weights_that_are_trained() -> None:
    network = a_network()
    convolution, _, linear = network["blocks"]  # type: ignore[index]
    assert [id(matrix) for matrix in hidden_matrices(network)] == [id(convolution.weight), id(linear.weight)]
    linear.weight.requires_grad_(False)
    assert [id(matrix) for matrix in hidden_matrices(network)] == [id(convolution.weight)]


def test_all_but_the_matrices_is_adamw() -> None:
    """Against PyTorch's; and the matrices take a step of the length that their rate says."""
    ours = a_network()
    theirs = copy.deepcopy(ours)
    settings = Optimisation(
        steps=5, batch_size=1, learning_rate=1e-2, matrix_learning_rate=0.1, warmup_steps=0, weight_decay=0.1
    )
    built = optimiser_of(ours, settings, Progress(settings))
    optimizer, schedule = built["optimizer"], built["lr_scheduler"]["scheduler"]
    assert isinstance(optimizer, Muon)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    matrices = {id(matrix) for matrix in hidden_matrices(ours)}
    before = {id(parameter): parameter.detach().clone() for parameter in ours.parameters()}
    for seed in range(3):
        for network in (ours, theirs):
            set_gradients(network, seed)
        optimizer.step()
        reference.step()
        schedule.step()
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            if id(mine) not in matrices:
                torch.testing.assert_close(mine, other)
            elif seed == 0:
                rows, columns = mine.flatten(1).shape
                moved = torch.linalg.matrix_norm((mine - before[id(mine)]).detach().flatten(1), 2)
                assert float(moved) == pytest.approx(0.1 * max(1, rows / columns) ** 0.5, rel=0.13)


def test_a_state_that_was_saved_goes_on_as_it_would_have() -> None:
    whole = a_network()
    settings = Optimisation(steps=4, batch_size=1, learning_rate=1e-2, matrix_learning_rate=0.1)
    first = optimiser_of(whole, settings, Progress(settings))["optimizer"]
    set_gradients(whole, 0)
    first.step()
    resumed = copy.deepcopy(whole)
    second = optimiser_of(resumed, settings, Progress(settings))["optimizer"]
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for network, optimizer in ((whole, first), (resumed, second)):
        set_gradients(network, 1)
        optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_matrices_shrink_by_their_own_decay() -> None:
    plain, decayed = a_network(), a_network()
    for network, decay in ((plain, 0.0), (decayed, 0.5)):
        settings = Optimisation(
            steps=4,
            batch_size=1,
            learning_rate=1e-2,
            matrix_learning_rate=0.1,
            warmup_steps=0,
            matrix_weight_decay=decay,
        )
        set_gradients(network, 0)
        before = [matrix.detach().clone() for matrix in hidden_matrices(network)]
        built = optimiser_of(network, settings, Progress(settings))
        built["optimizer"].step()
    for first, one, other in zip(before, hidden_matrices(plain), hidden_matrices(decayed), strict=True):
        torch.testing.assert_close(one - other, first * 0.1 * 0.5)


def test_without_a_rate_for_matrices_all_is_adamw() -> None:
    settings = Optimisation(steps=4, batch_size=1, learning_rate=1e-2)
    assert isinstance(optimiser_of(a_network(), settings, Progress(settings))["optimizer"], torch.optim.AdamW)
