"""The modules that are exported: Stable Diffusion's parts with exactly the tensors of `diffuserve.tensors`.

What StableDiffusionPipeline does around its models is inside: scaling of latents, clamping, rounding, layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffuserve.bundle.manifest import ModelSpec
from diffuserve.tensors import SAFETY_CHECKER, TEXT_ENCODER, UNET, VAE_DECODER, VAE_ENCODER
from diffuserve_export.checkpoint.loaded_model import LoadedModel


class TextEncoder(nn.Module):
    """Args:
    text_encoder: a CLIPTextModel of transformers.
    clip_skip: layers to leave out before the final layer norm, as StableDiffusionPipeline does.
    """

    def __init__(self, text_encoder: Any, clip_skip: int = 0) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.clip_skip = clip_skip

    def forward(self, input_ids: Tensor) -> Tensor:
        """`input_ids`: (B, L) int32. Returns the last hidden state, or an earlier one, normalised, (B, L, D) float32."""
        if not self.clip_skip:
            return self.text_encoder(input_ids).last_hidden_state
        hidden_states = self.text_encoder(input_ids, output_hidden_states=True).hidden_states
        # Since transformers 5.6 CLIPTextModel has its parts itself, before in `text_model`.
        parts = getattr(self.text_encoder, "text_model", self.text_encoder)
        return parts.final_layer_norm(hidden_states[-(self.clip_skip + 1)])


class TextEncoders(nn.Module):
    """Stable Diffusion XL's: the hidden states of both, one layer early and not normalised, side by side.

    Args:
        text_encoder: a CLIPTextModel of transformers.
        text_encoder_2: a CLIPTextModelWithProjection.
        clip_skip: further layers to leave out of the hidden states, as StableDiffusionXLPipeline does.
    """

    def __init__(self, text_encoder: Any, text_encoder_2: Any, clip_skip: int = 0) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.layer = -(clip_skip + 2)

    def forward(self, input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """`input_ids`, `input_ids_2`: (B, L) int32, of each encoder's own tokenizer. Returns the hidden states,
        (B, L, D1 + D2) float32, and the second encoder's pooled embedding, (B, P) float32."""
        first = self.text_encoder(input_ids, output_hidden_states=True)
        second = self.text_encoder_2(input_ids_2, output_hidden_states=True)
        hidden_states = torch.cat([first.hidden_states[self.layer], second.hidden_states[self.layer]], dim=-1)
        return hidden_states, second.text_embeds


