"""What a checkpoint's configs say about the model, and which of them cannot be exported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from diffuserve.bundle import ModelSpec
from diffuserve.errors import BundleError, CheckpointError
from diffuserve.noise_schedule import NoiseSchedule
from diffuserve.samplers import SAMPLERS, sampler_from_config

FAMILY = "stable-diffusion"

# Settings that give the UNet or the text encoder inputs or behaviour beyond Stable Diffusion 1.x and 2.x, with the
# value that means "off".
_UNSUPPORTED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "unet": {
        "addition_embed_type": (None,),
        "attention_type": ("default", None),
        "class_embed_type": (None,),
        "encoder_hid_dim_type": (None,),
        "num_class_embeds": (None,),
        "time_cond_proj_dim": (None,),
    },
    "text_encoder": {"use_attention_mask": (None, False)},
    "vae": {"latents_mean": (None,), "latents_std": (None,)},
}


class Defaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a request gets that names no value of its own: diffuserve.json, if the checkpoint has one.

    `sampler`: empty for the one that the checkpoint's own scheduler is.
    """

    steps: int = 20
    guidance_scale: float = 7.5
    sampler: str = ""


def model_spec_from_configs(name: str, configs: Mapping[str, dict[str, Any]], defaults: Defaults) -> ModelSpec:
    """Args:
        name: the model's.
        configs: the JSON configs of unet, vae, text_encoder, tokenizer and scheduler.
        defaults: of requests.

    Raises:
        CheckpointError: a config asks for something that is not supported, or the components do not fit together.
    """
    for part, settings in _UNSUPPORTED.items():
        for key, allowed in settings.items():
            value = configs[part].get(key)
            if value is not None and value not in allowed:
                raise CheckpointError(
                    f"{name}: {part}/config.json has {key}={value!r}, which is not supported; "
                    f"supported: {' or '.join(map(repr, allowed))}. Only Stable Diffusion 1.x and 2.x models are."
                )
    _check_scheduler(name, configs["scheduler"])
    if not defaults.sampler:
        defaults = msgspec.structs.replace(defaults, sampler=sampler_from_config(configs["scheduler"]))
    if defaults.sampler not in SAMPLERS:
        raise CheckpointError(
            f"{name}: diffuserve.json names the sampler {defaults.sampler!r}. Supported: {', '.join(SAMPLERS)}."
        )
    try:
        spec = _spec(name, configs, defaults)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{name}: a config lacks a setting, or has one of the wrong type: {error!r}. Save the checkpoint again with "
            "a current diffusers."
        ) from error
    _check_fit(name, spec, configs)
    return spec


def _spec(name: str, configs: Mapping[str, dict[str, Any]], defaults: Defaults) -> ModelSpec:
    unet, vae, text_encoder = configs["unet"], configs["vae"], configs["text_encoder"]
    vae_scale_factor = 2 ** (len(vae["block_out_channels"]) - 1)
    latent_height, latent_width = _pair(unet["sample_size"])
    return ModelSpec(
        name=name,
        family=FAMILY,
        latent_channels=int(vae.get("latent_channels", 4)),
        hidden_size=int(text_encoder["hidden_size"]),
        # A tokenizer without a limit of its own says 1e30.
        max_tokens=int(
            min(configs["tokenizer"].get("model_max_length", 1e30), text_encoder["max_position_embeddings"])
        ),
        vae_scale_factor=vae_scale_factor,
        size_multiple=vae_scale_factor * 2 ** (len(unet["block_out_channels"]) - 1),
        width=latent_width * vae_scale_factor,
        height=latent_height * vae_scale_factor,
        default_steps=defaults.steps,
        default_guidance_scale=defaults.guidance_scale,
        default_sampler=defaults.sampler,
    )


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, list) else (size, size)
    return int(height), int(width)


def _check_scheduler(name: str, config: dict[str, Any]) -> None:
    if config.get("trained_betas") is None and not {"beta_start", "beta_end", "beta_schedule"} <= config.keys():
        raise CheckpointError(
            f"{name}: the scheduler {config.get('_class_name')} has no beta schedule, so it is not one of Stable "
            "Diffusion's. Save the checkpoint with a scheduler such as DDIMScheduler."
        )
    try:
        NoiseSchedule.from_config(config)
    except BundleError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _check_fit(name: str, spec: ModelSpec, configs: Mapping[str, dict[str, Any]]) -> None:
    unet = configs["unet"]
    expected = {
        "in_channels": (
            spec.latent_channels,
            "the VAE's latent_channels; inpainting and other UNets with more do not fit",
        ),
        "out_channels": (spec.latent_channels, "the VAE's latent_channels"),
        "cross_attention_dim": (spec.hidden_size, "the text encoder's hidden_size"),
    }
    for key, (value, meaning) in expected.items():
        if unet.get(key) != value:
            raise CheckpointError(
                f"{name}: unet/config.json has {key}={unet.get(key)!r}; it must be {value}, {meaning}."
            )
    for key in ("width", "height"):
        if getattr(spec, key) % spec.size_multiple:
            raise CheckpointError(
                f"{name}: unet/config.json has sample_size={unet['sample_size']}; times the VAE's factor "
                f"{spec.vae_scale_factor} it must be a multiple of {spec.size_multiple} pixels."
            )
