from __future__ import annotations

import numpy as np
import pytest
import torch

from diffuserve.samplers.noise import Generator

SHAPES = [(4, 64, 64), (3,), (1,), (17,), (0,), (15,), (16,), (33,), (1, 4, 31, 7), (2,), (5, 3), (4, 96, 128), (1,)]


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 2**32 - 1])
def test_successive_draws_follow_torch(seed: int) -> None:
    # Short, long and uneven draws in turn: a spare value of the short ones has to outlive the long ones.
    ours, reference = Generator(seed), torch.Generator().manual_seed(seed)
    for shape in SHAPES:
        values = ours.randn(shape)
        assert values.shape == shape
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, torch.randn(shape, generator=reference).numpy(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [*range(1, 40), 1000, 4097])
def test_one_draw_of_any_size_follows_torch(size: int) -> None:
    reference = torch.randn(size, generator=torch.Generator().manual_seed(size))
    np.testing.assert_allclose(Generator(size).randn((size,)), reference.numpy(), atol=1e-6, rtol=0)


def test_generators_do_not_share_a_stream() -> None:
    first, second = Generator(7), Generator(7)
    first.randn((100,))
    np.testing.assert_array_equal(second.randn((20,)), Generator(7).randn((20,)))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="Seed must be between"):
        Generator(seed)
