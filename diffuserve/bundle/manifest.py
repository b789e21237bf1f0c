"""manifest.json: what a bundle is made of and what was found out about it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import msgspec

from diffuserve.errors import BundleError
from diffuserve.files import write_whole
from diffuserve.tensors import SAFETY_CHECKER, StageSpec

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 4


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the bundle: `path` relative to it with forward slashes, its size and its SHA-256 in hex."""

    path: str
    size_bytes: int
    sha256: str


class Parity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One comparison of an exported component with its PyTorch source on the same inputs.

    `shapes` are the inputs' by name, batch included. `max_abs_error` is over all elements of all outputs, in the
    output's unit (levels of 0..255 for images); `output_std` puts it into proportion.
    """

    shapes: dict[str, tuple[int, ...]]
    max_abs_error: float
    mean_abs_error: float
    output_std: float


class Component(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One exported stage: the engine that runs it, its files (the first is the one to load) and its parity;
    `overflows_in_fp16`: the checkpoint says so of it, and no engine runs it in fp16; `plan_limits`: those of a server's
    limits that its TensorRT plan was built for, by name, empty if it runs no plan."""

    engine: str
    precision: str
    files: tuple[File, ...]
    tensors: StageSpec
    tolerance: float
    parity: tuple[Parity, ...]
    overflows_in_fp16: bool = False
    plan_limits: dict[str, int] = {}


class Trial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One component on one engine, as `diffuserve.trials.selecting` found it on the machine that chose.

    `seconds`: of a call at the native size by batch size, empty if `rejected` says why the engine was not timed;
    `max_abs_error`: from ONNX Runtime in fp32, in the output's unit, None if there was nothing finite to compare;
    `tolerance`: what was allowed.
    """

    component: str
    engine: str
    precision: str
    seconds: dict[int, float]
    max_abs_error: float | None
    tolerance: float
    rejected: str


class Preview(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A linear map from latents to RGB, for previews without a VAE decode: rgb = latents @ matrix + bias, in 0..1.

    `matrix`: C rows of 3; `rmse`: the fit's root mean square error against the images it was fitted to, averaged over the
    pixels of each latent pixel, in 0..1.
    """

    matrix: tuple[tuple[float, float, float], ...]
    bias: tuple[float, float, float]
    rmse: float


class ReferenceImage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What diffusers' own pipeline draws with the checkpoint in fp32: `file`, a PNG, and the request that it answers."""

    file: File
    prompt: str
    seed: int
    steps: int
    guidance_scale: float
    sampler: str
    width: int
    height: int


