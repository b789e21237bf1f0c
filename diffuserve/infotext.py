"""The `parameters` text inside an image, in the form that AUTOMATIC1111's web UI writes and many tools read."""

from __future__ import annotations

import json

from diffuserve import __version__
from diffuserve.bundle import FusedLora, Manifest
from diffuserve.request import TextToImageRequest
from diffuserve.tensors import UNET

# The names under which other tools know the samplers, and the schedule where it is not the default one.
_SAMPLER_NAMES = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_a": "Euler a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_karras": "DPM++ 2M Karras",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2m_sde_karras": "DPM++ 2M SDE Karras",
    "unipc": "UniPC",
    "heun": "Heun",
    "pndm": "PNDM",
    "lcm": "LCM",
}


def infotext(request: TextToImageRequest, manifest: Manifest, seed: int) -> str:
    """What drew the image with `seed`: prompt, settings, model, engine and the bundle's hash."""
    unet = manifest.components[UNET]
    settings = {
        "Steps": request.steps,
        "Sampler": _SAMPLER_NAMES.get(request.sampler, request.sampler),
        "CFG scale": f"{request.guidance_scale:g}",
        "Seed": seed,
        "Size": f"{request.width}x{request.height}",
        "Model hash": manifest.source_sha256[:10],
        "Model": manifest.model.name,
        **_lora_settings(manifest.loras),
        "Engine": f"{unet.engine} {unet.precision}",
        "Bundle hash": manifest.bundle_sha256[:10],
        "Version": f"diffuserve {__version__}",
    }
    lines = [request.prompt]
    if request.negative_prompt and request.guided:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items()))
    return "\n".join(lines)


def _lora_settings(loras: tuple[FusedLora, ...]) -> dict[str, str]:
    """The LoRAs in the weights: their scales, and under the web UI's own name for it the beginnings of their hashes. They
    are not put into the prompt as `<lora:...>`, by which the web UI would apply them to weights that have them already."""
    if not loras:
        return {}
    return {
        "Fused LoRAs": _quoted(", ".join(f"{lora.name}: {lora.scale:g}" for lora in loras)),
        "Lora hashes": _quoted(", ".join(f"{lora.name}: {lora.sha256[:10]}" for lora in loras)),
    }


def _quoted(text: str) -> str:
    """As the web UI writes a value that has commas or colons in it."""
    return json.dumps(text, ensure_ascii=False)
