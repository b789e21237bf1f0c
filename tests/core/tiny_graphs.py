"""The fake model of `tests.core.fakes`, with a safety checker, as real ONNX graphs: small, of any batch and size, with random weights."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnx.parser
from numpy.typing import NDArray
from PIL import Image

from diffuserve.bundle.checksums import describe_file
from diffuserve.bundle.manifest import Manifest, write_manifest
from diffuserve.tensors import SAFETY_CHECKER, TEXT_ENCODER, UNET, VAE_DECODER, VAE_ENCODER
from diffuserve.trials.image_parity import draw_reference
from tests.core.fakes import make_bundle

_GRAPHS = {
    TEXT_ENCODER: """text_encoder (int32[B, 12] input_ids) => (float[B, 12, 5] encoder_hidden_states) {
        encoder_hidden_states = Gather (embedding, input_ids)
    }""",
    UNET: """unet (float[B, 4, h, w] sample, float[B, 1] timestep, float[B, L, 5] encoder_hidden_states)
        => (float[B, 4, h, w] noise_pred) {
        image = Conv <pads = [1, 1, 1, 1]> (sample, conv)
        axes = Constant <value = int64[2] {1, 2}> ()
        shape = Constant <value = int64[4] {-1, 1, 1, 1}> ()
        thousandth = Constant <value = float[1] {0.001}> ()
        text = ReduceMean <keepdims = 0> (encoder_hidden_states, axes)
        text_of_row = Reshape (text, shape)
        time = Mul (timestep, thousandth)
        time_of_row = Reshape (time, shape)
        row = Add (text_of_row, time_of_row)
        noise_pred = Add (image, row)
    }""",
    VAE_DECODER: """vae_decoder (float[B, 4, h, w] latent_sample) => (uint8[B, H, W, 3] image, bool[B, 1] finite) {
        scales = Constant <value = float[4] {1.0, 1.0, 8.0, 8.0}> ()
        large_latents = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">
            (latent_sample, , scales)
        large = Conv <pads = [1, 1, 1, 1]> (large_latents, rgb)
        levels = Constant <value = float[1] {127.5}> ()
        lowest = Constant <value = float {0.0}> ()
        highest = Constant <value = float {255.0}> ()
        spread = Mul (large, levels)
        shifted = Add (spread, levels)
        clamped = Clip (shifted, lowest, highest)
        rounded = Round (clamped)
        laid_out = Transpose <perm = [0, 2, 3, 1]> (rounded)
        image = Cast <to = 2> (laid_out)
        infinite = IsInf (large)
        nan = IsNaN (large)
        either = Or (infinite, nan)
        neither = Not (either)
        numbers = Cast <to = 1> (neither)
        axes = Constant <value = int64[3] {1, 2, 3}> ()
        least = ReduceMin <keepdims = 0> (numbers, axes)
        of_row = Cast <to = 9> (least)
        one = Constant <value = int64[1] {1}> ()
        finite = Unsqueeze (of_row, one)
    }""",
    VAE_ENCODER: """vae_encoder (uint8[B, H, W, 3] image) => (float[B, 4, h, w] latent_sample) {
        numbers = Cast <to = 1> (image)
        pixels = Transpose <perm = [0, 3, 1, 2]> (numbers)
        scale = Constant <value = float[1] {0.01}> ()
        unit = Mul (pixels, scale)
        small = AveragePool <kernel_shape = [8, 8], strides = [8, 8]> (unit)
        latent_sample = Conv (small, latents)
    }""",
    SAFETY_CHECKER: """safety_checker (float[B, 3, 16, 16] clip_input) => (float[B, 17] concept_scores) {
        scale = Constant <value = float[1] {0.05}> ()
        unit = Mul (clip_input, scale)
        flat = Flatten (unit)
        concept_scores = MatMul (flat, concepts)
    }""",
}
_WEIGHTS = {
    TEXT_ENCODER: {"embedding": (4096, 5)},
    UNET: {"conv": (4, 4, 3, 3)},
    VAE_DECODER: {"rgb": (3, 4, 3, 3)},
    VAE_ENCODER: {"latents": (4, 3, 1, 1)},
    SAFETY_CHECKER: {"concepts": (768, 17)},
}
STAGES = tuple(_GRAPHS)


def write_graph(stage: str, path: Path) -> None:
    """Writes one stage's graph."""
    rng = np.random.default_rng(1)
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {_GRAPHS[stage]}')
    for name, shape in _WEIGHTS[stage].items():
        weights: NDArray[np.float32] = rng.standard_normal(shape, dtype=np.float32) / 3
        model.graph.initializer.append(onnx.numpy_helper.from_array(weights, name))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def make_real_bundle(folder: Path) -> Manifest:
    """Like `make_bundle`, but its components can be run."""
    manifest = make_bundle(folder, safety_checker=True)
    components = {}
    for stage, component in manifest.components.items():
        path = folder / stage / "model.onnx"
        write_graph(stage, path)
        components[stage] = msgspec.structs.replace(component, files=(describe_file(folder, path),))
    manifest = msgspec.structs.replace(manifest, components=components)
    write_manifest(folder, manifest)
    reference = manifest.reference.file
    Image.fromarray(draw_reference(folder, manifest, components)).save(folder / reference.path)
    drawn = describe_file(folder, folder / reference.path)
    manifest = msgspec.structs.replace(
        manifest,
        reference=msgspec.structs.replace(manifest.reference, file=drawn),
        files=(*(each for each in manifest.files if each != reference), drawn),
    )
    write_manifest(folder, manifest)
    return manifest
