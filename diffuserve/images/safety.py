"""What Stable Diffusion's safety checker needs around its model: images as it sees them, and what its scores mean.

Both are as in diffusers' StableDiffusionPipeline, whose parts would need transformers. docs/safety.md has the position
on safety checkers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diffuserve.bundle.manifest import ImageProcessor, Manifest
from diffuserve.errors import BundleError
from diffuserve.stages import Float32


def clip_input_from_image(image: NDArray[np.uint8], processor: ImageProcessor) -> Float32:
    """What the safety checker sees of an image, equal to what transformers' CLIPImageProcessor makes of it with Pillow.

    Args:
        image: (H, W, 3) uint8, RGB.
        processor: the bundle's.

    Returns:
        (3, S, S) float32, normalised, S the processor's `crop_px`.
    """
    from PIL import Image

    height, width = image.shape[:2]
    shorter, crop = min(height, width), processor.crop_px
    height, width = (processor.shortest_edge_px * side // shorter for side in (height, width))
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling(processor.resample)))
    top, left = (height - crop) // 2, (width - crop) // 2
    levels = resized[top : top + crop, left : left + crop].astype(np.float64)
    rescaled = (levels * processor.rescale_factor).astype(np.float32)
    mean, deviation = np.array(processor.mean, np.float32), np.array(processor.std, np.float32)
    normalised: Float32 = ((rescaled - mean) / deviation).transpose(2, 0, 1)
    return normalised


def flagged_from_scores(scores: Float32) -> NDArray[np.bool_]:
    """Which images are to be withheld: those with a concept whose score, to three decimals, is above 0.

    Args:
        scores: (n, N) float32, finite, as `diffuserve.stages.StageCalls.score_concepts` returns them.

    Returns:
        (n,) bool.
    """
    flagged: NDArray[np.bool_] = (scores.round(3) > 0).any(axis=1)
    return flagged


def refuse_without_safety_checker(manifest: Manifest) -> None:
    """Raises:
    BundleError: the bundle has no safety checker; why, and what fixes it.
    """
    if manifest.has_safety_checker:
        return
    name = manifest.model.name
    if manifest.safety_checker_left_out:
        fix = "It was left out on purpose: export the checkpoint again without --no-safety-checker"
    else:
        fix = (
            "Its checkpoint carried none: export one that does, or save one with the safety_checker and the "
            "feature_extractor of another"
        )
    raise BundleError(
        f"{name} has no safety checker, and one is required. {fix}; or assemble without --require-safety-checker."
    )
