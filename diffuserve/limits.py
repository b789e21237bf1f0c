"""What one server accepts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from diffuserve.bundle.manifest import ModelSpec
from diffuserve.errors import ConfigurationError
from diffuserve.options import check, from_parameters, option
from diffuserve.tensors import SAFETY_CHECKER, TEXT_ENCODER, UNET, VAE_DECODER, VAE_ENCODER

# Images of one call of the VAE decoder: activations at full image size are the largest of all stages.
MAX_DECODE_BATCH = 8
# The limits that decide what a TensorRT plan is built for.
PLAN_LIMITS = ("max_rows", "max_side_px", "max_prompt_chunks")


@dataclass(frozen=True)
class Limits:
    """What one server accepts. `for_model` gives a model's defaults.

    Raises:
        ConfigurationError: a limit is out of its range.
    """

    max_steps: int = option(150, "Steps of a request.", least=1, most=10_000)
    max_side_px: int = option(
        1024,
        "Width and height of an image, pixels.",
        least=8,
        most=16_384,
        default_words="twice the longer of the model's own",
    )
    max_guidance_scale: float = option(50.0, "Guidance scale of a request.", least=1, most=1000)
    max_images: int = option(16, "Images of a request.", least=1, most=256)
    max_prompt_bytes: int = option(8192, "Bytes of a prompt, and of a negative one.", least=1, most=2**20)
    max_prompt_chunks: int = option(
        3,
        "Chunks of a tokenizer's length that a prompt may fill; the rest of a longer one is not used. 1 means no chunking.",
        least=1,
        most=64,
    )
    max_rows: int = option(32, "Rows of one UNet call; an image with guidance takes two.", least=1, most=1024)
    max_active_images: int = option(
        128, "Images being denoised, running or paused; a paused one costs its latents only.", least=1, most=65_536
    )
    max_waiting_requests: int = option(
        256, "Requests accepted whose first step is not done; more are refused at once.", least=1, most=65_536
    )
    max_waiting_rows: int = option(
        2048, "UNet rows per step that those requests will take; more are refused at once.", least=1, most=2**20
    )

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def for_model(cls, model: ModelSpec) -> Limits:
        """The defaults: images of up to twice the native side."""
        return cls(max_side_px=2 * max(model.width, model.height))

    @classmethod
    def from_parameters(cls, model: ModelSpec, parameters: Mapping[str, str]) -> Limits:
        """The defaults, overridden by those of `parameters` that carry a limit's name.

        Raises:
            ConfigurationError: a value is not a number of the limit's type, or out of range.
        """
        limits = from_parameters(cls.for_model(model), parameters)
        if limits.max_side_px < model.size_multiple:
            raise ConfigurationError(
                f"max_side_px is {limits.max_side_px}; the smallest image of {model.name} has {model.size_multiple} px."
            )
        return limits


def max_batch_sizes(limits: Limits) -> dict[str, int]:
    """Rows of one call of each stage, at most."""
    return {
        # All chunks of a prompt are one call.
        TEXT_ENCODER: max(limits.max_rows, limits.max_prompt_chunks),
        UNET: limits.max_rows,
        VAE_DECODER: MAX_DECODE_BATCH,
        VAE_ENCODER: MAX_DECODE_BATCH,
        SAFETY_CHECKER: MAX_DECODE_BATCH,
    }
