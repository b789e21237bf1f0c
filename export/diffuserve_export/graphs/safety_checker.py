"""The safety checker's scores."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


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
