"""What a checkpoint's model_index.json says it is made of, and which of that is supported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffuserve.errors import CheckpointError

_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_ONE_TEXT_ENCODER: Mapping[str, tuple[str, ...]] = {
    "scheduler": (),  # any: only its settings are read, and those are checked
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": _TOKENIZERS,
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
}
TWO_TEXT_ENCODERS = {
    **_ONE_TEXT_ENCODER,
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer_2": _TOKENIZERS,
}
# Pipeline: its components, and the classes that each may have, as model_index.json names them.
PIPELINES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "StableDiffusionPipeline": _ONE_TEXT_ENCODER,
    "LatentConsistencyModelPipeline": _ONE_TEXT_ENCODER,
    "StableDiffusionXLPipeline": TWO_TEXT_ENCODERS,
}
# What a checkpoint may have besides; the second belongs to the first, and is ignored without it.
SAFETY_PARTS: Mapping[str, tuple[str, ...]] = {
    "safety_checker": ("StableDiffusionSafetyChecker",),
    "feature_extractor": (
        "CLIPImageProcessor",
        "CLIPImageProcessorFast",
        "CLIPImageProcessorPil",
        "CLIPFeatureExtractor",
    ),
}
# As model_index.json calls the modules of the classes; the last is where diffusers keeps its safety checker.
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")


def pipeline_of(folder: Path, index: Mapping[str, Any]) -> str:
    """The pipeline's class, a key of `PIPELINES`; raises CheckpointError for any other."""
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise CheckpointError(
            f"{folder} is a {pipeline}, which is not supported. Supported: {', '.join(PIPELINES)} "
            "(Stable Diffusion 1.x, 2.x and XL, their Turbo versions, and latent consistency models)."
        )
    return pipeline


def names_part(index: Mapping[str, Any], part: str) -> bool:
    """Whether model_index.json names a component; what a pipeline can do without may be named [null, null]."""
    return bool(index.get(part)) and index[part] != [None, None]


def check_components(folder: Path, index: Mapping[str, Any], parts: Mapping[str, tuple[str, ...]]) -> None:
    """Compares what model_index.json names with what is to be exported.

    Args:
        folder: the checkpoint's.
        index: its model_index.json.
        parts: components, and the classes that each may have; none listed means any of diffusers'.

    Raises:
        CheckpointError: a component is missing, unknown, or of another class.
    """
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list) or not names_part(index, part):
            continue
        if part in SAFETY_PARTS and part not in parts:
            continue
        if part not in parts:
            raise CheckpointError(
                f"{folder} has the component {part} ({entry[-1]}), which is not supported. "
                f"Supported: {', '.join(parts)}."
            )
        classes = parts[part]
        if len(entry) != 2 or entry[0] not in _LIBRARIES or (classes and entry[1] not in classes):
            raise CheckpointError(
                f"{folder}: the {part} is of the class {'.'.join(map(str, entry))}. Supported: "
                f"{', '.join(classes) or 'the schedulers of diffusers'}; a checkpoint's own code is never run."
            )
    for part in parts:
        if not names_part(index, part) or not (folder / part).is_dir():
            leave_out = " Or leave the safety checker out: --no-safety-checker." if part in SAFETY_PARTS else ""
            raise CheckpointError(
                f"{folder} lacks the component {part}: it must be named in model_index.json and have a folder of that "
                f"name. Needed: {', '.join(parts)}. Download or save the checkpoint again.{leave_out}"
            )
