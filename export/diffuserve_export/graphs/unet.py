"""One call of the UNet, each row at a timestep of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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
