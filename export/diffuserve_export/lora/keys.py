"""What each tensor of a LoRA file is: which layer it is of, under whatever name, and which part of the change."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from diffuserve.errors import CheckpointError
from diffuserve_export.checkpoint.weights import listed

# Parts of a layer's change: A, B and the middle of Tucker's form in W + alpha / rank * B A; DoRA's magnitudes, as LyCORIS
# and as PEFT saves them; and differences that are added as they are, of a weight and of a bias.
DOWN, UP, MID, ALPHA = "down", "up", "mid", "alpha"
DORA_SCALE, MAGNITUDE = "dora_scale", "magnitude"
WEIGHT_DIFFERENCE, BIAS_DIFFERENCE = "weight difference", "bias difference"

# How names end in the formats of kohya and LyCORIS, of PEFT (with or without the adapter's name), and of diffusers.
_PARTS: Mapping[str, re.Pattern[str]] = {
    part: re.compile(rf"(?P<layer>.+?)(?:{ends})")
    for part, ends in {
        DOWN: r"\.lora_down\.weight|\.lora_A(\.[\w-]+)?\.weight|[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight",
        UP: r"\.lora_up\.weight|\.lora_B(\.[\w-]+)?\.weight|[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight",
        MID: r"\.lora_mid\.weight",
        ALPHA: r"(_lora|\.lora|\.lora_linear_layer)?\.alpha",
        DORA_SCALE: r"\.dora_scale",
        MAGNITUDE: r"\.lora_magnitude_vector(\.[\w-]+)?(\.weight)?",
        WEIGHT_DIFFERENCE: r"\.diff|\.w_norm",
        BIAS_DIFFERENCE: r"\.diff_b|\.b_norm",
    }.items()
}
# What is shared beside LoRAs or under their name, and is not fused.
_OTHERS: Mapping[str, re.Pattern[str]] = {
    kind: re.compile(pattern)
    for kind, pattern in {
        "a textual inversion": r"bundle_emb\.|string_to_param|emb_params$|^clip_[lg]$",
        "LoHa": r"\.hada_",
        "LoKr": r"\.lokr_",
        "OFT": r"\.oft_|\.boft_",
        "GLoRA": r"\.[ab][12]\.weight$",
        "IA3": r"\.on_input$|\.ia3_",
        "AdaLoRA": r"\.lora_E|\.ranknum",
        "VeRA": r"vera_lambda",
        "a LoRA of an embedding table": r"\.lora_embedding_[AB]",
        "a LoRA's own bias": r"\.lora_(up|B)(\.[\w-]+)?\.bias$",
        "a sparse bias": r"\.bias_(indices|values|size)$",
        "a whole module beside the LoRA (PEFT's modules_to_save)": r"modules_to_save",
    }.items()
}


@dataclass(frozen=True)
class Tensor:
    """`key`: its name in the file; `layer`: the beginning of it that names the layer; `part`: one of those above."""

    key: str
    layer: str
    part: str


def tensors_from_keys(keys: Iterable[str], file: str) -> list[Tensor]:
    """Args:
        keys: the names of all tensors of a file.
        file: what to call it in messages.

    Raises:
        CheckpointError: some are of no LoRA, or none is; the names are in the message.
    """
    keys = sorted(keys)
    found = [tensor for key in keys if (tensor := _tensor(key))]
    for kind, pattern in _OTHERS.items():
        if others := [key for key in keys if pattern.search(key)]:
            has_more = len(others) < len(keys)
            raise CheckpointError(
                f"The LoRA {file} {f'holds {kind} besides' if has_more else f'is {kind}'}: {listed(others)}. That is not fused; "
                "LoRA and LoCon are, with or without DoRA, and differences of weights. "
                + ("To fuse the rest, save the file without these tensors." if has_more else "Take one of these kinds.")
            )
    if not any(tensor.part in (UP, WEIGHT_DIFFERENCE, BIAS_DIFFERENCE) for tensor in found):
        raise CheckpointError(
            f"{file} holds no LoRA: none of its tensors is called lora_up, lora_B or lora.up. The first is {keys[0]}."
            if keys
            else f"{file} holds no LoRA: it is empty."
        )
    if unknown := sorted(set(keys) - {tensor.key for tensor in found}):
        raise CheckpointError(
            f"The LoRA {file} holds tensors of an unknown kind: {listed(unknown)}. So it may be more than a LoRA, and is "
            "not fused. If you know that they do not matter, save the file without them."
        )
    return found


def _tensor(key: str) -> Tensor | None:
    for part, pattern in _PARTS.items():
        if match := pattern.fullmatch(key):
            return Tensor(key, match["layer"], part)
    return None
