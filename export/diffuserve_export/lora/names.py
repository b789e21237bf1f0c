"""A model's layers by every name that LoRA files have for them.

Names are compared with every dot as an underscore, as kohya writes them; since only names of layers that there are count,
nothing is lost by that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffuserve_export.checkpoint.original_layout import original_unet_names

if TYPE_CHECKING:
    from diffuserve_export.checkpoint.loaded_model import LoadedModel

# How names begin, by part: kohya's, diffusers' and PEFT's, LyCORIS' and SimpleTuner's, ComfyUI's, the original code's. In
# the oldest files of diffusers the UNet's begin with nothing.
_BEGINNINGS = {
    "unet": (
        "lora_unet_",
        "unet_",
        "lycoris_",
        "diffusion_model_",
        "model_diffusion_model_",
        "base_model_model_",
        "unet_base_model_model_",
        "",
    ),
    "text_encoder": (
        "lora_te_",
        "lora_te1_",
        "text_encoder_",
        "text_encoders_clip_l_transformer_",
        "text_encoders_clip_h_transformer_",
    ),
    "text_encoder_2": ("lora_te2_", "text_encoder_2_", "text_encoders_clip_g_transformer_"),
}


@dataclass(frozen=True)
class Layer:
    """`part`: a component; `name`: of its `module` in transformers or diffusers, which has a weight."""

    part: str
    name: str
    module: Any

    def __hash__(self) -> int:
        return hash((self.part, self.name))

    def __str__(self) -> str:
        return f"{self.part}.{self.name}"


class LayerNames:
    """Args:
    model: whose layers are to be found.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._layers: dict[str, Layer] = {}
        for part, beginnings in _beginnings(model).items():
            for name, layer in _layers_by_name(part, getattr(model, part)):
                for beginning in beginnings:
                    self._layers.setdefault(_flat(beginning + name), layer)

    def find(self, name: str) -> Layer | None:
        """The layer that a LoRA file means by a name, or None."""
        return self._layers.get(_flat(name.replace(".processor.", ".")))


def _beginnings(model: LoadedModel) -> dict[str, tuple[str, ...]]:
    beginnings = {part: own for part, own in _BEGINNINGS.items() if getattr(model, part) is not None}
    if model.text_encoder_2 is None:  # with two text encoders, PEFT's own names do not say which is meant
        beginnings["text_encoder"] += ("base_model_model_",)
    return beginnings


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _layers_by_name(part: str, component: Any) -> Iterator[tuple[str, Layer]]:
    layers = {
        name: Layer(part, name, module)
        for name, module in component.named_modules()
        if getattr(module, "weight", None) is not None
    }
    for name, layer in layers.items():
        if part == "unet":
            yield name, layer
            if name.endswith(".to_out.0"):
                yield name.removesuffix(".0"), layer
        else:
            # transformers 5.6 took the parts of CLIPTextModel out of `text_model`; files have it, or leave it out.
            bare = name.removeprefix("text_model.")
            for spelled in (bare, f"text_model.{bare}"):
                yield spelled, layer
                # As diffusers wrote them in early 2023.
                for ending, old in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")):
                    if spelled.endswith(f".self_attn.{ending}"):
                        yield spelled.removesuffix(ending) + old, layer
    if part == "unet":
        for tensor, original in original_unet_names(component).items():
            if (name := tensor.removesuffix(".weight")) in layers:
                yield original.removesuffix(".weight"), layers[name]
