"""Checkpoints of each family with random weights, small enough to be exported in seconds.

`write_checkpoint`'s, Stable Diffusion 1's, differs from the bundled one wherever the exporter could have taken a number
for granted: epsilon prediction, a VAE of 8x with attention, two UNet levels, a context of 32, a tokenizer without
tokenizer.json. The others have what sets their families apart, and a VAE of 2x.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.bundle.checksums import describe_file
from diffuserve.bundle.manifest import Component
from diffuserve.tensors import StageSpec
from diffuserve_export.quiet import hide_progress_bars, quiet

_NO_SAFETY_CHECKER: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}


def write_checkpoint(path: Path) -> Path:
    """Saves it to `path` in diffusers' format."""
    with quiet():
        import torch
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
        from transformers import CLIPTextModel

        tokenizer = load_tokenizer(path)
        unet = _small_unet(
            sample_size=(8, 12),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=4,
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
            text_encoder=CLIPTextModel(_text_config(tokenizer, hidden_size=32, layers=1)),
            tokenizer=tokenizer,
            unet=unet,
            vae=vae,
            scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
            **_NO_SAFETY_CHECKER,
        ).save_pretrained(path)
    _write_tokenizer(path / "tokenizer")
    (path / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    return path


def write_sd2_checkpoint(path: Path) -> Path:
    """Stable Diffusion 2: OpenCLIP's text encoder, linear projections in the UNet, v prediction, prompts padded with "!"."""
    with quiet():
        from diffusers import DDIMScheduler, StableDiffusionPipeline
        from transformers import CLIPTextModel

        tokenizer = load_tokenizer(path, padding="!")
        unet = _small_unet(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
        )
        StableDiffusionPipeline(
            text_encoder=CLIPTextModel(_text_config(tokenizer, hidden_size=32, layers=2, act="gelu")),
            tokenizer=tokenizer,
            unet=unet,
            vae=_small_vae(),
            scheduler=DDIMScheduler(
                beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False, steps_offset=1
            ),
            **_NO_SAFETY_CHECKER,
        ).save_pretrained(path)
    # As published: tokenizer_config.json has the end token for padding, and special_tokens_map.json, which wins, "!".
    _write_tokenizer(path / "tokenizer")
    (path / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    (path / "tokenizer" / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    return path


def write_sdxl_checkpoint(path: Path) -> Path:
    """Stable Diffusion XL: two text encoders of different width, a UNet that is told the image's size."""
    with quiet():
        from diffusers import DDIMScheduler, StableDiffusionXLPipeline
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        tokenizer, tokenizer_2 = load_tokenizer(path), load_tokenizer(path, padding="!")
        unet = _small_unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32 + 24,
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=20 + 6 * 8,
        )
        second = _text_config(tokenizer_2, hidden_size=24, layers=3, act="gelu", projection_dim=20)
        second.eos_token_id = 2  # as published: transformers then looks for the highest id
        StableDiffusionXLPipeline(
            text_encoder=CLIPTextModel(_text_config(tokenizer, hidden_size=32, layers=3)),
            tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(second),
            tokenizer_2=tokenizer_2,
            unet=unet,
            vae=_small_vae(scaling_factor=0.13025),
            scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        ).save_pretrained(path)
    return path


def write_lcm_checkpoint(path: Path) -> Path:
    """A latent consistency model: a UNet that takes the guidance scale as an input."""
    with quiet():
        from diffusers import LatentConsistencyModelPipeline, LCMScheduler
        from transformers import CLIPTextModel

        tokenizer = load_tokenizer(path)
        unet = _small_unet(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=4,
            time_cond_proj_dim=16,
        )
        LatentConsistencyModelPipeline(
            text_encoder=CLIPTextModel(_text_config(tokenizer, hidden_size=32, layers=1)),
            tokenizer=tokenizer,
            unet=unet,
            vae=_small_vae(),
            scheduler=LCMScheduler(steps_offset=1),
            **_NO_SAFETY_CHECKER,
        ).save_pretrained(path)
    return path


def add_safety_checker(checkpoint: Path, images: Sequence[NDArray[np.uint8]]) -> Path:
    """Gives a checkpoint a safety checker with random weights, whose thresholds lie among the scores of `images`: it
    flags some of them and not others, and finds a concept that calls for special care in some.

    Args:
        checkpoint: its folder, with a model_index.json.
        images: (H, W, 3) uint8 each, of any sizes; at least 4 that differ.
    """
    with quiet():
        import torch
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
        from transformers import CLIPConfig, CLIPImageProcessorPil

        hide_progress_bars()
        torch.manual_seed(0)
        vision = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        }
        checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16)).eval()
        processor = CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
        with torch.no_grad():
            pixels = processor([*images], return_tensors="pt").pixel_values
            embeds = checker.visual_projection(checker.vision_model(pixels)[1])
            # The directions in which the images differ most: each concept is one, and the first of each kind is found.
            _, _, directions = torch.linalg.svd(embeds - embeds.mean(dim=0))
            for concepts, weights, first in (
                (checker.concept_embeds, checker.concept_embeds_weights, 0),
                (checker.special_care_embeds, checker.special_care_embeds_weights, 1),
            ):
                concepts.copy_(torch.randn(concepts.shape))
                concepts[0] = directions[first]
                cosines = cosine_distance(embeds, concepts)
                weights.copy_(cosines.amax(dim=0) + 0.02)
                weights[0] = cosines[:, 0].sort().values[len(images) // 2 - 1 :][:2].mean()
        checker.save_pretrained(checkpoint / "safety_checker")
        processor.save_pretrained(checkpoint / "feature_extractor")
    index = json.loads((checkpoint / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index["requires_safety_checker"] = True
    (checkpoint / "model_index.json").write_text(json.dumps(index))
    return checkpoint


WRITERS: dict[str, Callable[[Path], Path]] = {
    "sd1": write_checkpoint,
    "sd2": write_sd2_checkpoint,
    "sdxl": write_sdxl_checkpoint,
    "lcm": write_lcm_checkpoint,
}


def load_tokenizer(path: Path, padding: str = "<|endoftext|>") -> Any:
    """The tokenizer of the checkpoint that is being written to `path`; seeds its random weights too."""
    import torch
    from transformers import CLIPTokenizer

    hide_progress_bars()
    torch.manual_seed(0)
    folder = _write_tokenizer(path.parent / f"{path.name}-tokenizer")
    return CLIPTokenizer.from_pretrained(folder, pad_token=padding)


def component_of(path: Path, tensors: StageSpec) -> Component:
    """Of a graph that was just exported and not compared yet."""
    return Component("onnxruntime", "fp32", (describe_file(path.parent, path),), tensors, tolerance=0.0, parity=())


def _text_config(
    tokenizer: Any, *, hidden_size: int, layers: int, act: str = "quick_gelu", projection_dim: int = 16
) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        hidden_act=act,
        projection_dim=projection_dim,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _small_unet(**settings: Any) -> Any:
    """`settings`: what is particular to a family; for 8 x 8 latents unless they say otherwise."""
    from diffusers import UNet2DConditionModel

    shared = {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    return UNet2DConditionModel(**{**shared, **settings})


def _small_vae(scaling_factor: float = 0.18215) -> Any:
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=scaling_factor,
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 4
    return vae


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
