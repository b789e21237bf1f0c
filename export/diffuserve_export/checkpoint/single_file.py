"""A checkpoint as one .safetensors file in the layout of the original code, as most fine-tuned models are shared.

It holds weights only: configs and tokenizers come from a checkpoint in diffusers' format. What the file says of itself goes
before them, in tensors that are but markers and in its header, whose entries are those of Stability AI's ModelSpec 1.0.1
(https://github.com/Stability-AI/ModelSpec).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffuserve.errors import CheckpointError
from diffuserve_export.checkpoint.safetensors_file import Header, TensorInfo
from diffuserve_export.quiet import quiet

_PARTS: Mapping[str, tuple[str, ...]] = {
    "UNet (model.diffusion_model)": ("model.diffusion_model.",),
    "autoencoder (first_stage_model)": ("first_stage_model.", "vae."),
    "text encoder (cond_stage_model or conditioner)": ("cond_stage_model.", "conditioner.embedders."),
}
_ARCHITECTURE = re.compile(r"stable-diffusion(-(v1|v2|xl)(-(v?\d+(\.\d+)?|v|base|turbo|lightning|hyper|lcm))*)?")
# By what files call them; ComfyUI writes `predict_key`.
_PREDICTION_TYPES = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "sample": "sample",
}
_PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
_MOST_PX = 4096  # of a size that may be meant
# Playground 2.5 and CosXL: the noise is not that of a beta schedule.
_EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")


@dataclass(frozen=True)
class Said:
    """What a file says about how to draw with it; None where it says nothing.

    Attributes:
        prediction_type: what the UNet predicts, in diffusers' words.
        by: where the file says so.
        zero_snr: the last timestep is noise alone (Lin et al., arXiv:2305.08891).
        timesteps: first and last that it was trained for.
        encoder_layer: of the text encoder, 1 the last: AUTOMATIC1111's "Clip skip".
        size_px: width and height that it draws best.
    """

    prediction_type: str | None = None
    by: str = ""
    zero_snr: bool = False
    timesteps: tuple[int, int] | None = None
    encoder_layer: int | None = None
    size_px: tuple[int, int] | None = None


def said_by_file(file: Path, header: Header) -> Said:
    """Args:
        file: the checkpoint.
        header: its own.

    Raises:
        CheckpointError: it is something else than a checkpoint of Stable Diffusion, or contradicts itself.
    """
    metadata = {key: value.strip() for key, value in header.metadata.items() if value.strip() not in ("", "None")}
    architecture = metadata.get("modelspec.architecture", "stable-diffusion").lower().replace("_", "-")
    if not _ARCHITECTURE.fullmatch(architecture):
        raise CheckpointError(
            f"{file} says that it is a {architecture} (modelspec.architecture in its header), which is not supported. "
            "Supported are checkpoints of stable-diffusion-v1, -v2-512, -v2-768-v and -xl-v1-base; a LoRA goes by --lora "
            "beside its checkpoint."
        )
    _check_parts(file, header.tensors)
    predicted = _predictions(file, header.tensors, metadata, architecture)
    if len(set(predicted.values())) > 1:
        says = " and ".join(f"{kind} ({where})" for where, kind in predicted.items())
        raise CheckpointError(f"{file} says that it predicts {says}. Remove what is wrong from it.")
    return Said(
        prediction_type=next(iter(predicted.values()), None),
        by=", ".join(predicted),
        zero_snr="ztsnr" in header.tensors,
        timesteps=_numbers(file, metadata, "modelspec.timestep_range", r"(\d{1,6})\s*,\s*(\d{1,6})", "0,999"),
        encoder_layer=(_numbers(file, metadata, "modelspec.encoder_layer", r"(\d{1,3})", "2") or (0,))[0] or None,
        size_px=_numbers(
            file, metadata, "modelspec.resolution", r"([1-9]\d{0,4})(?:\s*[xX]\s*([1-9]\d{0,4}))?", "1024x1024"
        ),
    )


def _check_parts(file: Path, tensors: Mapping[str, TensorInfo]) -> None:
    if edm := [name for name in _EDM if name in tensors]:
        raise CheckpointError(
            f"{file} has {' and '.join(edm)}: it was trained with EDM's noise (Karras et al., arXiv:2206.00364), as Playground "
            "2.5 and CosXL were, which is not supported."
        )
    missing = [part for part, prefixes in _PARTS.items() if not any(name.startswith(prefixes) for name in tensors)]
    if missing:
        raise CheckpointError(
            f"{file} holds no {' and no '.join(missing)}, so it is not a whole checkpoint in the original layout. Give a LoRA by "
            "--lora beside its checkpoint; and for weights in diffusers' format the folder with the model_index.json."
        )


def _predictions(
    file: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], architecture: str
) -> dict[str, str]:
    """What the UNet predicts, by where the file says so."""
    predicted = {"the tensor v_pred": "v_prediction"} if "v_pred" in tensors else {}
    for key in _PREDICTION_KEYS:
        if key in metadata:
            value = metadata[key].lower()
            if value not in _PREDICTION_TYPES:
                raise CheckpointError(
                    f"{file} has {key}={metadata[key]!r} in its header, which is not supported. Supported: "
                    f"{', '.join(_PREDICTION_TYPES)}."
                )
            predicted[f"{key} in its header"] = _PREDICTION_TYPES[value]
    for ending, kind in (("-v2-512", "epsilon"), ("-v2-768-v", "v_prediction")):
        if architecture.endswith(ending):
            predicted["modelspec.architecture in its header"] = kind
    return predicted


def _numbers(file: Path, metadata: Mapping[str, str], key: str, pattern: str, example: str) -> Any:
    """The numbers in an entry of the header, or None if there is no such entry. A second that is left out is the first."""
    if key not in metadata:
        return None
    if match := re.fullmatch(pattern, metadata[key]):
        return tuple(int(number or match[1]) for number in match.groups())
    raise CheckpointError(
        f"{file} has {key}={metadata[key]!r} in its header, which cannot be read; it should be such as {example}. Save the "
        "file again with a header that is right, or without that entry."
    )


def settings_by_file(file: Path, said: Said, configs: Mapping[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What is to be changed in the configs.

    Args:
        file: the checkpoint.
        said: what it says.
        configs: of its components, taken from elsewhere.
        folder: where from.

    Returns:
        By component and setting: `scheduler.prediction_type`, `scheduler.rescale_betas_zero_snr`, `unet.sample_size`; only
        what differs from the configs.

    Raises:
        CheckpointError: the file contradicts the configs, or cannot be drawn with.
    """
    scheduler, unet = configs["scheduler"], configs["unet"]
    before = scheduler.get("prediction_type", "epsilon")
    settings: dict[str, Any] = {}
    if said.prediction_type == "v_prediction":  # nobody writes that without meaning it, as many tools write epsilon
        settings["scheduler.prediction_type"] = said.prediction_type
    elif said.prediction_type not in (None, before):
        raise CheckpointError(
            f"{file} says that it predicts {said.prediction_type} ({said.by}), and the scheduler of {folder} is for "
            f"{before}. Name configs whose scheduler is for {said.prediction_type} by --config; or if the file is wrong, "
            "remove that from it."
        )
    if said.zero_snr:
        if settings.get("scheduler.prediction_type", before) == "epsilon":
            raise CheckpointError(
                f"{file} has the tensor ztsnr, so its last timestep is noise alone, of which nothing can be said by epsilon; "
                f"and the scheduler of {folder} is for epsilon. Name configs whose scheduler is for v_prediction by --config."
            )
        settings["scheduler.rescale_betas_zero_snr"] = True
    try:
        last = scheduler.get("num_train_timesteps", 1000) - 1
        factor, multiple = (2 ** (len(config["block_out_channels"]) - 1) for config in (configs["vae"], unet))
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: a config lacks a setting, or has one of the wrong type: {error!r}. Save the checkpoint again with a "
            "current diffusers."
        ) from error
    first, end = said.timesteps or (0, last)
    if first > 0 or end < last:
        raise CheckpointError(
            f"{file} was trained for timesteps {first} to {end} only (modelspec.timestep_range in its header), and an image "
            f"takes 0 to {last}. Take a checkpoint that was trained for all."
        )
    if said.size_px:
        if max(said.size_px) > _MOST_PX:
            raise CheckpointError(
                f"{file} says that it draws {said.size_px[0]} x {said.size_px[1]} px best (modelspec.resolution in its header); at "
                f"most {_MOST_PX} a side are believed. Save the file again with a header that is right, or without that entry."
            )
        width, height = (max(1, round(side / factor / multiple)) * multiple for side in said.size_px)
        settings["unet.sample_size"] = [height, width]
    return {name: value for name, value in settings.items() if _setting(configs, name) != value}


