"""A Stable Diffusion checkpoint with random weights, small enough to be exported in seconds.

It differs from the bundled one wherever the exporter could have taken a number for granted: epsilon prediction, a VAE
of 8x with attention, two UNet levels, a context of 32, a tokenizer without tokenizer.json.
"""

from __future__ import annotations

import json
from pathlib import Path

from diffuserve_export.quiet import hide_progress_bars, quiet


def write_checkpoint(path: Path) -> Path:
    """Saves it to `path` in diffusers' format."""
    with quiet():
        import torch
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

        hide_progress_bars()
        torch.manual_seed(0)
        tokenizer = CLIPTokenizer.from_pretrained(_write_tokenizer(path.parent / f"{path.name}-tokenizer"))
        text_config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        unet = UNet2DConditionModel(
            sample_size=(8, 12),
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=4,
            scaling_factor=0.5,
        )
        with torch.no_grad():
            vae.decoder.conv_out.weight *= 4  # so that the images use the whole range, and more
        StableDiffusionPipeline(
            text_encoder=CLIPTextModel(text_config),
            tokenizer=tokenizer,
            unet=unet,
            vae=vae,
            scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(path)
    _write_tokenizer(path / "tokenizer")
    (path / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    return path


def _write_tokenizer(folder: Path) -> Path:
    """CLIP's byte-level vocabulary without merges but one, in the old format: vocab.json and merges.txt."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
