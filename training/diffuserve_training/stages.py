"""The two stages in which the bundled model is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from diffuserve_training.config import ConfigError, Optimisation, Training, Vae
from diffuserve_training.dataset import Icons, Latents, image_batch
from diffuserve_training.identity import begin_run, without_steps

VAE_FOLDER = "vae"
CHECKPOINT_FOLDER = "checkpoint"
_GRID_STEPS, _GRID_COLUMNS = 25, 8
_SCALE_IMAGES = 256


def train_vae(config: Training, icons: Icons, output: Path, devices: str = "auto") -> None:
    """Stage one, to `output`/vae (the model), vae-run/ (checkpoints, logs) and vae.png (originals above reconstructions).

    Raises:
        ConfigError: vae-run/ is another training's.
    """
    from diffuserve_training.checkpoints import save_vae
    from diffuserve_training.latents import scaling_factor_of
    from diffuserve_training.run import fit, seeded
    from diffuserve_training.vae_module import VaeModule

    run = begin_run(output / "vae-run", _leg(config.vae, config.vae.optimisation), icons.drawn.tobytes())
    seeded(config.vae.optimisation)
    module = VaeModule.from_config(config.vae, icons)

    def save() -> None:
        vae: Any = module.average.module
        images = _some_images(icons)
        save_vae(vae, scaling_factor_of(vae, images), images, output / VAE_FOLDER)
        _reconstructions(vae, images).save(output / "vae.png")

    fit(module, run, on_save=save, devices=devices)


def train_decoder(
    config: Training, icons: Icons, output: Path, *, start: Path | None = None, devices: str = "auto"
) -> None:
    """Stage one's second leg, on `output`/vae, which it replaces, and in `output`/checkpoint if that is there; decoder-run/
    and vae.png.

    Args:
        start: a checkpoint whose autoencoder is taken if there is none in `output`.

    Raises:
        ConfigError: the configuration has none, stage one has left nothing in `output`, or decoder-run/ is another training's.
    """
    from diffuserve_training.checkpoints import replace_vae, save_vae
    from diffuserve_training.latents import latents_digest
    from diffuserve_training.run import fit, seeded
    from diffuserve_training.vae_module import VaeModule

    optimisation = config.vae.decoder
    if optimisation is None:
        raise ConfigError("The configuration says nothing of vae.decoder: steps, batch_size, learning_rate.")
    trained = _stage_one(output, start)
    run = begin_run(output / "decoder-run", _leg(config.vae, optimisation), latents_digest(trained, icons))
    seeded(optimisation)
    module = VaeModule.of_decoder(config.vae, icons, optimisation, trained)

    def save() -> None:
        vae: Any = module.average.module
        images = _some_images(icons)
        saved = save_vae(vae, vae.config.scaling_factor, images, output / VAE_FOLDER)
        if (checkpoint := output / CHECKPOINT_FOLDER).is_dir():
            replace_vae(checkpoint, saved)
        _reconstructions(vae, images).save(output / "vae.png")

    fit(module, run, on_save=save, devices=devices)


def _leg(config: Vae, optimisation: Optimisation) -> Vae:
    """What the configuration says of one leg of stage one, save `steps`."""
    return msgspec.structs.replace(config, optimisation=without_steps(optimisation), decoder=None)


def _stage_one(output: Path, start: Path | None) -> Any:
    """The autoencoder in `output`, or else that of `start`; raises `ConfigError` if there is none."""
    import torch
    from diffusers import AutoencoderKL

    folder = output / VAE_FOLDER
    if not folder.is_dir() and start is not None:
        folder = start / VAE_FOLDER
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not there. Train it first: diffuserve train vae --output {output}")
    vae: Any = AutoencoderKL.from_pretrained(folder, dtype=torch.float32)
    return vae


def train_ldm(
    config: Training, icons: Icons, output: Path, cache: Path, *, start: Path | None = None, devices: str = "auto"
) -> None:
    """Stage two, on `output`/vae: to `output`/checkpoint (a whole diffusers checkpoint), ldm-run/ and ldm.png.

    Args:
        start: a checkpoint of this configuration to go on from, instead of random weights: its text encoder, UNet and
            tokenizer, and its autoencoder if there is none in `output`. A run in `output` goes on from where it was.

    Raises:
        ConfigError: stage one has left nothing in `output`, or ldm-run/ is another training's.
    """
    from diffuserve_training.checkpoints import save_pipeline
    from diffuserve_training.latents import encode_all, latents_digest
    from diffuserve_training.ldm_module import Denoiser, LdmModule
    from diffuserve_training.run import fit, seeded
    from diffuserve_training.sampling import draw, grid, load_pipeline
    from diffuserve_training.tokenizer import sample_captions, tokenizer_from_captions

    vae = _stage_one(output, start).eval()
    run = begin_run(
        output / "ldm-run",
        msgspec.structs.replace(config.ldm, optimisation=without_steps(config.ldm.optimisation)),
        config.data.held_out,
        [(icon.name, icon.style, icon.tags) for icon in icons.icons],
        latents_digest(vae, icons),
    )
    latents = Latents(icons.icons, encode_all(vae, icons, cache), config.data.held_out)
    seeded(config.ldm.optimisation)
    if start is None:
        tokenizer = tokenizer_from_captions(
            sample_captions(icons.icons, config.ldm.optimisation.seed),
            vocabulary=config.ldm.vocabulary,
            tokens=config.ldm.tokens,
        )
        denoiser = Denoiser.from_config(config.ldm, tokenizer)
    else:
        pipeline = load_pipeline(start)
        tokenizer, denoiser = pipeline.tokenizer, Denoiser(pipeline.text_encoder.train(), pipeline.unet.train())
    module = LdmModule(config.ldm, latents, tokenizer, denoiser)
    prompts = _prompts(icons)

    def save() -> None:
        denoiser: Any = module.average.module
        save_pipeline(
            vae=vae,
            text_encoder=denoiser.text_encoder,
            unet=denoiser.unet,
            tokenizer=tokenizer,
            scheduler=module.scheduler,
            defaults=config.ldm.defaults,
            folder=output / CHECKPOINT_FOLDER,
        )
        pipeline = load_pipeline(output / CHECKPOINT_FOLDER)
        scale = float(config.ldm.defaults["guidance_scale"])
        images = draw(pipeline, prompts, range(len(prompts)), steps=_GRID_STEPS, guidance_scale=scale)
        grid(images, _GRID_COLUMNS).save(output / "ldm.png")

    fit(module, run, on_save=save, devices=devices)


def _prompts(icons: Icons) -> list[str]:
    """Two dozen and more, the same at every grid: every n-th icon on its own background."""
    from diffuserve_training.backgrounds import NAMES
    from diffuserve_training.captions import plain_caption

    count = min(4 * _GRID_COLUMNS, len(icons.icons))
    chosen = [icons.icons[index * len(icons.icons) // count] for index in range(count)]
    return [plain_caption(icon.name, icon.style, NAMES[index % len(NAMES)]) for index, icon in enumerate(chosen)]


def _some_images(icons: Icons) -> Any:
    """(256, 3, H, W) float32 in -1 .. 1, the same at every checkpoint of both legs."""
    return image_batch(icons, seed=(0, 0, 0), batch_size=_SCALE_IMAGES)


def _reconstructions(vae: Any, images: Any) -> Any:
    """A PIL image: the first originals, and below them what the autoencoder makes of them."""
    import numpy as np
    import torch

    from diffuserve_training.sampling import grid

    images = images[:_GRID_COLUMNS]
    with torch.inference_mode():
        drawn = vae.decode(vae.encode(torch.from_numpy(images)).latent_dist.mean).sample.clamp(-1, 1).numpy()
    both = np.concatenate([images, drawn])
    pixels = ((both.transpose(0, 2, 3, 1) + 1) * 127.5).round().astype(np.uint8)
    return grid(pixels, len(images))
