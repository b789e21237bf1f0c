"""How alike two images are."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def psnr_db(image: ArrayLike, reference: ArrayLike) -> float:
    """Peak signal-to-noise ratio of two images of the same shape in levels of 0..255, in decibels; infinite if they are
    equal."""
    difference = np.asarray(image, np.float64) - np.asarray(reference, np.float64)
    mean_square = float(np.square(difference).mean())
    return math.inf if mean_square == 0 else 10 * math.log10(255**2 / mean_square)


def ssim(image: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    """Structural similarity (Wang et al. 2004, doi:10.1109/TIP.2003.819861) with the paper's Gaussian window, as
    scikit-image computes it: 1 for equal images, about 0 for unrelated ones.

    Args:
        image, reference: (H, W, 3) uint8, at least 11 x 11.
    """
    from skimage.metrics import structural_similarity

    return float(
        structural_similarity(  # type: ignore[no-untyped-call]
            image,
            reference,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
        )
    )
