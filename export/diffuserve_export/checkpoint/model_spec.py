"""What a checkpoint's configs say about the model, and which of them cannot be exported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from diffuserve.bundle.manifest import ImageProcessor, ModelSpec
from diffuserve.errors import BundleError, CheckpointError
from diffuserve.limits import Limits
from diffuserve.samplers import SAMPLERS, sampler_from_config
from diffuserve.samplers.noise_schedule import NoiseSchedule
from diffuserve.samplers.scheduler_settings import check_known
from diffuserve.tensors import VAE_DECODER, VAE_ENCODER, StageSpec, stage_specs

# The families, by whether there is a second text encoder.
FAMILIES = {False: "stable-diffusion", True: "stable-diffusion-xl"}

# Settings that give a component inputs or behaviour beyond Stable Diffusion's, with the value that means "off".
_UNSUPPORTED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "unet": {
        "attention_type": ("default", None),
        "class_embed_type": (None,),
        "encoder_hid_dim_type": (None,),
        "num_class_embeds": (None,),
    },
    "text_encoder": {"use_attention_mask": (None, False)},
    # StableDiffusionPipeline itself turns it off; the other pipelines would clip latents, which no sampler here does.
    "scheduler": {"clip_sample": (None, False)},
    "vae": {"latents_mean": (None,), "latents_std": (None,)},
}


class Defaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a request gets that names no value of its own: diffuserve.json, if the checkpoint has one.

    `sampler`: empty for the one that the checkpoint's own scheduler is.
    """

    steps: int = 20
    guidance_scale: float = 7.5
    sampler: str = ""


def model_spec_from_configs(
    name: str,
    configs: Mapping[str, dict[str, Any]],
    defaults: Defaults,
    *,
    clip_skip: int = 0,
    zero_empty_negative: bool = False,
) -> ModelSpec:
    """Args:
        name: the model's.
        configs: the JSON configs of unet, vae, text_encoder, tokenizer and scheduler, for Stable Diffusion XL also
            those of text_encoder_2 and tokenizer_2.
        defaults: of requests.
        clip_skip, zero_empty_negative: see `ModelSpec`.

    Raises:
        CheckpointError: a config asks for something that is not supported, or the components do not fit together.
    """
    for part, settings in _UNSUPPORTED.items():
        for key, allowed in settings.items():
            _check_setting(name, configs, part, key, allowed)
    # "text" is computed by the UNet from the hidden states that it has anyway.
    added = ("text_time",) if _is_xl(configs) else (None, "text")
    _check_setting(name, configs, "unet", "addition_embed_type", added)
    _check_scheduler(name, configs["scheduler"])
    if not defaults.sampler:
        defaults = msgspec.structs.replace(defaults, sampler=sampler_from_config(configs["scheduler"]))
    if defaults.sampler not in SAMPLERS:
        raise CheckpointError(
            f"{name}: the default sampler (--sampler or diffuserve.json) is {defaults.sampler!r}. Supported: "
            f"{', '.join(SAMPLERS)}."
        )
    limits = Limits()
    for title, value, least, most in (
        ("--steps", defaults.steps, 1, limits.max_steps),
        ("--guidance-scale", defaults.guidance_scale, 0, limits.max_guidance_scale),
    ):
        if not least <= value <= most:
            raise CheckpointError(
                f"{name}: {title} (or in diffuserve.json) is {value}; it must be from {least} to {most:g}."
            )
    try:
        spec = _spec(name, configs, defaults, clip_skip, zero_empty_negative)
        _check_fit(name, spec, configs)
        _check_clip_skip(name, clip_skip, configs)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{name}: a config lacks a setting, or has one of the wrong type: {error!r}. Save the checkpoint again with "
            "a current diffusers."
        ) from error
    return spec


def stage_specs_from_configs(
    spec: ModelSpec, configs: Mapping[str, dict[str, Any]], image_processor: ImageProcessor | None
) -> dict[str, StageSpec]:
    """The tensors of each stage: what the UNet is conditioned on depends on the family, and `image_processor` is the
    safety checker's."""
    return stage_specs(
        max_tokens=spec.max_tokens,
        hidden_size=spec.hidden_size,
        latent_channels=spec.latent_channels,
        pooled_size=int(configs["text_encoder_2"]["projection_dim"]) if _is_xl(configs) else 0,
        guidance_size=int(configs["unet"].get("time_cond_proj_dim") or 0),
        checked_px=image_processor.crop_px if image_processor else 0,
    )


