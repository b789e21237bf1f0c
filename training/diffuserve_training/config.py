"""What a training does, read from a small YAML file. Sections that are dicts go to diffusers' and transformers' classes as
they are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from diffuserve.errors import DiffuserveError
from diffuserve_training.icons import STYLES

Count = Annotated[int, msgspec.Meta(ge=1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Section = TypeVar("Section")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".bin")


class ConfigError(DiffuserveError):
    """The file does not say what it must."""

    code = "config_error"


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which icons, and how they are drawn.

    Attributes:
        styles: keys of `diffuserve_training.icons.STYLES`.
        names: file with one name a line, and what else it is called behind "=", relative to the config; None for all.
        size_px: side of the native pictures.
        sizes: width, height and share of the steps of all sizes; those that are larger come in smaller batches.
        held_out: share of the combinations of name and colour, and of two names, that are kept from training.
    """

    styles: Sequence[str] = ("glossy", "flat")
    names: str | None = None
    size_px: Count = 128
    sizes: Sequence[tuple[Count, Count, Share]] = ((128, 128, 1.0),)
    held_out: Share = 0.1

    def __post_init__(self) -> None:
        unknown = sorted(set(self.styles) - set(STYLES))
        if unknown:
            raise ValueError(f"there is no style {unknown[0]!r}; there are {', '.join(STYLES)}")


class Optimisation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Muon and AdamW, or AdamW alone, with a rate that rises linearly, stays, and falls linearly to zero: what was trained can
    be trained on by raising `steps`, since only the last `cooldown_steps` depend on it (Hägele et al., arXiv:2405.18392).

    Attributes:
        steps: in all.
        batch_size: on each device.
        learning_rate: AdamW's.
        matrix_learning_rate: Muon's, which then trains the matrices inside the networks; None leaves all to AdamW.
        matrix_weight_decay: of Muon's matrices, decoupled, times the rate.
        ema_decay: of the averaged weights, which are what is kept.
        every: steps between checkpoints and grids of samples.
    """

    steps: Count
    batch_size: Count
    learning_rate: Positive
    matrix_learning_rate: Positive | None = None
    warmup_steps: Annotated[int, msgspec.Meta(ge=0)] = 200
    cooldown_steps: Annotated[int, msgspec.Meta(ge=0)] = 0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 0.01
    matrix_weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    clip_norm: Positive = 1.0
    ema_decay: Share = 0.999
    every: Count = 1000
    seed: int = 0

    def rate(self, step: float) -> float:
        """The learning rate's factor, 0 .. 1, at a step from 0, or between two."""
        up = min(1.0, (step + 1) / (self.warmup_steps + 1))
        down = (self.steps - step) / self.cooldown_steps if self.cooldown_steps else 1.0
        return max(0.0, min(up, down))


class Vae(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Attributes:
    model: of diffusers' AutoencoderKL.
    crop_px: side of crops around things to train on until the rate falls; then, or where it is None, whole pictures.
    latent_noise: deviation of the noise on the latents that the decoder sees, before scaling.
    edge_weight: of the difference of the images' gradients in the loss.
    latent_weight: of the mean squared latent in the loss.
    decoder: a second leg, in which the decoder learns alone.
    """

    model: Mapping[str, Any]
    optimisation: Optimisation
    decoder: Optimisation | None = None
    crop_px: Count | None = None
    latent_noise: float = 0.1
    edge_weight: float = 0.25
    latent_weight: float = 1e-3


class Ldm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Attributes:
    tokens: of a caption, the start and the end included; the tokenizer's model_max_length.
    vocabulary: entries of the tokenizer, which is made from the captions.
    text_encoder: of transformers' CLIPTextConfig.
    unet: of diffusers' UNet2DConditionModel.
    scheduler: of diffusers' DDIMScheduler.
    empty_captions: share of the captions that are left empty, for guidance.
    min_snr_gamma: of min-SNR weighting (Hang et al., arXiv:2303.09556); None for a uniform weight on v.
    noise_levels: how many noisy versions of a picture share its drawing, its latents and one call of the text encoder.
    defaults: what diffuserve.json offers to those who do not say: steps, guidance_scale, sampler.
    """

    tokens: Count
    vocabulary: Count
    text_encoder: Mapping[str, Any]
    unet: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    optimisation: Optimisation
    defaults: Mapping[str, Any]
    empty_captions: Share = 0.1
    min_snr_gamma: Positive | None = None
    noise_levels: Count = 1


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole file."""

    data: Data
    vae: Vae
    ldm: Ldm


def read_config(path: Path, kind: type[Section]) -> Section:
    """Raises `ConfigError`: the file is missing, is no YAML, or has a field that is wrong, missing or unknown."""
    import yaml

    try:
        return msgspec.convert(yaml.safe_load(path.read_bytes()), kind)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path} is not a training's configuration: {error}.") from None


def read_names(config: Path, data: Data) -> dict[str, tuple[str, ...]] | None:
    """The icons' names that the data is limited to, each with what else it is called."""
    if data.names is None:
        return None
    path = config.parent / data.names
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}). Convert it.") from None
    names = {}
    for line in lines:
        if line.strip() and not line.startswith("#"):
            name, *others = (part.strip() for part in line.split("="))
            names[name] = tuple(others)
    return names


class Lora(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A LoRA (Hu et al., arXiv:2106.09685) for the UNet of a checkpoint.

    Attributes:
        checkpoint: folder in diffusers' format, found by `located`, or an id on the Hugging Face hub.
        images: folder with PNG, JPEG, WebP, GIF or BMP files, found by `located`. A caption is in NAME.txt or NAME.caption
            beside its image, or in metadata.jsonl as `datasets` has it: {"file_name": ..., "text": ...}.
        prompt: the caption of images that have none, such as "a photo of sks dog" (DreamBooth, arXiv:2208.12242).
        rank: of each pair of matrices; `alpha` over it scales what they add.
        target_modules: the UNet's modules to adapt, by the end of their names.
        size_px: side of the images, which are cropped to squares; None for the checkpoint's own.
        empty_captions: share of the captions that are left empty, for guidance.
    """

    checkpoint: str
    images: str
    optimisation: Optimisation
    prompt: str | None = None
    rank: Count = 16
    alpha: Count = 16
    target_modules: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0")
    size_px: Count | None = None
    empty_captions: Share = 0.1


def located(config: Path, name: str) -> Path:
    """A path that a configuration names: relative to the configuration's folder if there is such a thing, else to the working
    directory; where there is none in either, the former."""
    beside = config.parent / name
    return beside if beside.exists() or not Path(name).exists() else Path(name)


def located_checkpoint(config: Path, name: str) -> str:
    """The folder that a configuration names as its checkpoint, or the id on the hub, which is asked later.

    Raises:
        ConfigError: it can be neither.
    """
    allowed = "It must be a folder in diffusers' format, or an id on the Hugging Face hub, OWNER/NAME"
    path = located(config, name)
    if not path.is_dir() and (path.is_file() or Path(name).suffix.lower() in _SINGLE_FILES):
        raise ConfigError(
            f"checkpoint: {name} is a single file. {allowed}: single files cannot be trained on. diffusers makes a folder of one: "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER), for XL StableDiffusionXLPipeline."
        )
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ConfigError(f"checkpoint: {path} has no model_index.json. {allowed}.")
        return str(path)
    if not _HUB_ID.fullmatch(name):
        raise ConfigError(
            f"checkpoint: there is no folder {name} in {config.parent} or the working directory. {allowed}."
        )
    return name
