"""Stable Diffusion 1.5 and XL at their real size: export, serve, start again. Random weights, published configs.

`make test-real` runs it; it takes tens of minutes, and an export says before it begins what room it needs. What it is
for: weights beyond 2 GB, which an ONNX file cannot hold, lie beside it, and nothing smaller meets that; and the figures
that docs/benchmarks.md gives, which it prints.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
from PIL import Image

from diffuserve.bundle.manifest import Manifest, read_manifest
from diffuserve.tensors import STAGES, UNET
from diffuserve.trials.similarity import psnr_db
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.launcher import TritonServer
from diffuserve_client import Client
from diffuserve_export.checkpoint.checkpoint import open_checkpoint
from diffuserve_export.quiet import hide_progress_bars, quiet
from diffuserve_export.repository.assemble import repository_from_bundle
from diffuserve_export.room import bundle_size_bytes
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
# Parameters of all components, in thousand millions.
PARAMETERS = {"sd15": 1.07e9, "sdxl": 3.47e9}
_EXPORT = "from diffuserve.cli import main; main()"


def test_stable_diffusion_15(tmp_path: Path) -> None:
    check("sd15", tmp_path, write_sd15)


def test_stable_diffusion_xl_from_half_precision(tmp_path: Path) -> None:
    check("sdxl", tmp_path, write_sdxl)


def check(name: str, folder: Path, write: Callable[[Path], Path]) -> None:
    print(f"\n{name}")
    checkpoint, bundle, repository = write(folder / name), folder / "bundle", folder / "repository"
    opened = open_checkpoint(checkpoint)
    assert opened.parameters == pytest.approx(PARAMETERS[name], rel=0.02)
    arguments = [sys.executable, "-c", _EXPORT, "export", str(checkpoint), "--output", str(bundle)]
    with subprocess.Popen(arguments) as export, measured("export", export.pid):
        assert export.wait() == 0
    manifest = read_manifest(bundle)
    shutil.rmtree(checkpoint)
    size_bytes = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    print(f"  {'the bundle':<22} {size_bytes / 1e9:.1f} GB")
    assert size_bytes < bundle_size_bytes(opened)
    graph, *weights = manifest.components[UNET].files
    assert graph.size_bytes < 2 << 30  # protobuf's limit
    assert [file.path for file in weights] == [f"{graph.path}.data"]
    assert set(manifest.components) == set(STAGES)
    assert all(image.passed for image in manifest.images)
    with measured("assemble"):
        repository_from_bundle(bundle, repository)
    # The engine has stored its graphs in the bundle, and they were placed: so the first start is one without them.
    for entry in repository.rglob("*.onnxruntime"):
        shutil.rmtree(entry)
    serve("first start", repository, bundle, manifest)
    serve("second start", repository, bundle, manifest)


def serve(title: str, repository: Path, bundle: Path, manifest: Manifest) -> None:
    """Starts a server, draws the reference image, and one at the native size."""
    server = TritonServer(repository, TritonAddress.on_free_ports())
    with measured(title):
        server.__enter__()
    try:
        fields: dict[str, Any] = msgspec.structs.asdict(manifest.reference)
        reference = np.asarray(Image.open(bundle / fields.pop("file").path))
        with Client(server.address.grpc, idle_timeout_s=None) as client:
            with measured("  the reference image", server.pid):
                [image] = client.generate(**fields).images
            assert psnr_db(image, reference) >= 50
            with measured("  native, 4 steps of 2 rows", server.pid):
                client.generate("a red apple", steps=4, guidance_scale=5.0)
    finally:
        server.__exit__(None, None, None)


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
def measured(title: str, pid: int | None = None) -> Iterator[None]:
    """Prints the seconds that the block takes, and with `pid` the most memory that this process and its children have
    meanwhile: shared pages counted once (PSS), and without the pages of files, which Linux can give up."""
    peaks_bytes, done = [0, 0], threading.Event()

    def watch(root: psutil.Process) -> None:
        while not done.wait(0.5):
            try:
                infos = [process.memory_full_info() for process in (root, *root.children(recursive=True))]
            except psutil.Error:
                continue  # one has ended meanwhile
            used = sum(info.pss for info in infos), sum(info.rss - info.shared for info in infos)
            peaks_bytes[:] = map(max, peaks_bytes, used)

    watcher = threading.Thread(target=watch, args=[psutil.Process(pid)]) if pid else None
    if watcher:
        watcher.start()
    started_s = time.monotonic()
    try:
        yield
    finally:
        done.set()
        seconds = time.monotonic() - started_s
        if watcher:
            watcher.join()
        memory = f", peak {peaks_bytes[0] / 1e9:.1f} GB, {peaks_bytes[1] / 1e9:.1f} without files" if pid else ""
        print(f"  {title:<26} {seconds:7.1f} s{memory}", flush=True)
