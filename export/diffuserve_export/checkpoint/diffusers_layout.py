"""What weights are called in a component's folder: as in the module, but for names that diffusers and transformers have
changed since."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

from diffuserve_export.checkpoint.accounting import Origin, layers_of, whole_trailing_layers

if TYPE_CHECKING:
    from torch import nn

# The autoencoder's attention until diffusers 0.14.
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION = re.compile(rf"(\.attentions\.\d+\.)({'|'.join(_ATTENTION)})(?=\.(weight|bias)$)")
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
# Of CLIP, which the text encoders and the safety checker are parts of: buffers that count up, how sharply it compares
# texts with images, and the half that sees images.
_OF_CLIP = re.compile(r"(.+\.)?embeddings\.position_ids|logit_scale")
_IMAGE_HALF = re.compile(r"vision_model\..+|visual_projection\.weight")


def origins_in_folder(part: str, module: nn.Module, names: Collection[str]) -> dict[str, Origin]:
    """Where a component's tensors lie in its folder's weights.

    Args:
        part: the component.
        module: whose tensors.
        names: of the folder's tensors.
    """
    found = {_canonical(part, name): name for name in sorted(names)}
    return {name: Origin(found.get(_canonical(part, name), name)) for name in module.state_dict()}


def ignored_in_folder(part: str, module: nn.Module, names: Collection[str]) -> set[str]:
    """Names of tensors in a component's folder that are not weights of the component's. Arguments as above."""
    if part == "safety_checker":
        return {name for name in names if _OF_CLIP.fullmatch(name)}
    if part not in _TEXT_ENCODERS:
        return set()
    ignored = {name for name in names if _OF_CLIP.fullmatch(name) or _IMAGE_HALF.fullmatch(name)}
    if part == "text_encoder":  # its hidden states are used, and not what they are projected to
        ignored |= {"text_projection.weight"}
    for stem in ("encoder.layers.", "text_model.encoder.layers."):
        ignored |= whole_trailing_layers(names, stem, layers_of(module))
    return ignored


def _canonical(part: str, name: str) -> str:
    """One name for what is called differently: CLIP's parts had one more level in their names before transformers 5.6."""
    if part in _TEXT_ENCODERS:
        return name.removeprefix("text_model.")
    if part == "safety_checker":
        return name.replace("vision_model.vision_model.", "vision_model.", 1)
    return _OLD_ATTENTION.sub(lambda match: match[1] + _ATTENTION[match[2]], name)
