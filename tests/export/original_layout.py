"""A checkpoint's weights as one file in the layout of the original code: what diffusers' from_single_file undoes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

Tensors = dict[str, Any]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embedding.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def write_single_file(model: Any, path: Path) -> Path:
    """Args:
    model: a Stable Diffusion 1, 2 or XL pipeline of diffusers, or what has its parts by the same names.
    path: the .safetensors file.
    """
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in original_tensors(model).items()}, path)
    return path


def original_tensors(model: Any) -> Tensors:
    """Its weights by the names of the original layout."""
    names = original_unet_names(model.unet)
    tensors = {f"model.diffusion_model.{names[name]}": t for name, t in model.unet.state_dict().items()}
    tensors |= {f"first_stage_model.{name}": t for name, t in _vae(model.vae).items()}
    if getattr(model, "text_encoder_2", None) is not None:
        tensors |= _clip(model.text_encoder, "conditioner.embedders.0.transformer.")
        tensors |= _open_clip(model.text_encoder_2, "conditioner.embedders.1.model.")
    elif model.text_encoder.config.hidden_act == "gelu":
        tensors |= _open_clip(model.text_encoder, "cond_stage_model.model.")
    else:
        tensors |= _clip(model.text_encoder, "cond_stage_model.transformer.")
    return tensors


def original_unet_names(unet: Any) -> dict[str, str]:
    """The original name of each tensor of a UNet, by its name in diffusers."""
    per_block = unet.config.layers_per_block + 1
    attended = [kind.startswith("CrossAttn") for kind in unet.config.up_block_types]
    renamed = {}
    for name in unet.state_dict():
        if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name):
            side, block, kind, layer, rest = match.groups()
            index = int(block) * per_block + int(layer)
            where = f"input_blocks.{index + 1}" if side == "down" else f"output_blocks.{index}"
            renamed[name] = f"{where}.{_inner(kind, rest)}"
        elif match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
            kind, layer, rest = match.groups()
            place = 1 if kind == "attentions" else 2 * int(layer)
            renamed[name] = f"middle_block.{place}.{_inner(kind, rest).split('.', 1)[1]}"
        elif match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.+)", name):
            renamed[name] = f"input_blocks.{(int(match[1]) + 1) * per_block}.0.op.{match[2]}"
        elif match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.+)", name):
            block = int(match[1])
            last = (block + 1) * per_block - 1
            renamed[name] = f"output_blocks.{last}.{2 if attended[block] else 1}.conv.{match[2]}"
        else:
            end, _, suffix = name.rpartition(".")
            renamed[name] = f"{_UNET_ENDS[end]}.{suffix}"
    return renamed


def _inner(kind: str, rest: str) -> str:
    """A name within a block: 0 is its residual part, 1 its attention."""
    if kind == "attentions":
        return f"1.{rest}"
    part, _, suffix = rest.rpartition(".")
    return f"0.{_RESNET[part]}.{suffix}"


def _vae(vae: Any) -> Tensors:
    renamed = {}
    for name, tensor in vae.state_dict().items():
        original = _vae_name(name, blocks=len(vae.config.block_out_channels))
        # Attention is by convolutions of 1 x 1 there.
        as_convolution = ".attn_1." in original and tensor.ndim == 2
        renamed[original] = tensor[:, :, None, None] if as_convolution else tensor
    return renamed


def _vae_name(name: str, blocks: int) -> str:
    for pattern, replacement in (
        (r"conv_norm_out", "norm_out"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"up_blocks\.(\d+)", lambda match: f"up.{blocks - 1 - int(match[1])}"),
        (r"down_blocks\.(\d+)", r"down.\1"),
        (r"(down|up)\.(\d+)\.resnets\.", r"\1.\2.block."),
        (r"(down|up)samplers\.0\.", r"\1sample."),
        (r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}"),
        (
            r"mid_block\.attentions\.0\.(.+)\.(weight|bias)",
            lambda match: f"mid.attn_1.{_VAE_ATTENTION[match[1]]}.{match[2]}",
        ),
    ):
        name = re.sub(pattern, replacement, name)
    return name


def _text_state(text_encoder: Any) -> Tensors:
    return {name.removeprefix("text_model."): tensor for name, tensor in text_encoder.state_dict().items()}


def _clip(text_encoder: Any, prefix: str) -> Tensors:
    return {f"{prefix}text_model.{name}": tensor for name, tensor in _text_state(text_encoder).items()}


def _open_clip(text_encoder: Any, prefix: str) -> Tensors:
    import torch

    state = _text_state(text_encoder)
    tensors = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
    }
    if "text_projection.weight" in state:
        tensors["text_projection"] = state["text_projection.weight"].T
    for layer in range(text_encoder.config.num_hidden_layers):
        for suffix in ("weight", "bias"):
            theirs, ours = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
            parts = [state[f"{ours}.self_attn.{part}_proj.{suffix}"] for part in "qkv"]
            tensors[f"{theirs}.attn.in_proj_{suffix}"] = torch.cat(parts)
            for name, original in _OPEN_CLIP_LAYER.items():
                tensors[f"{theirs}.{original}.{suffix}"] = state[f"{ours}.{name}.{suffix}"]
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