def stages_that_overflow_in_fp16(configs: Mapping[str, dict[str, Any]]) -> frozenset[str]:
    """The VAE's, where diffusers would compute it in fp32 amid fp16: unless its config says otherwise, Stable Diffusion
    XL's. (Others' configs say `force_upcast` too, since it is the default, and their pipelines do not look at it.)"""
    overflows = _is_xl(configs) and configs["vae"].get("force_upcast", True)
    return frozenset((VAE_DECODER, VAE_ENCODER) if overflows else ())


def _is_xl(configs: Mapping[str, dict[str, Any]]) -> bool:
    return "text_encoder_2" in configs


def _of_both(configs: Mapping[str, dict[str, Any]], part: str, key: str) -> list[int]:
    """A setting of the text encoder or tokenizer, and of the second one where there is one."""
    return [int(configs[name][key]) for name in (part, f"{part}_2") if name in configs]


def _spec(
    name: str,
    configs: Mapping[str, dict[str, Any]],
    defaults: Defaults,
    clip_skip: int,
    zero_empty_negative: bool,
) -> ModelSpec:
    unet, vae = configs["unet"], configs["vae"]
    vae_scale_factor = 2 ** (len(vae["block_out_channels"]) - 1)
    latent_height, latent_width = _pair(unet["sample_size"])
    tokenizers = [configs[part] for part in ("tokenizer", "tokenizer_2") if part in configs]
    return ModelSpec(
        name=name,
        family=FAMILIES[_is_xl(configs)],
        latent_channels=int(vae.get("latent_channels", 4)),
        hidden_size=sum(_of_both(configs, "text_encoder", "hidden_size")),
        # A tokenizer without a limit of its own says 1e30.
        max_tokens=min(
            *(int(config.get("model_max_length", 1e30)) for config in tokenizers),
            *_of_both(configs, "text_encoder", "max_position_embeddings"),
        ),
        vae_scale_factor=vae_scale_factor,
        size_multiple=vae_scale_factor * 2 ** (len(unet["block_out_channels"]) - 1),
        width=latent_width * vae_scale_factor,
        height=latent_height * vae_scale_factor,
        default_steps=defaults.steps,
        default_guidance_scale=defaults.guidance_scale,
        default_sampler=defaults.sampler,
        zero_empty_negative=zero_empty_negative,
        guidance_embedded=bool(unet.get("time_cond_proj_dim")),
        clip_skip=clip_skip,
    )


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, list) else (size, size)
    return int(height), int(width)


def _check_setting(
    name: str, configs: Mapping[str, dict[str, Any]], part: str, key: str, allowed: tuple[Any, ...]
) -> None:
    value = configs[part].get(key)
    if value not in allowed and not (value is None and None in allowed):
        raise CheckpointError(
            f"{name}: the config of the {part} has {key}={value!r}, which is not supported; "
            f"supported: {' or '.join(map(repr, allowed))}. Only Stable Diffusion 1.x, 2.x and XL models are."
        )


def _check_scheduler(name: str, config: dict[str, Any]) -> None:
    if config.get("trained_betas") is None and not {"beta_start", "beta_end", "beta_schedule"} <= config.keys():
        raise CheckpointError(
            f"{name}: the scheduler {config.get('_class_name')} has no beta schedule, so it is not one of Stable "
            "Diffusion's. Save the checkpoint with a scheduler such as DDIMScheduler."
        )
    try:
        NoiseSchedule.from_config(config)
        check_known(config, NoiseSchedule.__dataclass_fields__)
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
        "cross_attention_dim": (spec.hidden_size, "the text encoder's hidden_size, or the sum of both encoders'"),
    }
    if _is_xl(configs):
        pooled_size, time_size = configs["text_encoder_2"]["projection_dim"], unet["addition_time_embed_dim"]
        expected["projection_class_embeddings_input_dim"] = (
            pooled_size + 6 * time_size,
            "text_encoder_2's projection_dim and 6 times addition_time_embed_dim",
        )
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


def _check_clip_skip(name: str, clip_skip: int, configs: Mapping[str, dict[str, Any]]) -> None:
    # Stable Diffusion XL leaves one layer out by itself. At least one must be left.
    highest = min(_of_both(configs, "text_encoder", "num_hidden_layers")) - (2 if _is_xl(configs) else 1)
    if not 0 <= clip_skip <= max(0, highest):
        raise CheckpointError(
            f"{name}: clip_skip is {clip_skip}; with the layers of this checkpoint's text encoder it may be from 0 to "
            f"{max(0, highest)}."
        )