class TextPooling(nn.Module):
    """diffusers' AttentionPooling, of a UNet whose `addition_embed_type` is "text", in operators that engines treat as they do
    all other attention, and none of whose results depends on the other rows of a call: ONNX Runtime takes a mean over
    tokens in another order for one row than for several.

    Args:
        pooling: whose weights it has.
    """

    def __init__(self, pooling: Any) -> None:
        super().__init__()
        self.pooling = pooling

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`hidden_states`: (B, N, D) float32. Returns (B, D) float32."""
        pooling = self.pooling
        rows, tokens, width = hidden_states.shape
        ones = hidden_states.new_ones(rows, 1, tokens)
        query = ones @ hidden_states / ones.sum(dim=-1, keepdim=True) + pooling.positional_embedding
        every = torch.cat([query, hidden_states], dim=1)

        def split(projected: Tensor) -> Tensor:
            return projected.view(rows, -1, pooling.num_heads, pooling.dim_per_head).transpose(1, 2)

        pooled = nn.functional.scaled_dot_product_attention(
            split(pooling.q_proj(query)), split(pooling.k_proj(every)), split(pooling.v_proj(every))
        )
        return pooled.transpose(1, 2).reshape(rows, 1, width)[:, 0]


class Unet(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        if unet.config.addition_embed_type == "text":
            unet.add_embedding.pool = TextPooling(unet.add_embedding.pool)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """`sample`: (B, C, h, w) float32; `timestep`: (B, 1) float32 in 0..T-1, each row its own, a vector of one since
        Triton has no batched scalar; `encoder_hidden_states`: (B, N, D) float32. Stable Diffusion XL's also takes
        `text_embeds`, (B, P) float32, and `time_ids`, (B, 6) float32; one that takes the guidance scale as an input
        `timestep_cond`, (B, G) float32. Returns (B, C, h, w) float32."""
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.unet(
            sample,
            timestep.squeeze(1),
            encoder_hidden_states,
            timestep_cond=timestep_cond,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]


class VaeDecoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae
        self.scaling_factor = float(vae.config.scaling_factor)
        self.shift_factor = float(vae.config.shift_factor or 0)

    def forward(self, latent_sample: Tensor) -> tuple[Tensor, Tensor]:
        """`latent_sample`: (B, C, h, w) float32, unit variance. Returns RGB images, (B, H, W, 3) uint8, and whether all that
        each was rounded from is finite, (B, 1) bool."""
        decoded = self.vae.decode(latent_sample / self.scaling_factor + self.shift_factor, return_dict=False)[0]
        levels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round()  # half to even, as numpy rounds
        # The least of zeros and ones, which no precision and no order of computing changes; a sum might overflow.
        finite = torch.isfinite(decoded).to(decoded.dtype).amin(dim=(1, 2, 3)).to(torch.bool)
        return levels.permute(0, 2, 3, 1).to(torch.uint8), finite.unsqueeze(1)


class VaeEncoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae
        self.scaling_factor = float(vae.config.scaling_factor)
        self.shift_factor = float(vae.config.shift_factor or 0)

    def forward(self, image: Tensor) -> Tensor:
        """`image`: (B, H, W, 3) uint8 RGB. Returns the posterior's mode, (B, C, h, w) float32, unit variance."""
        # Cast first: all that TensorRT does with bytes is to cast them.
        pixels = image.to(torch.float32).permute(0, 3, 1, 2) / 255 * 2 - 1
        mode = self.vae.encode(pixels).latent_dist.mode()
        return (mode - self.shift_factor) * self.scaling_factor


class SafetyChecker(nn.Module):
    """What diffusers' StableDiffusionSafetyChecker decides by, without the decision."""

    def __init__(self, safety_checker: Any) -> None:
        super().__init__()
        self.safety_checker: Any = safety_checker

    def forward(self, clip_input: Tensor) -> Tensor:
        """`clip_input`: (B, 3, S, S) float32, normalised. Returns a score for each concept, (B, N) float32: by how much
        the image's cosine similarity to it exceeds its threshold, and 0.01 more where one of the concepts that call for
        special care is found. diffusers rounds scores to three decimals and takes those above 0 for found."""
        checker = self.safety_checker
        image_embeds = checker.visual_projection(checker.vision_model(clip_input)[1])
        special = _cosines(image_embeds, checker.special_care_embeds) - checker.special_care_embeds_weights
        special_care = ((special * 1000).round() > 0).any(dim=1, keepdim=True)
        scores = _cosines(image_embeds, checker.concept_embeds) - checker.concept_embeds_weights
        return scores + 0.01 * special_care.to(scores.dtype)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of each of `a`, (A, D), with each of `b`, (B, D): (A, B)."""
    return nn.functional.normalize(a) @ nn.functional.normalize(b).T


def modules_from_model(model: LoadedModel, spec: ModelSpec) -> dict[str, nn.Module]:
    """The module of each stage, by name; they share the model's weights."""
    text_encoder: nn.Module
    if model.text_encoder_2 is None:
        text_encoder = TextEncoder(model.text_encoder, spec.clip_skip)
    else:
        text_encoder = TextEncoders(model.text_encoder, model.text_encoder_2, spec.clip_skip)
    modules: dict[str, nn.Module] = {
        TEXT_ENCODER: text_encoder,
        UNET: Unet(model.unet),
        VAE_DECODER: VaeDecoder(model.vae),
        VAE_ENCODER: VaeEncoder(model.vae),
    }
    if model.safety_checker is not None:
        modules[SAFETY_CHECKER] = SafetyChecker(model.safety_checker)
    return {stage: module.eval().requires_grad_(False) for stage, module in modules.items()}
