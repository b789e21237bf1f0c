"""What weights are called in the layout of the original code, and which tensors of such a file are none.

The UNet's and the autoencoder's blocks are numbered through there, residual parts and attention by their place in a block.
OpenCLIP's text encoder holds queries, keys and values in one tensor. Found in CompVis' latent-diffusion, Stability AI's
generative-models and OpenCLIP; files have a few names more from the tools that wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from diffuserve_export.checkpoint.accounting import Origin, Origins, layers_of, whole_trailing_layers

if TYPE_CHECKING:
    from torch import nn

_UNET = "model.diffusion_model."
_VAE = ("first_stage_model.", "vae.")
# Prefixes of text encoders. transformers' CLIP: early files lack the level text_model. OpenCLIP: SD-Turbo's is the second.
_CLIP = (
    "cond_stage_model.transformer.text_model.",
    "cond_stage_model.transformer.",
    "conditioner.embedders.0.transformer.text_model.",
)
_CLIP_OF_TWO = ("conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.0.transformer.")
_OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.0.model.")
_OPEN_CLIP_OF_TWO = ("conditioner.embedders.1.model.",)
# Markers of how to draw, which are read elsewhere.
MARKERS = ("v_pred", "ztsnr")

# By module in diffusers, what it is called there.
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embedding.cond_proj",  # latent consistency models'
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_ENDS = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OPEN_CLIP_THIRDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

# Names of tensors that are not weights of the model's.
_NO_WEIGHTS = re.compile(
    "|".join(
        (
            # Training's noise schedule; that of the scheduler's config is used.
            r"betas|(sqrt_|log_)?(one_minus_)?alphas_cumprod(_prev)?|sqrt_recip(m1)?_alphas_cumprod|denoiser\.sigmas",
            r"posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights|logvar",
            r"ddim_(sigmas|alphas|alphas_prev|sqrt_one_minus_alphas)",
            # How the moving average of the weights was taken.
            r"model_ema\.(decay|num_updates)",
            # What the autoencoder was trained with: discriminator and perceptual loss.
            r"(first_stage_model|vae)\.loss\..+",
            # 0, 1, 2 ...; how sharply CLIP compares texts with images.
            r"(cond_stage_model|conditioner\.embedders\.\d)\..+\.position_ids",
            r"(cond_stage_model|conditioner\.embedders\.\d)\.((model|transformer)\.)?logit_scale",
            # Of the first text encoder only hidden states are used, and not what they are projected to.
            r"(cond_stage_model|conditioner\.embedders\.0)\.((model|transformer)\.)?text_projection(\.weight)?",
            *MARKERS,
        )
    )
)


def origins_in_original(modules: Mapping[str, nn.Module], names: Collection[str]) -> Origins:
    """Where the tensors of all components lie in a file.

    Args:
        modules: by component.
        names: of the file's tensors.
    """
    two = "text_encoder_2" in modules
    origins: dict[str, dict[str, Origin]] = {}
    for part, module in modules.items():
        state = module.state_dict()
        if part == "unet":
            origins[part] = {name: Origin(_UNET + original) for name, original in original_unet_names(module).items()}
        elif part == "vae":
            places = dict(_vae_places(module))
            origins[part] = {
                name: Origin(_first(names, _VAE, _renamed(name, places)), convolution=".attentions." in name)
                for name in state
            }
        elif part == "text_encoder" and not _is_open_clip(names, two):
            prefixes: tuple[str, ...] = _CLIP_OF_TWO if two else _CLIP
            origins[part] = {name: Origin(_first(names, prefixes, name.removeprefix("text_model."))) for name in state}
        else:
            prefixes = _OPEN_CLIP_OF_TWO if two else _OPEN_CLIP
            origins[part] = {name: _open_clip_origin(names, prefixes, name) for name in state}
    return origins


def original_unet_names(unet: nn.Module) -> dict[str, str]:
    """What each of a UNet's tensors is called there, by its name in diffusers."""
    places = {**_UNET_ENDS, **dict(_unet_places(unet))}
    return {name: _renamed(name, places) for name in unet.state_dict()}


