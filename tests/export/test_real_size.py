"""Stable Diffusion 1.5 and XL at their real size: export, load, one UNet step. Random weights, published configs.

`make test-real` runs it; it takes tens of minutes, and says what it needs before it begins. What it is for: weights
beyond 2 GB, which an ONNX file cannot hold, lie beside it, and nothing smaller meets that.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from diffuserve.bundle import read_manifest, verify
from diffuserve.conditioning import time_ids
from diffuserve.engines.onnxruntime import OnnxRuntimeEngine
from diffuserve.tensors import STAGES, UNET
from diffuserve_export.checkpoint import open_checkpoint
from diffuserve_export.export import bundle_from_checkpoint, bundle_size_bytes
from diffuserve_export.quiet import hide_progress_bars, quiet
from tests.export.tiny import load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * 3600)]

# stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0 on the hub: what differs from the classes' defaults.
CLIP_L: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "projection_dim": 768}
CLIP_L |= {"num_attention_heads": 12, "hidden_act": "quick_gelu", "eos_token_id": 2}
OPEN_CLIP_G: dict[str, Any] = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
OPEN_CLIP_G |= {"num_attention_heads": 20, "hidden_act": "gelu", "projection_dim": 1280, "eos_token_id": 2}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
UNET_15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
UNET_XL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SCHEDULER: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULER |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
VOCABULARY = 49408
# Parameters of all components, in thousand millions, to ask for room before anything is made.
PARAMETERS = {"sd15": 1.07e9, "sdxl": 3.47e9}
# Weights in PyTorch, again in the exporter's hands while a file is written, and once more in ONNX Runtime.
COPIES_IN_MEMORY = 3
ACTIVATIONS_BYTES = 8 << 30


def test_stable_diffusion_15(tmp_path: Path) -> None:
    require_room("sd15", tmp_path, half=False)
    check("sd15", tmp_path, write_sd15)


def test_stable_diffusion_xl_from_half_precision(tmp_path: Path) -> None:
    require_room("sdxl", tmp_path, half=True)
    check("sdxl", tmp_path, write_sdxl)


def require_room(name: str, folder: Path, *, half: bool) -> None:
    """Fails at once, and says what is missing, instead of after an hour."""
    weights_bytes = 4 * PARAMETERS[name]
    needed = {
        "memory": (COPIES_IN_MEMORY * weights_bytes + ACTIVATIONS_BYTES, psutil.virtual_memory().available),
        "disk": ((1.5 if half else 2) * weights_bytes * 1.1, shutil.disk_usage(folder).free),
    }
    lacking = [
        f"{kind}: {have / 1e9:.0f} GB free, about {need / 1e9:.0f} GB needed"
        for kind, (need, have) in needed.items()
        if have < need
    ]
    if lacking:
        pytest.fail(
            f"{name} at its real size does not fit here; {'; '.join(lacking)}. (For disk, --basetemp names another.)"
        )


def check(name: str, folder: Path, write: Any) -> None:
    print(f"\n{name}")
    with measured("write the checkpoint"):
        checkpoint = write(folder / name)
    opened = open_checkpoint(checkpoint)
    assert opened.parameters == pytest.approx(PARAMETERS[name], rel=0.02)
    with measured("export and compare"):
        bundle = bundle_from_checkpoint(opened, folder / "bundle", progress=measured)
    manifest = read_manifest(bundle)
    shutil.rmtree(checkpoint)
    with measured("verify"):
        verify(bundle, manifest)
    size_bytes = sum(file.size_bytes for file in manifest.all_files())
    assert 0.95 * 4 * PARAMETERS[name] < size_bytes < bundle_size_bytes(opened)
    unet = manifest.components[UNET]
    graph, *weights = unet.files
    assert graph.size_bytes < 2 << 30  # protobuf's limit
    assert [file.path for file in weights] == [f"{graph.path}.data"]
    for stage in STAGES:
        worst = max(record.max_abs_error for record in manifest.components[stage].parity)
        print(f"  {stage:<22} worst error {worst:.2g}, allowed {manifest.components[stage].tolerance:.2g}")
    with measured("load the UNet"):
        engine = OnnxRuntimeEngine(bundle / graph.path)
    rng = np.random.default_rng(0)
    model, rows = manifest.model, 2
    inputs = {
        "sample": (
            rows,
            model.latent_channels,
            *(side // model.vae_scale_factor for side in (model.height, model.width)),
        ),
        "encoder_hidden_states": (rows, model.max_tokens, model.hidden_size),
        "text_embeds": (rows, 1280),
    }
    arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in inputs.items()}
    arrays["timestep"] = np.full((rows, 1), 981, np.float32)
    arrays["time_ids"] = np.tile(time_ids(model.width, model.height), (rows, 1))
    taken = [tensor.name for tensor in unet.tensors.inputs]
    with measured("one step, guided"):
        output = engine({name: arrays[name] for name in taken})["noise_pred"]
    assert output.shape == arrays["sample"].shape
    assert np.isfinite(output).all()
    assert output.std() > 0


def write_sd15(path: Path) -> Path:
    with quiet():
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        hide_progress_bars()
        StableDiffusionPipeline(
            text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=VOCABULARY, **CLIP_L)),
            tokenizer=load_tokenizer(path),
            unet=UNet2DConditionModel(**UNET_15),
            vae=AutoencoderKL(**VAE, sample_size=512, scaling_factor=0.18215),
            scheduler=DDIMScheduler(**SCHEDULER),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(path)
    return path


def write_sdxl(path: Path) -> Path:
    """Half precision, as the fp16 variant: about 7 GB."""
    with quiet():
        import torch
        from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        hide_progress_bars()
        euler = {key: value for key, value in SCHEDULER.items() if key not in ("clip_sample", "set_alpha_to_one")}
        torch.set_default_dtype(torch.float16)  # never twice in memory
        try:
            pipeline = StableDiffusionXLPipeline(
                text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=VOCABULARY, **CLIP_L)),
                tokenizer=load_tokenizer(path),
                text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=VOCABULARY, **OPEN_CLIP_G)),
                tokenizer_2=load_tokenizer(path, padding="!"),
                unet=UNet2DConditionModel(**UNET_XL),
                vae=AutoencoderKL(**VAE, sample_size=1024, scaling_factor=0.13025, force_upcast=True),
                scheduler=EulerDiscreteScheduler(**euler),
            )
        finally:
            torch.set_default_dtype(torch.float32)
        pipeline.save_pretrained(path, variant="fp16")
    return path


@contextmanager
def measured(title: str) -> Iterator[None]:
    """Prints the seconds that the block takes, and the most memory that this process has meanwhile."""
    process, peak_bytes, done = psutil.Process(os.getpid()), [0], threading.Event()

    def watch() -> None:
        while True:
            peak_bytes[0] = max(peak_bytes[0], process.memory_info().rss)
            if done.wait(0.2):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started_s = time.monotonic()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        print(f"  {title:<22} {time.monotonic() - started_s:7.1f} s, peak {peak_bytes[0] / 1e9:5.1f} GB", flush=True)
