"""A small model that is none: its manifest, its bundle, and stages that are a few lines of numpy."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffuserve.bundle.checksums import describe_file, sha256_of_files
from diffuserve.bundle.manifest import (
    FORMAT_VERSION,
    Component,
    ImageProcessor,
    Manifest,
    ModelSpec,
    Preview,
    ReferenceImage,
    write_manifest,
)
from diffuserve.stages import Conditioning, Float32
from diffuserve.tensors import stage_specs

TOKENIZER = Path(__file__).parents[2] / "model_store" / "checkpoints" / "tiny-emoji" / "tokenizer"

MODEL = ModelSpec(
    name="fake",
    family="stable-diffusion",
    latent_channels=4,
    hidden_size=5,
    max_tokens=12,
    vae_scale_factor=8,
    size_multiple=16,
    width=64,
    height=48,
    default_steps=7,
    default_guidance_scale=3.5,
    default_sampler="euler",
)
PREVIEW = Preview(
    matrix=((0.3, 0.0, 0.1), (0.0, 0.2, 0.0), (-0.1, 0.0, 0.3), (0.05, 0.05, 0.05)), bias=(0.5, 0.4, 0.3), rmse=0.1
)


IMAGE_PROCESSOR = ImageProcessor(
    shortest_edge_px=20, crop_px=16, resample=3, rescale_factor=1 / 255, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)


def make_bundle(folder: Path, *, safety_checker: bool = False, **changes: Any) -> Manifest:
    """Writes a bundle with a real tokenizer and a few bytes for each component; `changes` are the manifest's fields."""
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    processor = IMAGE_PROCESSOR if safety_checker else None
    specs = stage_specs(
        max_tokens=MODEL.max_tokens,
        hidden_size=MODEL.hidden_size,
        latent_channels=4,
        checked_px=processor.crop_px if processor else 0,
    )
    components = {}
    for name in specs:
        path = folder / name / "model.onnx"
        path.parent.mkdir()
        path.write_bytes(f"no real {name}".encode())
        components[name] = Component(
            engine="onnxruntime",
            precision="fp32",
            files=(describe_file(folder, path),),
            tensors=specs[name],
            tolerance=1e-4,
            parity=(),
        )
    Image.new("RGB", (MODEL.width, MODEL.height)).save(folder / "reference.png")
    beside = [*sorted((folder / "tokenizer").iterdir()), folder / "reference.png"]
    files = tuple(describe_file(folder, path) for path in beside)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        model=MODEL,
        scheduler={"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        components=components,
        files=files,
        preview=PREVIEW,
        reference=ReferenceImage(
            files[-1], prompt="a", seed=1, steps=2, guidance_scale=3.5, sampler="euler", width=64, height=48
        ),
        images=(),
        unet_seconds={1: 0.01, 8: 0.05},
        source="fake",
        source_sha256="0123456789abcdef" * 4,
        bundle_sha256=sha256_of_files(files),
        created="2025-01-02T03:04:05+00:00",
        versions={"python": "3.11"},
        image_processor=processor,
    )
    manifest = msgspec.structs.replace(manifest, **changes)
    write_manifest(folder, manifest)
    return manifest


@dataclass
class FakeStages:
    """Implements `diffuserve.stages.Stages`; each row depends on that row alone.

    `unsafe` says of an image as the safety checker sees it, (3, S, S), whether it is flagged.
    `undecodable` says of a latent, (4, h, w), whether its image overflows in the VAE decoder.
    `on_call` may raise in a stage's place; a stage named in `held` waits for `release` and sets `entered` before.
    """

    on_call: Callable[[str, NDArray[Any]], None] = lambda stage, array: None
    unsafe: Callable[[Float32], bool] = lambda clip_input: False
    undecodable: Callable[[Float32], bool] = lambda latent: False
    held: str = ""
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)
    calls: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)

    unet_device: None = None

    def rows(self, stage: str) -> list[int]:
        """Batch sizes of the stage's calls so far."""
        return [shape[0] for name, shape in self.calls if name == stage]

    async def run(self, stage: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if stage == "text_encoder":
            return dict(await self.encode_text(inputs))
        if stage == "unet":
            conditioning = {name: array for name, array in inputs.items() if name not in ("sample", "timestep")}
            return {"noise_pred": await self.denoise(inputs["sample"], inputs["timestep"][:, 0], conditioning)}
        if stage == "vae_decoder":
            image, finite = await self.decode(inputs["latent_sample"])
            return {"image": image, "finite": finite[:, np.newaxis]}
        return {"concept_scores": await self.score_concepts(inputs["clip_input"])}

    async def encode_text(self, input_ids: Mapping[str, NDArray[np.int32]]) -> Conditioning:
        ids = input_ids["input_ids"]
        await self._enter("encode_text", ids)
        text = 1 + np.sin(ids.astype(np.float32))[..., np.newaxis]
        return {"encoder_hidden_states": np.repeat(text, MODEL.hidden_size, axis=2)}

    async def denoise(self, sample: Float32, timestep: Float32, conditioning: Conditioning) -> Float32:
        await self._enter("denoise", sample)
        hidden = conditioning["encoder_hidden_states"].mean(axis=2)
        # Each token counts differently, and a little more or less of it much, so that order and weights show in the image.
        places = np.cos(np.arange(hidden.shape[1], dtype=np.float32))
        text = (np.sin(20 * hidden) * places).mean(axis=1) * timestep / 1000
        output: Float32 = np.float32(0.4) * np.tanh(sample) + text[:, None, None, None].astype(np.float32)
        return output

    async def decode(self, latent_sample: Float32) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        await self._enter("decode", latent_sample)
        rgb = (latent_sample[:, :3].clip(-1, 1) * 127 + 128).astype(np.uint8).transpose(0, 2, 3, 1)
        finite = np.array([not self.undecodable(latent) for latent in latent_sample])
        rgb[~finite] = 0
        return rgb.repeat(MODEL.vae_scale_factor, axis=1).repeat(MODEL.vae_scale_factor, axis=2), finite

    async def score_concepts(self, clip_input: Float32) -> Float32:
        await self._enter("score_concepts", clip_input)
        scores = np.full((len(clip_input), 17), -0.1, np.float32)
        scores[:, 3] = [0.001 if self.unsafe(image) else 0.0004 for image in clip_input]
        return scores

    async def _enter(self, stage: str, array: NDArray[Any]) -> None:
        self.calls.append((stage, array.shape))
        if stage == self.held:
            self.entered.set()
            await self.release.wait()
        else:
            await asyncio.sleep(0)
        self.on_call(stage, array)
