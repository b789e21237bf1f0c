"""Gaussian noise equal to torch's CPU generator, without torch: the same seed gives the image that diffusers gives.

`Generator(seed).randn(shape)` follows `torch.randn(shape, generator=torch.Generator().manual_seed(seed))` draw by draw.
Both use the Mersenne Twister MT19937; what is torch's own is how its 32-bit words become normal deviates. There are two
ways, chosen by the number of values (`normal_kernel` in ATen/native/cpu/DistributionTemplates.h), and both are
Box-Muller transforms: from uniform u1, u2, sqrt(-2 ln u1) times the cosine and the sine of 2 pi u2.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_CHUNK = 16  # torch fills vectors of 16: the first 8 uniforms are u1, the other 8 are u2


class Generator:
    """A stream of standard normal values. Not safe to share between threads: one for each image.

    Args:
        seed: 0 .. 2^32-1. (torch takes 64 bits, and its CPU generator keeps the lower 32.)
    """

    def __init__(self, seed: int) -> None:
        # RandomState, because NumPy has frozen its streams for good (NEP 19); it seeds as torch does.
        self._words = np.random.RandomState(seed)
        self._spare: float | None = None

    def randn(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The next values of the stream, as (*shape) float32 of zero mean and unit variance."""
        size = math.prod(shape)
        values = self._vectors(size) if size >= _CHUNK else self._scalars(size)
        return values.reshape(shape)

    def _uint32(self, size: int) -> NDArray[np.uint32]:
        return self._words.randint(0, 2**32, size=size, dtype=np.uint32)

    def _vectors(self, size: int) -> NDArray[np.float32]:
        """torch's `normal_fill`. Where 16 does not divide the size, the last 16 values are drawn anew."""
        values = np.empty(size, np.float32)
        whole = size - size % _CHUNK
        words = self._uint32(size)
        values[:whole] = _box_muller(words[:whole])
        if whole < size:
            values[-_CHUNK:] = _box_muller(self._uint32(_CHUNK))
        return values

    def _scalars(self, size: int) -> NDArray[np.float32]:
        """torch's `normal_distribution<double>`. Each transform gives two values; an odd one out waits for the next
        short draw, however many long ones come in between."""
        values = np.empty(size, np.float32)
        for i in range(size):
            if self._spare is not None:
                values[i], self._spare = self._spare, None
                continue
            high1, low1, high2, low2 = self._uint32(4).tolist()
            u1, u2 = (((high << 32 | low) & (2**53 - 1)) / 2**53 for high, low in ((high1, low1), (high2, low2)))
            radius = math.sqrt(-2.0 * math.log1p(-u2))
            values[i] = radius * math.cos(2.0 * math.pi * u1)
            self._spare = radius * math.sin(2.0 * math.pi * u1)
        return values


def _box_muller(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Normal values, (16 n,) float32, from as many random words; the words are overwritten.

    The lower 24 bits make a uniform float32. Single precision throughout, since torch rounds the angle to it.
    """
    words &= 0xFFFFFF
    uniform = np.multiply(words, np.float32(2**-24), dtype=np.float32, casting="unsafe").reshape(-1, 2, _CHUNK // 2)
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - uniform[:, 0]))
    angle = np.float32(2.0 * math.pi) * uniform[:, 1]
    values = np.empty_like(uniform)
    np.multiply(radius, np.cos(angle), out=values[:, 0])
    np.multiply(radius, np.sin(angle), out=values[:, 1])
    return values.reshape(-1)