def ignored_in_original(modules: Mapping[str, nn.Module], names: Collection[str]) -> set[str]:
    """Names of a file's tensors that are not weights of the model's. Arguments as above.

    The moving average of the UNet's weights, `model_ema`, is among them where the weights themselves are there too.
    """
    averages = {"model_ema." + name.removeprefix("model.").replace(".", "") for name in names if name.startswith(_UNET)}
    ignored = {name for name in names if name in averages or _NO_WEIGHTS.fullmatch(name)}
    if "text_encoder_2" not in modules:  # Stable Diffusion 2 takes the layer before the last: its config has one less
        layers = layers_of(modules["text_encoder"])
        stems = [f"{prefix}transformer.resblocks." for prefix in _OPEN_CLIP]
        stems += [f"{prefix}encoder.layers." for prefix in _CLIP]
        for stem in stems:
            ignored |= whole_trailing_layers(names, stem, layers)
    return ignored


def _is_open_clip(names: Collection[str], two: bool) -> bool:
    """Whether the first text encoder is OpenCLIP's; of two it never is."""
    return not two and any(name.startswith(_OPEN_CLIP) for name in names)


def _first(names: Collection[str], prefixes: tuple[str, ...], name: str) -> str:
    """The name with the first of the prefixes that there is; with the first of all if there is none."""
    return next((prefix + name for prefix in prefixes if prefix + name in names), prefixes[0] + name)


def _renamed(name: str, places: Mapping[str, str]) -> str:
    """A tensor's name with its module's, the longest known, replaced by what it is called in the file."""
    module = name
    while module:
        module, _, _ = module.rpartition(".")
        if module in places:
            return places[module] + name.removeprefix(module)
    return name


def _unet_places(unet: Any) -> Iterator[tuple[str, str]]:
    """Its modules, and what they are called there: blocks are numbered as the latents pass them."""

    def resnet(theirs: str, place: str) -> Iterator[tuple[str, str]]:
        return ((f"{theirs}.{part}", f"{place}.{original}") for part, original in _UNET_RESNET.items())

    number = 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            yield from resnet(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{number}.0")
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers:
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1
    for j in range(len(unet.mid_block.resnets) if unet.mid_block else 0):
        yield from resnet(f"mid_block.resnets.{j}", f"middle_block.{2 * j}")
        yield f"mid_block.attentions.{j}", f"middle_block.{2 * j + 1}"
    number = 0
    for i, block in enumerate(unet.up_blocks):
        attended = bool(getattr(block, "attentions", None))
        for j in range(len(block.resnets)):
            yield from resnet(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{number}.0")
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{number}.1"
            number += 1
        yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{number - 1}.{2 if attended else 1}.conv"


def _vae_places(vae: Any) -> Iterator[tuple[str, str]]:
    """Its modules, and what they are called there; the decoder's levels are numbered from the image's."""
    sides = {"encoder": ("down", vae.encoder.down_blocks), "decoder": ("up", vae.decoder.up_blocks)}
    for side, (way, blocks) in sides.items():
        for i, block in enumerate(blocks):
            theirs, level = f"{side}.{way}_blocks.{i}", i if way == "down" else len(blocks) - 1 - i
            place = f"{side}.{way}.{level}"
            for j in range(len(block.resnets)):
                yield f"{theirs}.resnets.{j}", f"{place}.block.{j}"
                yield f"{theirs}.resnets.{j}.conv_shortcut", f"{place}.block.{j}.nin_shortcut"
            yield f"{theirs}.{way}samplers.0.conv", f"{place}.{way}sample.conv"
        for j in range(2):
            yield f"{side}.mid_block.resnets.{j}", f"{side}.mid.block_{j + 1}"
        for part, original in _VAE_ATTENTION.items():
            yield f"{side}.mid_block.attentions.0.{part}", f"{side}.mid.attn_1.{original}"
        yield f"{side}.conv_norm_out", f"{side}.norm_out"


def _open_clip_origin(names: Collection[str], prefixes: tuple[str, ...], name: str) -> Origin:
    """Of a tensor of transformers' CLIP text encoder, `name`."""
    name = name.removeprefix("text_model.")
    if name == "text_projection.weight":
        # OpenCLIP multiplies by it from the right; a tool that came later keeps transformers' layout and name.
        if (plain := _first(names, prefixes, name)) in names:
            return Origin(plain)
        return Origin(_first(names, prefixes, "text_projection"), transposed=True)
    if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
        layer, part, suffix = match.groups()
        block = f"transformer.resblocks.{layer}"
        if part in _OPEN_CLIP_THIRDS:
            fused = _first(names, prefixes, f"{block}.attn.in_proj_{suffix}")
            return Origin(fused, third=_OPEN_CLIP_THIRDS.index(part))
        return Origin(_first(names, prefixes, f"{block}.{_OPEN_CLIP_LAYER[part]}.{suffix}"))
    return Origin(_first(names, prefixes, _OPEN_CLIP_ENDS[name]))
