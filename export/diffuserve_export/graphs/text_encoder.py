"""A prompt's tokens to what the UNet is conditioned on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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