def _setting(configs: Mapping[str, dict[str, Any]], name: str) -> Any:
    part, _, key = name.partition(".")
    value = configs[part].get(key)
    return [value, value] if key == "sample_size" and isinstance(value, int) else value


def clip_skip_by_file(said: Said, *, two_encoders: bool) -> int:
    """Layers to leave out of the text encoders, in diffusers' meaning. Stable Diffusion XL takes the layer before the last
    by itself, and a model of its kind that was trained with the last there is not."""
    return max(0, (said.encoder_layer or 1) - (2 if two_encoders else 1))


def config_of_single_file(file: Path, tensors: Mapping[str, TensorInfo], said: Said) -> str:
    """The id on the Hugging Face hub of the checkpoint whose configs diffusers takes for such a file.

    It follows from which tensors there are. What follows from none of them is not known: whether a Stable Diffusion 2.x
    model predicts v or epsilon, for one, so unless the file says it, the configs decide.

    Raises:
        CheckpointError: it is of a kind that is not supported.
    """
    with quiet():
        from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type

    try:
        kind = infer_diffusers_model_type(tensors)  # which looks at names and shapes
    except Exception:  # it fails in many ways for files of which it knows half
        kind = "unknown"
    # v1 is also what diffusers calls that which it does not know.
    if kind not in ("v1", "v2", "xl_base") or "model.diffusion_model.input_blocks.0.0.weight" not in tensors:
        raise CheckpointError(
            f"{file} is not a Stable Diffusion 1.x, 2.x or XL model in the original layout (diffusers takes it for "
            f"{kind}). A LoRA, a VAE or a UNet alone is not a checkpoint: give a LoRA by --lora beside its checkpoint."
        )
    if kind == "v2" and said.prediction_type == "epsilon":
        return "stabilityai/stable-diffusion-2-1-base"
    return str(DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"])
