from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from diffuserve.trials.similarity import psnr_db, ssim

IMAGE = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)


def test_psnr() -> None:
    assert math.isinf(psnr_db(IMAGE, IMAGE))
    assert psnr_db(np.zeros(100, np.uint8), np.ones(100, np.uint8)) == pytest.approx(48.13, abs=0.01)
    assert psnr_db(np.zeros(3, np.uint8), np.full(3, 255, np.uint8)) == 0  # and no overflow of 8 bits
    assert math.isinf(psnr_db(Image.fromarray(IMAGE), IMAGE))


def test_ssim() -> None:
    assert ssim(IMAGE, IMAGE) == 1
    assert ssim(IMAGE, IMAGE[::-1]) < 0.1
    y, x = np.mgrid[:32, :48]
    smooth = np.stack([4 * x, 4 * y, x + y], axis=-1).astype(np.uint8)
    noise = np.random.default_rng(1).normal(0, 4, smooth.shape)
    noisy = (smooth + noise).clip(0, 255).astype(np.uint8)
    brighter = (smooth + 4).astype(np.uint8)
    assert ssim(noisy, smooth) < ssim(brighter, smooth) < 1  # structure counts, not brightness
