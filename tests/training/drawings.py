"""A few icons that need no download, and a training that takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from diffuserve_training.compose import MARGIN_PX, SPRITE_PX
from diffuserve_training.config import Training
from diffuserve_training.dataset import Icons
from diffuserve_training.icons import Icon, rasterise

SHAPES = {
    "circle": '<circle cx="16" cy="16" r="12" fill="{}"/>',
    "square": '<rect x="5" y="5" width="22" height="22" fill="{}"/>',
    "triangle": '<path d="M16 4 L29 28 L3 28 Z" fill="{}"/>',
    "cross": '<path d="M12 3h8v9h9v8h-9v9h-8v-9H3v-8h9z" fill="{}"/>',
}
COLOURS = {"glossy": "#d04040", "flat": "#4060d0"}


def some_icons(cache: Path) -> Icons:
    """Four names in two styles."""
    icons = [
        Icon(
            name,
            style,
            8,
            ("shape", "plain"),
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{svg}</svg>',
            (f"{name} thing",),
        )
        for style, colour in COLOURS.items()
        for name, svg in ((name, shape.format(colour)) for name, shape in SHAPES.items())
    ]
    return Icons(icons, rasterise(icons, SPRITE_PX, MARGIN_PX, cache))


def small_training(**optimisation: Any) -> Training:
    """64 x 64 pixels, latents 16 x 16, some ten thousand parameters."""
    settings = {
        "steps": 4,
        "batch_size": 4,
        "learning_rate": 2e-3,
        "matrix_learning_rate": 0.02,
        "warmup_steps": 1,
        "every": 2,
        **optimisation,
    }
    return msgspec.convert(
        {
            "data": {"size_px": 64, "sizes": [[64, 64, 0.7], [96, 64, 0.3]], "held_out": 0.3},
            "vae": {
                "model": {
                    "block_out_channels": [8, 16, 16],
                    "down_block_types": ["DownEncoderBlock2D"] * 3,
                    "up_block_types": ["UpDecoderBlock2D"] * 3,
                    "layers_per_block": 1,
                    "latent_channels": 4,
                    "norm_num_groups": 4,
                    "mid_block_add_attention": False,
                    "sample_size": 64,
                },
                "crop_px": 32,
                "optimisation": settings,
                "decoder": settings,
            },
            "ldm": {
                "tokens": 16,
                "vocabulary": 400,
                "text_encoder": {
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "projection_dim": 32,
                },
                "unet": {
                    "sample_size": 16,
                    "block_out_channels": [16, 32],
                    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
                    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
                    "layers_per_block": 1,
                    "attention_head_dim": 2,
                    "norm_num_groups": 4,
                    "addition_embed_type": "text",
                    "addition_embed_type_num_heads": 2,
                },
                "scheduler": {"prediction_type": "v_prediction", "clip_sample": False, "timestep_spacing": "trailing"},
                "optimisation": settings,
                "defaults": {"steps": 4, "guidance_scale": 3.0, "sampler": "dpmpp_2m"},
                "min_snr_gamma": 5.0,
                "noise_levels": 2,
            },
        },
        Training,
    )
