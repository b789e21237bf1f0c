"""What some UNets are conditioned on besides the text: the image's size (SDXL) and the guidance scale (LCM)."""

from __future__ import annotations

import numpy as np

from diffuserve.request import TextToImageRequest
from diffuserve.stages import Conditioning, Float32
from diffuserve.tensors import TIME_IDS, TIMESTEP_COND, StageSpec


def conditioning_from_request(request: TextToImageRequest, unet: StageSpec) -> Conditioning:
    """Args:
        request: where size and guidance scale come from.
        unet: the UNet's tensors; what it takes decides what is made.

    Returns:
        float32 arrays without a batch dimension, by input name: the same for both rows of a guided image.
    """
    made: dict[str, Float32] = {}
    for tensor in unet.inputs:
        if tensor.name == TIME_IDS:
            made[TIME_IDS] = time_ids(request.width, request.height)
        elif tensor.name == TIMESTEP_COND:
            made[TIMESTEP_COND] = guidance_embedding(request.guidance_scale, tensor.triton_dims[0])
    return made


def time_ids(width: int, height: int) -> Float32:
    """SDXL's micro-conditioning (Podell et al., arXiv:2307.01952, section 2.2) for an image that was neither scaled nor
    cropped: `_get_add_time_ids` of diffusers' StableDiffusionXLPipeline.

    Args:
        width, height: the image's, in pixels.

    Returns:
        (6,) float32: original height and width, the crop's top and left, target height and width.
    """
    return np.array([height, width, 0, 0, height, width], np.float32)


def guidance_embedding(guidance_scale: float, size: int) -> Float32:
    """Sines and cosines of the guidance scale, as a distilled UNet takes it in place of a second row (Meng et al.,
    arXiv:2210.03142): `get_guidance_scale_embedding` of diffusers for w = guidance_scale - 1.

    Args:
        guidance_scale: as in a request; 1 means no guidance.
        size: of the embedding, the UNet's time_cond_proj_dim; from 4.

    Returns:
        (size,) float32 in -1..1.
    """
    half = size // 2
    step = np.log(np.float32(10000)) / np.float32(half - 1)
    angles = np.float32(guidance_scale - 1) * np.float32(1000) * np.exp(np.arange(half, dtype=np.float32) * -step)
    embedding: Float32 = np.zeros(size, np.float32)  # of an odd size the last stays 0
    embedding[:half] = np.sin(angles)
    embedding[half : 2 * half] = np.cos(angles)
    return embedding
