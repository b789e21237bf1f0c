"""How good a checkpoint of icons is: reconstruction, retrieval, backgrounds, styles, on combinations it has seen and on
those kept from it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from diffuserve_training.backgrounds import NAMES
from diffuserve_training.captions import plain_caption
from diffuserve_training.config import Data
from diffuserve_training.dataset import Icons, image_batch, is_held_out
from diffuserve_training.icons import Icon
from diffuserve_training.retrieval import Found, Gallery

STEPS = 25
_SEED = 20
_VAE_IMAGES = 256


class Case(msgspec.Struct, frozen=True):
    """One picture to draw. `seen`: the name was trained on this background."""

    name: str
    style: str
    background: str
    seen: bool
    seed: int

    @property
    def prompt(self) -> str:
        return plain_caption(self.name, self.style, self.background)


class Scores(msgspec.Struct, frozen=True):
    """Shares, 0 .. 1, of `count` pictures."""

    count: int
    top1: float
    top5: float
    background: float
    style: float


class Evaluation(msgspec.Struct, frozen=True):
    """One checkpoint's figures. `candidates`: icons of a style among which retrieval looks."""

    checkpoint: str
    lora: str | None
    vae_psnr_db: float
    candidates: int
    seen: Scores
    held_out: Scores


def cases_of(icons: Sequence[Icon], held_out: float, count: int) -> list[Case]:
    """`count` fixed pictures, every fifth of a combination that is kept from training."""
    choose = random.Random(_SEED)  # noqa: S311 - a choice of captions, no secret
    cases: list[Case] = []
    while len(cases) < count:
        icon, background = choose.choice(icons), choose.choice(NAMES)
        seen = not is_held_out(icon.name, background, held_out)
        if seen == (len(cases) % 5 != 4):
            cases.append(Case(icon.name, icon.style, background, seen, len(cases)))
    return cases


def evaluate(
    checkpoint: Path, icons: Icons, data: Data, count: int, *, styles: Sequence[str], lora: Path | None = None
) -> tuple[Evaluation, NDArray[np.uint8]]:
    """Draws `count` pictures with 25 steps of DPM++ 2M at the checkpoint's default guidance, each with a seed of its own.

    Args:
        checkpoint: folder in diffusers' format with diffuserve.json.
        icons: among which pictures are looked for.
        data: what is held out, and the pictures' size.
        count: of pictures.
        styles: what is asked for; `icons` may have more.
        lora: a file to draw with, at weight 1.

    Returns:
        The figures, and the pictures (count, H, W, 3) uint8 in the order of `cases_of`.
    """
    from diffuserve_training.sampling import draw, load_pipeline

    pipeline = load_pipeline(checkpoint)
    if lora is not None:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    cases = cases_of([icon for icon in icons.icons if icon.style in styles], data.held_out, count)
    scale = float(json.loads((checkpoint / "diffuserve.json").read_text())["guidance_scale"])
    images = draw(
        pipeline,
        [case.prompt for case in cases],
        [case.seed for case in cases],
        steps=STEPS,
        guidance_scale=scale,
    )
    gallery = Gallery(icons.icons, icons.drawn)
    found = [
        gallery.find(image, case.name, case.style, case.background)
        for image, case in zip(_at_size(images, data.size_px), cases, strict=True)
    ]
    pairs = list(zip(cases, found, strict=True))
    candidates = sum(icon.style == styles[0] for icon in icons.icons)
    figures = Evaluation(
        str(checkpoint),
        None if lora is None else str(lora),
        vae_psnr_db(pipeline.vae, icons),
        candidates,
        _scores([(case, each) for case, each in pairs if case.seen]),
        _scores([(case, each) for case, each in pairs if not case.seen]),
    )
    return figures, images


def _scores(pairs: Sequence[tuple[Case, Found]]) -> Scores:
    def share(true: Sequence[bool]) -> float:
        return float(np.mean(true)) if true else float("nan")

    return Scores(
        len(pairs),
        share([found.rank < 1 for _, found in pairs]),
        share([found.rank < 5 for _, found in pairs]),
        share([found.background == case.background for case, found in pairs]),
        share([found.style == case.style for case, found in pairs]),
    )


def _at_size(images: NDArray[np.uint8], size_px: int) -> NDArray[np.uint8]:
    """A checkpoint may draw at another size than the icons have here."""
    from PIL import Image

    if images.shape[1] == size_px:
        return images
    resized = [Image.fromarray(image).resize((size_px, size_px), Image.Resampling.LANCZOS) for image in images]
    return np.stack([np.asarray(image) for image in resized])


def vae_psnr_db(vae: Any, icons: Icons) -> float:
    """Of random icons on random backgrounds, over all pixels together."""
    import torch

    images = image_batch(icons, seed=(_SEED, 0, 0), batch_size=_VAE_IMAGES)
    errors = []
    with torch.inference_mode():
        for start in range(0, len(images), 32):
            batch = torch.from_numpy(images[start : start + 32])
            drawn = vae.decode(vae.encode(batch).latent_dist.mean).sample.clamp(-1, 1)
            errors.append(float((drawn - batch).square().mean()))
    return float(10 * np.log10(4 / np.mean(errors)))
