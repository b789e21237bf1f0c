r"""The `parameters` text inside an image, in the form that AUTOMATIC1111's web UI writes and many tools read.

    a cat, flat
    Negative prompt: a dog
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 4.5, Seed: 7, Size: 512x512, Model: "v1: final", ...

The names of the settings, their order, and when one is left out are the web UI's (`create_infotext` of its release 1.10);
those that it does not have stand after its own. Readers take the last line for the settings, of which the last of a name
counts, and what begins with `"` for a JSON string (`parse_generation_parameters`). So names are quoted where they would
be read as anything else. One that looks like a size, `512x512`, is taken for one however it is quoted.

The lines above carry most prompts and not all: readers take the blanks off both ends of every line, drop empty lines
at the beginning, and take a line of a prompt that begins with `Negative prompt:` for what it says. The web UI writes
such prompts as they are and reads others back. Here both prompts then follow once more among the settings, as `Prompt` and
`Negative prompt`, JSON strings that the web UI's reader prefers to the lines; unless they are longer than 8000 characters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffuserve import __version__
from diffuserve.bundle.manifest import FusedLora, Manifest
from diffuserve.request import FIELDS, TextToImageRequest
from diffuserve.samplers import SAMPLERS
from diffuserve.tensors import UNET

# The web UI's names for Lin et al.'s spacings, arXiv:2305.08891, table 2.
_SCHEDULE_TYPES = {"linspace": "Uniform", "leading": "DDIM", "trailing": "SGM Uniform"}

# Fields that have a place of their own among the settings.
_TOLD = ("steps", "guidance_scale", "seed")

_NEGATIVE_PROMPT = "Negative prompt:"
# JSON leaves these as they are, and some readers end a line at them.
_LINE_ENDS = str.maketrans({character: f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"})
# Readers that do not understand quotes split at these, and take what follows for another setting.
_SEPARATORS = str.maketrans({character: f"\\u{ord(character):04x}" for character in ",:"})
# Beyond this, prompts are not repeated: no limit of a file's format is then met with the usual limits of a request.
_MAX_REPEATED_CHARACTERS = 8000


def infotext(request: TextToImageRequest, manifest: Manifest, seed: int, *, padded: bool = False) -> str:
    """What drew the image with `seed`: prompt, settings, model, engine and the bundle's hash.

    `Model hash` is what it is in the web UI, the beginning of the checkpoint file's SHA-256, and is left out where the
    checkpoint was a folder. `Source hash` is of all that the export read, configs, weights and LoRAs.

    Args:
        request: what was asked for.
        manifest: of the bundle that drew it.
        seed: of this image.
        padded: whether chunks of the empty prompt were put after the shorter of the prompts.
    """
    model, unet = manifest.model, manifest.components[UNET]
    # Without guidance there was no negative prompt.
    prompt, negative_prompt = request.prompt, request.negative_prompt if request.guided else ""
    settings = {
        FIELDS["steps"].infotext: request.steps,
        **_sampler_settings(request.sampler, manifest.scheduler),
        FIELDS["guidance_scale"].infotext: _number(request.guidance_scale),
        FIELDS["seed"].infotext: seed,
        "Size": f"{request.width}x{request.height}",
        "Model hash": manifest.checkpoint_sha256[:10] or None,
        "Model": _quoted(model.name),
        "Clip skip": _clip_skip(model.clip_skip, model.family),
        "RNG": "CPU",  # of torch's generators the CPU's; the web UI's own default is the GPU's
        "Pad conds": True if padded else None,
        "Noise Schedule": "Zero Terminal SNR" if manifest.scheduler.get("rescale_betas_zero_snr") else None,
        **_lora_settings(manifest.loras),
        **_other_settings(request),
        "Engine": f"{unet.engine} {unet.precision}",
        "Source hash": manifest.source_sha256[:10],
        "Bundle hash": manifest.bundle_sha256[:10],
        "Version": f"diffuserve {__version__}",
        **_repeated(prompt, negative_prompt),
    }
    lines = [_line(prompt)] if prompt else []
    if negative_prompt:
        lines.append(f"{_NEGATIVE_PROMPT} {_line(negative_prompt)}")
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items() if value is not None))
    return "\n".join(lines)


def _sampler_settings(name: str, scheduler: Mapping[str, Any]) -> dict[str, str]:
    """The sampler and its schedule, in two settings as the web UI has had them since 1.9. It still reads "DPM++ 2M Karras",
    but takes a plain "DPM++ 2M" for that too, so the schedule has to be told."""
    sampler = SAMPLERS[name]
    if name == "pndm" and scheduler.get("skip_prk_steps"):
        return {"Sampler": "PLMS"}
    if not sampler.spaced:
        return {"Sampler": sampler.infotext}
    spacing = scheduler.get("timestep_spacing") or "linspace"
    if spacing == "linspace" and name.startswith("dpmpp"):
        spacing = "trailing"  # which begins at the same timesteps and leaves out the last too
    schedule_type = "Karras" if sampler.settings.get("use_karras_sigmas") else _SCHEDULE_TYPES[spacing]
    return {"Sampler": sampler.infotext, "Schedule type": schedule_type}


def _other_settings(request: TextToImageRequest) -> dict[str, str]:
    """Those beside steps, guidance and seed, if they are not at a default that is the same for all models."""
    return {
        field.infotext: _number(value) if isinstance(value, float) else _quoted(str(value))
        for name, field in FIELDS.items()
        if field.infotext and name not in _TOLD and (value := getattr(request, name)) != field.default
    }


def _clip_skip(clip_skip: int, family: str) -> int | None:
    """Which of the text encoder's layers is used, counted from its end as the web UI does: the last is 1, and need not be
    told. In Stable Diffusion XL diffusers counts from the last but one, which is the usual one there."""
    if not clip_skip:
        return None
    return clip_skip + (2 if family == "stable-diffusion-xl" else 1)


def _lora_settings(loras: tuple[FusedLora, ...]) -> dict[str, str]:
    """The LoRAs in the weights: their scales, and under the web UI's own name for it what it has there, the beginnings of
    the SHA-256 of the weights in their files. They are not put into the prompt as `<lora:...>`, by which the web UI would
    apply them to weights that have them already."""
    if not loras:
        return {}
    scales = ", ".join(f"{lora.name}: {_number(lora.scale)}" for lora in loras)
    names = [lora.name.replace(",", "").replace(":", "") for lora in loras]
    hashes = ", ".join(f"{name}: {lora.weights_sha256[:12]}" for name, lora in zip(names, loras, strict=True))
    known = all(lora.weights_sha256 for lora in loras)  # bundles of earlier versions do not tell them
    return {"Fused LoRAs": _quoted(scales), **({"Lora hashes": _quoted(hashes)} if known else {})}


def _number(value: float) -> str:
    """The shortest digits that are read as the same number. Most came as float32, and are that number."""
    value += 0.0  # which makes 0 of -0
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return np.format_float_positional(single if single == value else value, trim="-")


def _quoted(text: str) -> str:
    """A name as the web UI writes it: as a JSON string if it has commas, colons or line ends in it. And also, where its
    reader would make something else of it: if it begins with a quote, has blanks around it, or is empty."""
    safe = text.splitlines() == [text] and text == text.strip() and text[0] != '"' and not {",", ":"} & {*text}
    return text if safe else json.dumps(text, ensure_ascii=False).translate(_LINE_ENDS)


def _line(prompt: str) -> str:
    """A prompt as it stands above the settings. A PNG's text may not hold null characters."""
    return prompt.replace("\0", " ")


def _repeated(prompt: str, negative_prompt: str) -> dict[str, str]:
    """Both prompts as settings, if the lines do not carry them."""
    if all(map(_is_carried, (prompt, negative_prompt))):
        return {}
    settings = {"Prompt": _escaped(prompt), "Negative prompt": _escaped(negative_prompt)}
    return settings if sum(map(len, settings.values())) <= _MAX_REPEATED_CHARACTERS else {}


def _is_carried(prompt: str) -> bool:
    lines = prompt.split("\n")
    plain = all(line == line.strip() and not line.startswith(_NEGATIVE_PROMPT) for line in lines)
    return plain and "\0" not in prompt and (lines[0] != "" or prompt == "")


def _escaped(text: str) -> str:
    """A JSON string with nothing in it that readers without JSON stumble on: no comma, colon, quote or line end."""
    parts = (json.dumps(part, ensure_ascii=False)[1:-1] for part in text.split('"'))
    return '"' + r"\u0022".join(parts).translate(_LINE_ENDS).translate(_SEPARATORS) + '"'
