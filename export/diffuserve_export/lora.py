"""LoRAs, fused into the weights before they are exported: W + scale * alpha / rank * B A (Hu et al., arXiv:2106.09685)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from diffuserve.errors import CheckpointError
from diffuserve_export.weights import parameters_in

if TYPE_CHECKING:
    from diffuserve_export.load import LoadedModel

# Nothing that is part of a tensor's name, since peft finds its own tensors by it.
_ADAPTER = "diffuserve"
_PARTS = ("unet", "text_encoder", "text_encoder_2")
# Every layer that a LoRA changes has one of these, B in the formula; kohya, PEFT and two older formats of diffusers.
_UP = re.compile(r"\.lora_up\.weight$|\.lora_B(\.\w+)?\.weight$|[._]lora\.up\.weight$|\.lora_linear_layer\.up\.weight$")


@dataclass(frozen=True)
class Lora:
    """A .safetensors file and how strongly it is applied: 1 as it was trained, 0 not at all."""

    path: Path
    scale: float

    def __str__(self) -> str:
        return f"{self.path.name}:{self.scale:g}"


def lora_from_text(text: str) -> Lora:
    """`style.safetensors:0.8`, or without a scale, which then is 1.

    Raises:
        CheckpointError: there is no such file, it is no safetensors file or damaged, or the scale is no number.
    """
    name, colon, scale = text.rpartition(":")
    if not colon:
        name, scale = text, "1"
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise CheckpointError(f"--lora {text}: {scale!r} is no scale. Give FILE.safetensors:SCALE, SCALE a number.")
    path = Path(name)
    if not path.is_file():
        raise CheckpointError(f"--lora {text}: there is no file {path}.")
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"--lora {text}: only .safetensors files are read, since a pickle can run any code when it is opened."
        )
    parameters_in(path)
    return Lora(path, number)


def fuse_lora(model: LoadedModel, lora: Lora) -> None:
    """Changes the model's weights as diffusers' load_lora_weights and fuse_lora do.

    Args:
        model: its UNet and text encoders are changed.
        lora: in kohya's format, PEFT's or diffusers'.

    Raises:
        CheckpointError: it does not fit the model, or peft is not installed.
    """
    if find_spec("peft") is None:
        raise CheckpointError("LoRAs are fused with peft, which is not installed: pip install 'diffuserve[export]'")
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = _layers_in(lora.path)
    pipeline = model.pipeline()
    try:
        pipeline.load_lora_weights(
            str(lora.path.parent),
            weight_name=lora.path.name,
            adapter_name=_ADAPTER,
            use_safetensors=True,
            local_files_only=True,
        )
    except Exception as error:  # diffusers, peft and torch raise errors of their own for what does not fit
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{_misfit(lora, model)} {reason}") from error
    parts = [part for part in _PARTS if getattr(model, part) is not None]
    changed = sum(isinstance(module, BaseTunerLayer) for part in parts for module in getattr(model, part).modules())
    if changed != layers:  # diffusers only warns of layers that the model does not have
        raise CheckpointError(f"{_misfit(lora, model)} It changes {layers} layers, of which the model has {changed}.")
    pipeline.fuse_lora(components=parts, lora_scale=lora.scale, adapter_names=[_ADAPTER])
    pipeline.unload_lora_weights()


def _layers_in(path: Path) -> int:
    """How many layers a LoRA changes."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as tensors:
        layers = sum(_UP.search(name) is not None for name in tensors.keys())  # noqa: SIM118
    if not layers:
        raise CheckpointError(
            f"{path} holds no LoRA: none of its tensors is called lora_up, lora_B or lora.up. Other kinds of networks "
            "(LoHa, LoKr, textual inversions) are not supported."
        )
    return layers


def _misfit(lora: Lora, model: LoadedModel) -> str:
    width = model.unet.config.cross_attention_dim  # type: ignore[attr-defined]  # of ConfigMixin, set dynamically
    return (
        f"The LoRA {lora.path} does not fit this checkpoint, whose UNet has a text width of {width}: it was probably "
        "trained for another base model (text widths: Stable Diffusion 1.x 768, 2.x 1024, XL 2048)."
    )
