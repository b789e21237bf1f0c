"""A checkpoint's safety checker: what its configs say, and which of them cannot be exported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from diffuserve.bundle.manifest import ImageProcessor
from diffuserve.errors import CheckpointError

# What transformers' CLIPImageProcessor takes for what its config leaves out, as early ones do.
_DEFAULTS: Mapping[str, Any] = {
    "size": 224,
    "crop_size": 224,
    "resample": Image.Resampling.BICUBIC,
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
# What CLIP's vision model takes for an image_size that its config leaves out.
_IMAGE_SIZE = 224


def image_processor_from_configs(name: str, configs: Mapping[str, dict[str, Any]]) -> ImageProcessor:
    """How images are prepared for the safety checker.

    Args:
        name: the model's.
        configs: those of safety_checker and feature_extractor, the latter's preprocessor_config.json.

    Raises:
        CheckpointError: a config asks for something that is not supported, or the two do not fit together.
    """
    config = {**_DEFAULTS, **configs["feature_extractor"]}
    for step in _STEPS:
        if config.get(step, True) is not True:
            raise _error(name, f"has {step}={config[step]!r}; supported: true")
    try:
        mean, deviation = ((float(r), float(g), float(b)) for r, g, b in (config["image_mean"], config["image_std"]))
        processor = ImageProcessor(
            shortest_edge_px=_side(config["size"], "shortest_edge"),
            crop_px=_side(config["crop_size"], "height", "width"),
            resample=Image.Resampling(config["resample"]).value,
            rescale_factor=float(config["rescale_factor"]),
            mean=mean,
            std=deviation,
        )
        image_size = int(configs["safety_checker"].get("vision_config", {}).get("image_size", _IMAGE_SIZE))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _error(
            name,
            f"cannot be read: {error!r}. It must resize the shortest_edge, crop a square, and give image_mean and "
            "image_std for three colours",
        ) from error
    if not 0 < processor.crop_px <= processor.shortest_edge_px or 0 in processor.std:
        raise _error(name, f"cannot prepare an image: {processor}. What is cropped must be part of what is resized")
    if processor.crop_px != image_size:
        raise _error(
            name, f"makes images of {processor.crop_px} px, and the safety checker takes {image_size} px (image_size)"
        )
    return processor


def _side(size: Any, *keys: str) -> int:
    """A length in pixels, which early configs write as a number alone; the values of all `keys` must be one."""
    (side,) = {int(size[key]) for key in keys} if isinstance(size, dict) else {int(size)}
    if isinstance(size, dict) and (others := {key for key in size if key not in keys and size[key] is not None}):
        raise ValueError(f"unknown: {', '.join(sorted(others))}")
    return side


def _error(name: str, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: feature_extractor/preprocessor_config.json {problem}. Save the safety checker and its feature extractor "
        "again from where they came, or leave both out: --no-safety-checker"
    )