class ImageParity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The reference image as the bundle draws it, with each component on the engine named.

    `engines`: by component, such as "onnxruntime fp32"; `psnr_db`: of all pixels, None if they are equal; `ssim`: 1 if
    they are; `min_psnr_db`: what was asked for.
    """

    engines: dict[str, str]
    psnr_db: float | None
    ssim: float
    min_psnr_db: float

    @property
    def passed(self) -> bool:
        return self.psnr_db is None or self.psnr_db >= self.min_psnr_db

    def __str__(self) -> str:
        if self.psnr_db is None:
            return "identical"
        return f"PSNR {self.psnr_db:.1f} dB of {self.min_psnr_db:g} asked for, SSIM {self.ssim:.5f}"


class ImageProcessor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How an image is prepared for the safety checker, as the checkpoint's feature_extractor says.

    It is resized until its shorter side has `shortest_edge_px`, with Pillow's filter number `resample`; of that the
    square of `crop_px` in the middle is taken; each level of 0..255 is multiplied by `rescale_factor`, and `mean` and
    `std` of red, green and blue are subtracted and divided by.
    """

    shortest_edge_px: int
    crop_px: int
    resample: int
    rescale_factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class FusedLora(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A LoRA in the weights: its file's name without suffix, how strongly it was applied, its SHA-256 in hex, and
    `weights_sha256` of what follows the file's header, by which other programs know it whatever its metadata."""

    name: str
    scale: float
    sha256: str
    weights_sha256: str = ""


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What requests to this model are measured by.

    `vae_scale_factor`: image pixels to a latent pixel; `size_multiple`: width and height in pixels must be multiples of
    it (the VAE's factor times the UNet's downsampling); `width`, `height`: the sizes it was trained on, in pixels;
    `max_tokens`: the tokenizer's length, start and end tokens included; `zero_empty_negative`: an empty negative prompt
    is embedded as zeros instead of by the text encoder (diffusers' `force_zeros_for_empty_prompt`); `guidance_embedded`:
    the UNet takes the guidance scale as an input, in place of a second row (LCM); `clip_skip`: layers of the text
    encoders that are left out, in diffusers' meaning.
    """

    name: str
    family: str
    latent_channels: int
    hidden_size: int
    max_tokens: int
    vae_scale_factor: int
    size_multiple: int
    width: int
    height: int
    default_steps: int
    default_guidance_scale: float
    default_sampler: str
    zero_empty_negative: bool = False
    guidance_embedded: bool = False
    clip_skip: int = 0


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`source` names the checkpoint and the LoRAs fused into it, `source_sha256` identifies their files, `bundle_sha256`
    the exported ones; `checkpoint_sha256` is of the checkpoint's one file, empty if it was a folder; `created` is ISO 8601,
    UTC;
    `images`: the reference image as drawn on ONNX Runtime in fp32, and on whatever `diffuserve engines --select` has tried;
    `trials`: what led to the components' engines, if that has chosen them; none where plans were built and not tried;
    `unet_seconds`: what one UNet call at the native size takes, by rows, once `bench engine --save` has measured it;
    `scheduler` is the checkpoint's scheduler_config.json as diffusers' pipeline uses it; `files` are those beside the components;
    `image_processor` belongs to the component safety_checker, None where there is none;
    `safety_checker_left_out`: the checkpoint has one, and whoever exported it chose to go without;
    `loras` are fused into the weights, in this order;
    `exported_with`: arguments of `diffuserve export` that make it again, local files by their names without folders."""

    format_version: int
    model: ModelSpec
    scheduler: dict[str, Any]
    components: dict[str, Component]
    files: tuple[File, ...]
    preview: Preview
    reference: ReferenceImage
    images: tuple[ImageParity, ...]
    unet_seconds: dict[int, float]
    source: str
    source_sha256: str
    bundle_sha256: str
    created: str
    versions: dict[str, str]
    trials: tuple[Trial, ...] = ()
    image_processor: ImageProcessor | None = None
    safety_checker_left_out: bool = False
    loras: tuple[FusedLora, ...] = ()
    checkpoint_sha256: str = ""
    exported_with: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.has_safety_checker != (self.image_processor is not None):
            raise ValueError("a safety checker and an image_processor belong together, and one of them is missing")

    @property
    def title(self) -> str:
        """The model's name, and the LoRAs fused into it with their scales: `name with style 0.8, light 1`."""
        loras = ", ".join(f"{lora.name} {lora.scale:g}" for lora in self.loras)
        return f"{self.model.name} with {loras}" if loras else self.model.name

    @property
    def has_safety_checker(self) -> bool:
        """Whether every image of this bundle is checked before it is returned."""
        return SAFETY_CHECKER in self.components

    def all_files(self) -> tuple[File, ...]:
        """Every file of the bundle but the manifest."""
        return tuple(file for part in self.components.values() for file in part.files) + self.files


class _Version(msgspec.Struct):
    format_version: int


class _Origin(msgspec.Struct):
    """What a manifest of any version may say of how it was made."""

    source: str = "the checkpoint"
    exported_with: tuple[str, ...] = ()


def read_manifest(bundle: Path) -> Manifest:
    """Reads a bundle's manifest.

    Raises:
        BundleError: there is none, it is damaged, or of another format; the message has the command that makes it again.
    """
    path = bundle / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(
            f"{bundle} is not a bundle: it has no {MANIFEST_NAME}. Make one: diffuserve export CHECKPOINT"
        ) from None
    try:
        version = msgspec.json.decode(data, type=_Version).format_version
        if version != FORMAT_VERSION:
            raise _other_version(path, data, version)
        return msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as error:
        raise BundleError(f"{path} is damaged: {error}. Export the checkpoint again.") from error


def _other_version(path: Path, data: bytes, version: int) -> BundleError:
    try:
        origin = msgspec.json.decode(data, type=_Origin)
    except msgspec.DecodeError:
        origin = _Origin()
    command = shlex.join(["diffuserve", "export", *(origin.exported_with or ["CHECKPOINT"])])
    return BundleError(
        f"{path} has format version {version}, and this diffuserve reads version {FORMAT_VERSION}. "
        f"{'Upgrade diffuserve, or export' if version > FORMAT_VERSION else 'Export'} {origin.source} again from where its "
        f"files lie, then assemble or archive it: {command}"
    )


def write_manifest(bundle: Path, manifest: Manifest) -> None:
    """Writes manifest.json, whole, indented, keys in the order of the fields."""
    data = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    write_whole(bundle / MANIFEST_NAME, data + b"\n")
