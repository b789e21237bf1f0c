"""How good a checkpoint of icons is: what it draws of what captions say, and how much its pictures of one caption differ."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from diffuserve_training.captions import plain_caption
from diffuserve_training.cases import ALONE, NEW_PAIR, PAIR, SHARES, Case, cases_of
from diffuserve_training.compose import compose, pixels_of
from diffuserve_training.config import Data
from diffuserve_training.dataset import Icons, Pictures
from diffuserve_training.description import KINDS, Background, Description
from diffuserve_training.judging import Judge, Verdict
from diffuserve_training.segment import ground_of, mask_of

STEPS = 25
_SEED = 20
_VAE_IMAGES = 240
_ASPECTS = ("style", "background", "place", "size", "turn", "relation")
_VARIED, _SEEDS = 12, 16
_SIDE = 64


class Share(msgspec.Struct, frozen=True):
    """How many of `count` are right, and the 95 % interval of their share (Wilson, 1927)."""

    count: int
    right: int

    @property
    def share(self) -> float:
        return self.right / self.count if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        if not self.count:
            return math.nan, math.nan
        z = 1.96
        middle = (self.share + z * z / (2 * self.count)) / (1 + z * z / self.count)
        reach = (
            z
            / (1 + z * z / self.count)
            * math.sqrt(self.share * (1 - self.share) / self.count + (z / 2 / self.count) ** 2)
        )
        return middle - reach, middle + reach


class Evaluation(msgspec.Struct, frozen=True):
    """One checkpoint's figures.

    Attributes:
        named: by group of captions: every thing that is named is the nearest of all.
        aspects: of all captions that ask for it.
        variety: mean distance of pictures of one caption, over that of pictures in which chance places the same icon.
    """

    checkpoint: str
    lora: str | None
    vae_psnr_db: float
    candidates: int
    named: dict[str, Share]
    aspects: dict[str, Share]
    variety: float


def evaluate(
    checkpoint: Path, icons: Icons, data: Data, count: int, *, styles: Sequence[str], lora: Path | None = None
) -> tuple[Evaluation, NDArray[np.uint8], list[Case]]:
    """Draws `count` pictures with 25 steps of DPM++ 2M at the checkpoint's default guidance, each with a seed of its own.

    Args:
        checkpoint: folder in diffusers' format with diffuserve.json.
        icons: among which pictures are looked for.
        data: what is held out, and the pictures' size.
        count: of pictures.
        styles: what is asked for; `icons` may have more.
        lora: a file to draw with, at weight 1.

    Returns:
        The figures, the pictures (count, H, W, 3) uint8, and what they were asked to show.
    """
    from diffuserve_training.sampling import draw, load_pipeline

    pipeline = load_pipeline(checkpoint)
    if lora is not None:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    cases = cases_of(icons.icons, styles, data.held_out, count)
    scale = float(json.loads((checkpoint / "diffuserve.json").read_text())["guidance_scale"])

    def drawn(prompts: list[str], seeds: list[int]) -> NDArray[np.uint8]:
        size = (data.size_px, data.size_px)
        return draw(pipeline, prompts, seeds, steps=STEPS, guidance_scale=scale, size=size)

    images = drawn([case.prompt for case in cases], [case.seed for case in cases])
    named, aspects = judged(images, cases, icons)
    figures = Evaluation(
        str(checkpoint),
        None if lora is None else str(lora),
        vae_psnr_db(pipeline.vae, icons, data),
        len(icons.icons),
        named,
        aspects,
        _variety(drawn, icons, data, [case for case in cases if case.group == ALONE][:_VARIED]),
    )
    return figures, images, cases


def composed(cases: Sequence[Case], icons: Icons, data: Data) -> NDArray[np.uint8]:
    """What the training data has for these captions: (N, H, W, 3) uint8."""
    pictures = Pictures(icons, data)
    choose = random.Random(_SEED)  # noqa: S311 - a choice of pictures, no secret
    return _composed(pictures, icons, [case.description for case in cases], data.size_px, choose)


def judged(images: NDArray[np.uint8], cases: Sequence[Case], icons: Icons) -> tuple[dict[str, Share], dict[str, Share]]:
    """How often things are as named, by group, and how often the rest is as it was asked for."""
    from tqdm import tqdm

    judge = Judge(icons)
    verdicts = [
        judge(image, case.description)
        for image, case in tqdm(list(zip(images, cases, strict=True)), desc="judging", leave=False)
    ]
    of_group: dict[str, list[Verdict]] = {group: [] for group in SHARES}
    for verdict, case in zip(verdicts, cases, strict=True):
        of_group[case.group].append(verdict)
    named = {group: _share([each.named for each in some]) for group, some in of_group.items()}
    named["all things alone"] = _share(
        [each.named for group, some in of_group.items() if group not in (PAIR, NEW_PAIR) for each in some]
    )
    return named, {name: _share([getattr(each, name) for each in verdicts]) for name in _ASPECTS}


def _share(answers: Sequence[bool | None]) -> Share:
    given = [answer for answer in answers if answer is not None]
    return Share(len(given), sum(given))


def _composed(
    pictures: Pictures, icons: Icons, descriptions: Sequence[Description], size_px: int, choose: random.Random
) -> NDArray[np.uint8]:
    images = [compose(icons.atlas, pictures.layout([each], (size_px, size_px), choose)) for each in descriptions]
    return np.concatenate([pixels_of(image) for image in images])


def _variety(drawn: Any, icons: Icons, data: Data, cases: Sequence[Case]) -> float:
    """On plain backgrounds, 16 seeds of each caption against as many layouts of the same icon that chance gives."""
    choose = random.Random(_SEED)  # noqa: S311 - a choice of pictures, no secret
    pictures = Pictures(icons, data)
    ours, theirs = [], []
    for number, case in enumerate(cases):
        colour = case.description.background.colours[0] if case.description.background else "white"
        description = replace(case.description, background=Background(KINDS[0], (colour,)))
        prompt = plain_caption(description, icons.icons)
        ours.append(_spread(drawn([prompt] * _SEEDS, list(range(number * _SEEDS, (number + 1) * _SEEDS)))))
        theirs.append(_spread(_composed(pictures, icons, [description] * _SEEDS, data.size_px, choose)))
    return float(np.sum(ours) / np.sum(theirs))


def _spread(images: NDArray[np.uint8]) -> float:
    """Mean distance (L2) of all pairs at 64 pixels a side, with black for the background."""
    from PIL import Image

    small = []
    for image in images:
        seen = image * mask_of(image, ground_of(image))[..., None]
        small.append(np.asarray(Image.fromarray(seen.astype(np.uint8)).resize((_SIDE, _SIDE), Image.Resampling.BOX)))
    flat = np.stack(small).reshape(len(small), -1).astype(np.float32) / 255
    distances = [float(np.linalg.norm(one - other)) for index, one in enumerate(flat) for other in flat[:index]]
    return float(np.mean(distances))


def vae_psnr_db(vae: Any, icons: Icons, data: Data) -> float:
    """Of native pictures from the training data, over all pixels together."""
    import torch

    choose = random.Random(_SEED)  # noqa: S311 - a choice of pictures, no secret
    images = compose(icons.atlas, Pictures(icons, data).native(_VAE_IMAGES, choose)[0])
    errors = []
    with torch.inference_mode():
        for batch in images.to(vae.device).split(24):
            drawn = vae.decode(vae.encode(batch).latent_dist.mean).sample.clamp(-1, 1)
            errors.append(float((drawn - batch).square().mean()) * len(batch))
    return float(10 * np.log10(4 * len(images) / np.sum(errors)))
