"""The two stages in which the bundled model is made."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec

from diffuserve_training.config import ConfigError, Optimisation, Training, Vae
from diffuserve_training.dataset import Icons, Pictures
from diffuserve_training.identity import begin_run, without_steps

VAE_FOLDER = "vae"
CHECKPOINT_FOLDER = "checkpoint"
_GRID_STEPS, _GRID_COLUMNS = 25, 8
_SCALE_IMAGES = 96


def train_vae(
    config: Training, icons: Icons, output: Path, *, devices: str = "auto", seconds: float | None = None
) -> None:
    """Stage one, to `output`/vae (the model), vae-run/ (checkpoints, logs) and vae.png (originals above reconstructions).

    Args:
        seconds: how long, instead of so many steps.

    Raises:
        ConfigError: vae-run/ is another training's.
    """
    from diffuserve_training.latents import scaling_factor_of
    from diffuserve_training.run import fit, seeded
    from diffuserve_training.vae_module import VaeModule, new_vae

    run = begin_run(output / "vae-run", _leg(config.vae, config.vae.optimisation), config.data, _told(icons))
    seeded(config.vae.optimisation)
    pictures = Pictures(icons, config.data)
    module = VaeModule(config.vae, icons, pictures, config.vae.optimisation, new_vae(config.vae), seconds)

    def save() -> None:
        vae: Any = module.average.module
        images = some_images(icons, pictures).to(vae.device)
        _save_stage_one(vae, scaling_factor_of(vae, images), images, output)

    fit(module, run, on_save=save, devices=devices)


def train_decoder(
    config: Training,
    icons: Icons,
    output: Path,
    *,
    start: Path | None = None,
    devices: str = "auto",
    seconds: float | None = None,
) -> None:
    """Stage one's second leg, on `output`/vae, which it replaces, and in `output`/checkpoint if that is there; decoder-run/
    and vae.png.

    Args:
        start: a checkpoint whose autoencoder is taken if there is none in `output`.
        seconds: how long, instead of so many steps.

    Raises:
        ConfigError: the configuration has none, stage one has left nothing in `output`, or decoder-run/ is another training's.
    """
    from diffuserve_training.checkpoints import replace_vae
    from diffuserve_training.latents import encoder_digest
    from diffuserve_training.run import fit, seeded
    from diffuserve_training.vae_module import VaeModule, with_fixed_latents

    optimisation = config.vae.decoder
    if optimisation is None:
        raise ConfigError("The configuration says nothing of vae.decoder: steps, batch_size, learning_rate.")
    trained = _stage_one(output, start)
    run = begin_run(
        output / "decoder-run", _leg(config.vae, optimisation), config.data, _told(icons), encoder_digest(trained)
    )
    seeded(optimisation)
    pictures = Pictures(icons, config.data)
    module = VaeModule(config.vae, icons, pictures, optimisation, with_fixed_latents(trained), seconds)

    def save() -> None:
        vae: Any = module.average.module
        images = some_images(icons, pictures).to(vae.device)
        saved = _save_stage_one(vae, vae.config.scaling_factor, images, output)
        if (checkpoint := output / CHECKPOINT_FOLDER).is_dir():
            replace_vae(checkpoint, saved)

    fit(module, run, on_save=save, devices=devices)


def _save_stage_one(vae: Any, scaling_factor: float, images: Any, output: Path) -> Any:
    """To `output`/vae and vae.png, as both legs do. Returns the autoencoder as it was saved."""
    from diffuserve_training.checkpoints import save_vae

    saved = save_vae(vae, scaling_factor, images, output / VAE_FOLDER)
    _reconstructions(vae, images).save(output / "vae.png")
    return saved


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
    config: Training,
    icons: Icons,
    output: Path,
    *,
    start: Path | None = None,
    devices: str = "auto",
    seconds: float | None = None,
) -> None:
    """Stage two, on `output`/vae: to `output`/checkpoint (a whole diffusers checkpoint), ldm-run/ and ldm.png.

    Args:
        start: a checkpoint of this configuration to go on from, instead of random weights: its text encoder, UNet and
            tokenizer, and its autoencoder if there is none in `output`. A run in `output` goes on from where it was.
        seconds: how long, instead of so many steps; ldm.png is then drawn at the end alone.

    Raises:
        ConfigError: stage one has left nothing in `output`, or ldm-run/ is another training's.
    """
    from diffuserve_training.checkpoints import save_pipeline
    from diffuserve_training.latents import encoder_digest
    from diffuserve_training.ldm_module import Denoiser, LdmModule
    from diffuserve_training.run import fit, seeded
    from diffuserve_training.sampling import draw, grid, load_pipeline
    from diffuserve_training.tokenizer import sample_captions, tokenizer_from_captions

    vae = _stage_one(output, start).eval()
    run = begin_run(
        output / "ldm-run",
        msgspec.structs.replace(config.ldm, optimisation=without_steps(config.ldm.optimisation)),
        config.data,
        _told(icons),
        encoder_digest(vae),
    )
    seeded(config.ldm.optimisation)
    if start is None:
        tokenizer = tokenizer_from_captions(
            sample_captions(icons.icons, config.data.held_out, config.ldm.optimisation.seed),
            vocabulary=config.ldm.vocabulary,
            tokens=config.ldm.tokens,
        )
        denoiser = Denoiser.from_config(config.ldm, tokenizer)
    else:
        pipeline = load_pipeline(start)
        tokenizer, denoiser = pipeline.tokenizer, Denoiser(pipeline.text_encoder.train(), pipeline.unet.train())
    module = LdmModule(config.ldm, icons, Pictures(icons, config.data), vae, tokenizer, denoiser, seconds)
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
        if seconds is not None and not module.progress.is_over(module.global_step):
            return
        pipeline = load_pipeline(output / CHECKPOINT_FOLDER)
        scale = float(config.ldm.defaults["guidance_scale"])
        images = draw(pipeline, prompts, range(len(prompts)), steps=_GRID_STEPS, guidance_scale=scale)
        grid(images, _GRID_COLUMNS).save(output / "ldm.png")

    fit(module, run, on_save=save, devices=devices)


def _told(icons: Icons) -> list[Any]:
    """What of the icons a training follows from."""
    from hashlib import sha256

    named = [(icon.name, icon.style, icon.tags, icon.others) for icon in icons.icons]
    return [named, sha256(icons.drawn.tobytes()).hexdigest()]


def _prompts(icons: Icons) -> list[str]:
    """The same at every grid: every n-th icon by itself, in some place or of some size, then pairs."""
    from diffuserve_training.backgrounds import NAMES
    from diffuserve_training.captions import plain_caption
    from diffuserve_training.description import GRADIENT, KINDS, PLACES, RELATIONS, TWO, Background, Description, Thing

    count = min(6 * _GRID_COLUMNS, len(icons.icons))
    descriptions = []
    for index in range(count):
        icon = index * len(icons.icons) // count
        kind = KINDS[index // 3 % 4] if index % 3 == 0 else KINDS[0]
        colours = (NAMES[index % len(NAMES)], NAMES[(index + 5) % len(NAMES)])[: 2 if kind in (TWO, GRADIENT) else 1]
        background = Background(kind, colours)
        if index < count // 2:
            size = (None, "small", "large")[index % 3]
            place = tuple(PLACES)[index % len(PLACES)] if size != "large" and index % 2 else None
            turn = "tilted left" if index % 7 == 5 else None
            descriptions.append(Description((Thing(icon, size, turn),), None, place, background, index % 5 == 4))
        else:
            style = icons.icons[icon].style
            others = [other for other, each in enumerate(icons.icons) if each.style == style and other != icon]
            relation = (None, *RELATIONS)[index % 6]
            pair = (Thing(icon), Thing(others[index * 37 % len(others)]))
            descriptions.append(Description(pair, relation, None, background))
    return [plain_caption(each, icons.icons) for each in descriptions]


def some_images(icons: Icons, pictures: Pictures) -> Any:
    """(N, 3, H, W) float32 in -1 .. 1, about 96 native ones, the same at every checkpoint of both legs."""
    from diffuserve_training.compose import compose

    choose = random.Random(0)  # noqa: S311 - a choice of pictures, no secret
    return compose(icons.atlas, pictures.native(_SCALE_IMAGES, choose)[0])


def _reconstructions(vae: Any, images: Any) -> Any:
    """A PIL image: the first originals, and below them what the autoencoder makes of them."""
    import torch

    from diffuserve_training.compose import pixels_of
    from diffuserve_training.sampling import grid

    images = torch.cat([images[:_GRID_COLUMNS], images[-_GRID_COLUMNS:]])
    with torch.inference_mode():
        drawn = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    return grid(pixels_of(torch.cat([images, drawn])), len(images))
