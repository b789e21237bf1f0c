"""What one server accepts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from diffuserve.bundle.manifest import ModelSpec
from diffuserve.errors import InvalidRequest

# Images of one call of the VAE decoder: activations at full image size are the largest of all stages.
MAX_DECODE_BATCH = 8


@dataclass(frozen=True)
class Limits:
    """What one server accepts. `for_model` gives the defaults; the model's parameters in Triton override them."""

    max_steps: int = 150
    max_side_px: int = 1024
    max_guidance_scale: float = 50.0
    max_images: int = 16
    max_prompt_bytes: int = 8192
    max_prompt_chunks: int = 3
    """Chunks of a tokenizer's length that a prompt may fill; the rest of a longer one is not used. They are one call of
    the text encoder, so at most its `max_batch_size`; 1 means no chunking."""
    max_rows: int = 32
    """Rows of one UNet call; an image with guidance takes two."""
    max_active_images: int = 128
    """Images being denoised, running or paused; a paused one costs its latents only."""
    max_waiting_requests: int = 256
    """Requests accepted whose first step is not done; more are refused at once."""
    max_waiting_rows: int = 2048
    """UNet rows a step that those requests will take; more are refused at once."""

    @classmethod
    def for_model(cls, model: ModelSpec) -> Limits:
        """The defaults: images of up to twice the native side."""
        return cls(max_side_px=2 * max(model.width, model.height))

    @classmethod
    def from_parameters(cls, model: ModelSpec, parameters: Mapping[str, str]) -> Limits:
        """The defaults, overridden by those of `parameters` that carry a limit's name.

        Raises:
            InvalidRequest: a value is not a positive number.
        """
        overrides: dict[str, Any] = {}
        for field in fields(cls):
            if field.name not in parameters:
                continue
            text = parameters[field.name]
            number_type = float if field.type == "float" else int
            try:
                number = number_type(text)
            except ValueError:
                raise InvalidRequest(f"The limit {field.name} is {text!r}; it must be a positive number.") from None
            if not 0 < number < math.inf:  # also refuses NaN
                raise InvalidRequest(f"The limit {field.name} is {text!r}; it must be a positive number.")
            overrides[field.name] = number
        return cls(**{**_as_dict(cls.for_model(model)), **overrides})


def _as_dict(limits: Limits) -> dict[str, Any]:
    return {field.name: getattr(limits, field.name) for field in fields(limits)}
