"""Exports a small checkpoint of each family with random weights: `python -m tests.tensorrt.small_bundles FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from diffuserve_export.export import bundle_from_checkpoint
from tests.export.tiny import WRITERS, add_safety_checker

# Those whose graphs differ by more than an input.
FAMILIES = ("sd1", "sd2", "sdxl")


def main(folder: Path) -> None:
    """Writes the bundles FOLDER/sd1 and so on; Stable Diffusion 1's has a safety checker."""
    for name in FAMILIES:
        checkpoint = WRITERS[name](folder / f"tiny-{name}")
        if name == "sd1":
            random = np.random.default_rng(0)
            add_safety_checker(checkpoint, [random.integers(0, 256, (48, 48, 3), np.uint8) for _ in range(4)])
        bundle_from_checkpoint(checkpoint, folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
