"""How alike two images are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def psnr_db(image: Any, reference: Any) -> float:
    """Peak signal-to-noise ratio of two 8-bit images, in decibels; infinite if they are the same."""
    difference = np.asarray(image, np.float64) - np.asarray(reference, np.float64)
    mean_square = float((difference**2).mean())
    return math.inf if mean_square == 0 else 10 * math.log10(255**2 / mean_square)
