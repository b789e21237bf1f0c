"""The modules that are exported, one file each: Stable Diffusion's parts with exactly the tensors of
`diffuserve.tensors`.

What StableDiffusionPipeline does around its models is inside: scaling of latents, clamping, rounding, layout.
"""

from __future__ import annotations

from torch import nn

from diffuserve.bundle.manifest import ModelSpec
from diffuserve.tensors import SAFETY_CHECKER, TEXT_ENCODER, UNET, VAE_DECODER, VAE_ENCODER
from diffuserve_export.checkpoint.loaded_model import LoadedModel
from diffuserve_export.graphs.latents_to_pixels import VaeDecoder
from diffuserve_export.graphs.pixels_to_latents import VaeEncoder
from diffuserve_export.graphs.safety_checker import SafetyChecker
from diffuserve_export.graphs.text_encoder import TextEncoder, TextEncoders
from diffuserve_export.graphs.unet import Unet


def modules_from_model(model: LoadedModel, spec: ModelSpec) -> dict[str, nn.Module]:
    """The module of each stage, by name; they share the model's weights."""
    text_encoder: nn.Module
    if model.text_encoder_2 is None:
        text_encoder = TextEncoder(model.text_encoder, spec.clip_skip)
    else:
        text_encoder = TextEncoders(model.text_encoder, model.text_encoder_2, spec.clip_skip)
    modules: dict[str, nn.Module] = {
        TEXT_ENCODER: text_encoder,
        UNET: Unet(model.unet),
        VAE_DECODER: VaeDecoder(model.vae),
        VAE_ENCODER: VaeEncoder(model.vae),
    }
    if model.safety_checker is not None:
        modules[SAFETY_CHECKER] = SafetyChecker(model.safety_checker)
    return {stage: module.eval().requires_grad_(False) for stage, module in modules.items()}
