"""LoRAs into a model's weights: reads files, finds whose layers they change, and changes them.

Every tensor of a file is used, or the file is refused by its name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from diffuserve.errors import CheckpointError
from diffuserve_export.checkpoint.weights import listed
from diffuserve_export.lora.changes import Change, Difference, LowRank
from diffuserve_export.lora.file import Lora
from diffuserve_export.lora.keys import (
    ALPHA,
    BIAS_DIFFERENCE,
    DORA_SCALE,
    DOWN,
    MAGNITUDE,
    MID,
    UP,
    WEIGHT_DIFFERENCE,
    Tensor,
    tensors_from_keys,
)
from diffuserve_export.lora.names import Layer, LayerNames
from diffuserve_export.lora.strength import Strengths

if TYPE_CHECKING:
    from diffuserve_export.checkpoint.loaded_model import LoadedModel

# What a file's header may say of the model that it was trained on.
_BASE_MODEL = ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name")
# How those entries begin for models of two text encoders, and of one.
_OF_TWO, _OF_ONE = ("sdxl", "stable-diffusion-xl"), ("sd_v1", "sd_v2", "stable-diffusion-v1", "stable-diffusion-v2")
_LONGEST_HINT = 60

_Parts = dict[str, Tensor]


def fuse_loras(model: LoadedModel, loras: Sequence[Lora]) -> None:
    """Changes the model's weights, in the order given.

    Args:
        model: its UNet and text encoders are changed.
        loras: in the formats of kohya, LyCORIS (LoCon), PEFT, diffusers or ComfyUI.

    Raises:
        CheckpointError: one does not fit the model, or holds something that cannot be fused; the model is as it was.
    """
    if not loras:
        return
    from safetensors import safe_open

    names = LayerNames(model)
    with ExitStack() as opened:
        files = [
            _LoraFile(lora, opened.enter_context(safe_open(lora.weights, framework="pt")), names, model)
            for lora in loras
        ]
        # One layer at a time through all files, so that a weight is rounded once and little is in memory in float64.
        layers: dict[Layer, list[_LoraFile]] = defaultdict(list)
        for file in files:
            for layer in file.layers:
                layers[layer].append(file)
        for layer, changing in layers.items():
            _change(layer, [change for file in changing for change in file.changes(layer)], loras)


def _change(layer: Layer, changes: Sequence[Change], loras: Sequence[Lora]) -> None:
    for name in ("weight", "bias"):
        own = [change for change in changes if change.bias == (name == "bias")]
        if own:
            parameter = getattr(layer.module, name)
            value = parameter.double()
            for change in own:
                value = change.apply(value)
            parameter.copy_(value)
            if not parameter.isfinite().all():
                raise CheckpointError(
                    f"With {' and '.join(map(str, loras))} the {name} of {layer} is beyond what fp32 can hold. Take a smaller scale."
                )


class _LoraFile:
    """One file: every tensor's layer is known, and every shape fits, before any weight is changed."""

    def __init__(self, lora: Lora, tensors: Any, names: LayerNames, model: LoadedModel) -> None:
        self._lora, self._tensors, self._model = lora, tensors, model
        header = tensors.metadata() or {}
        self._hint = _base_model(header)
        self._header = header
        self._strengths = Strengths(lora, header)
        self.layers = self._find_layers(names)
        for layer in self.layers:
            for change in self.changes(layer):
                parameter = layer.module.bias if change.bias else layer.module.weight
                if reason := change.misfit(tuple(parameter.shape)):
                    raise CheckpointError(self._misfit(f"at {layer}, {reason}"))

    def _find_layers(self, names: LayerNames) -> Mapping[Layer, _Parts]:
        layers: dict[Layer, _Parts] = defaultdict(dict)
        unknown: set[str] = set()
        for tensor in tensors_from_keys(self._tensors.keys(), str(self._lora.path)):
            layer = names.find(tensor.layer)
            if layer is None:
                unknown.add(tensor.layer)
            elif tensor.part in layers[layer]:
                self._refuse(f"{layer} has two tensors of one kind: {layers[layer][tensor.part].key} and {tensor.key}")
            else:
                layers[layer][tensor.part] = tensor
        if unknown:
            total = len(unknown) + len(layers)
            raise CheckpointError(
                self._misfit(f"{len(unknown)} of its {total} layers are not this model's: {listed(unknown)}")
            )
        for layer, parts in layers.items():
            self._check_parts(layer, parts)
        if all(layer.part != "unet" for layer in layers):
            self._check_family()
        return layers

    def _check_family(self) -> None:
        """Of a LoRA for text encoders alone: Stable Diffusion 1 and XL have one in common, so that its names and shapes fit both."""
        others = _OF_ONE if self._model.text_encoder_2 is not None else _OF_TWO
        for entry in _BASE_MODEL[:2]:
            if self._header.get(entry, "").lower().startswith(others):
                raise CheckpointError(self._misfit("it was trained for another family"))

    def _check_parts(self, layer: Layer, parts: _Parts) -> None:
        """Alpha alone changes nothing, as files have it for layers that were left out."""
        halves = {DOWN, UP} & parts.keys()
        if halves and len(halves) < 2:
            [half] = halves
            self._refuse(f"{layer} has {parts[half].key}, and its other half is missing")
        for part in (MID, DORA_SCALE, MAGNITUDE):
            if part in parts and not halves:
                self._refuse(f"{parts[part].key} belongs to no lora_down and lora_up")
        if DORA_SCALE in parts and MAGNITUDE in parts:
            self._refuse(f"{layer} has two kinds of DoRA magnitudes")
        if halves and self._strengths.is_dora(layer.part) and not {DORA_SCALE, MAGNITUDE} & parts.keys():
            self._refuse(f"its settings say use_dora, and {layer} has no magnitudes")
        if BIAS_DIFFERENCE in parts and getattr(layer.module, "bias", None) is None:
            raise CheckpointError(self._misfit(f"{parts[BIAS_DIFFERENCE].key} changes a bias, and {layer} has none"))

    def changes(self, layer: Layer) -> list[Change]:
        """What the file does to one of its layers, read from it."""
        parts, scale = self.layers[layer], self._lora.scale
        read = {part: self._read(tensor.key) for part, tensor in parts.items()}
        changes: list[Change] = []
        if DOWN in parts:
            down, up = read[DOWN], read[UP]
            if min(down.ndim, up.ndim) < 2 or 0 in (*down.shape, *up.shape):
                self._refuse(
                    f"{parts[DOWN].key} is of the shape {tuple(down.shape)} and {parts[UP].key} of {tuple(up.shape)}, where "
                    "matrices of a rank of 1 or more were expected"
                )
            alpha = self._alpha(parts[ALPHA].key, read[ALPHA]) if ALPHA in parts else None
            factor = self._strengths.factor(parts[DOWN].layer, layer.part, down.shape[0], alpha)
            magnitude, axis = read.get(MAGNITUDE), 0
            if DORA_SCALE in read:
                magnitude = read[DORA_SCALE]
                axis = 1 if magnitude.ndim > 1 and magnitude.shape[0] == 1 else 0
            magnitude = None if magnitude is None else magnitude.flatten()
            changes.append(LowRank(down, up, read.get(MID), factor, scale, magnitude, axis))
        for part, bias in ((WEIGHT_DIFFERENCE, False), (BIAS_DIFFERENCE, True)):
            if part in parts:
                changes.append(Difference(read[part], scale, bias))
        return changes

    def _read(self, key: str) -> Any:
        """A tensor as float64."""
        stored = self._tensors.get_tensor(key)
        if not (stored.is_floating_point() or key.endswith(".alpha")):
            self._refuse(
                f"{key} is of the type {str(stored.dtype).removeprefix('torch.')}, where floating-point numbers were expected"
            )
        tensor = stored.double()
        if not tensor.isfinite().all():
            self._refuse(f"{key} is not finite, so the file is damaged or its training failed")
        return tensor

    def _alpha(self, key: str, tensor: Any) -> float:
        if tensor.numel() != 1:
            self._refuse(f"{key} is of the shape {tuple(tensor.shape)}, where one number was expected")
        return float(tensor)

    def _refuse(self, reason: str) -> None:
        raise CheckpointError(f"The LoRA {self._lora.path} cannot be fused: {reason}. Get it again, or save it anew.")

    def _misfit(self, reason: str) -> str:
        width = self._model.unet.config.cross_attention_dim  # type: ignore[attr-defined]  # of ConfigMixin, set dynamically
        return (
            f"The LoRA {self._lora.path} does not fit this checkpoint: {reason}. {self._hint}A LoRA fits models of the "
            f"family that it was trained on; this one's UNet has a text width of {width} (Stable Diffusion 1.x 768, 2.x "
            "1024, XL 2048)."
        )


def _base_model(header: Mapping[str, str]) -> str:
    """A sentence on the base model, where the header names it."""
    for entry in _BASE_MODEL:
        if value := "".join(filter(str.isprintable, header.get(entry, "")))[:_LONGEST_HINT].strip():
            return f"Its header names the base model: {value}. "
    return ""
