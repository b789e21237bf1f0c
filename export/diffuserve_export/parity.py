"""Each exported stage in ONNX Runtime against its PyTorch module, on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.bundle import ModelSpec, Parity
from diffuserve.conditioning import guidance_embedding, time_ids
from diffuserve.engines.onnxruntime import OnnxRuntimeEngine
from diffuserve.engines.tolerance import tolerance_of
from diffuserve.errors import CheckpointError
from diffuserve.tensors import (
    CLIP_INPUT,
    ENCODER_HIDDEN_STATES,
    SAFETY_CHECKER,
    TEXT_ENCODER,
    TIME_IDS,
    TIMESTEP_COND,
    UNET,
    VAE_DECODER,
    VAE_ENCODER,
    StageSpec,
)

if TYPE_CHECKING:
    from torch import nn

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Prompts:
    """Random prompts, to compare the text encoder on, and the UNet on what the text encoder makes of them.

    `tokenizers`: those of transformers, in the order of the text encoder's inputs; `text_encoder`: its module; `tensors`:
    its tensors.
    """

    tokenizers: tuple[Any, ...]
    text_encoder: nn.Module
    tensors: StageSpec

    def input_ids(self, rng: np.random.Generator, batch: int) -> Arrays:
        """(batch, L) int32 by input name."""
        letters = list("abcdefghijklmnopqrstuvwxyz  ")
        texts = ["".join(rng.choice(letters, rng.integers(1, 200))) for _ in range(batch)]
        return {
            tensor.name: tokenizer(
                texts, padding="max_length", truncation=True, max_length=tensor.dims[0], return_tensors="np"
            ).input_ids.astype(np.int32)
            for tensor, tokenizer in zip(self.tensors.inputs, self.tokenizers, strict=True)
        }

    def encoded(self, rng: np.random.Generator, batch: int) -> Arrays:
        """(batch, ...) float32 by the UNet's input name."""
        return _run_module(self.text_encoder, self.input_ids(rng, batch), self.tensors)


def parity_of_onnx(
    path: Path, module: nn.Module, stage: str, tensors: StageSpec, spec: ModelSpec, prompts: Prompts
) -> tuple[float, tuple[Parity, ...]]:
    """Compares at several batch sizes and image sizes.

    Args:
        path: the stage's .onnx file.
        module: what it was exported from.
        stage: a name of `diffuserve.tensors`.
        tensors: the stage's.
        spec: the model's.
        prompts: to compare on.

    Returns:
        The tolerance, in the output's unit, and one record for each comparison.

    Raises:
        CheckpointError: an output's shape differs, its error exceeds the tolerance, or PyTorch's is not finite.
    """
    engine = OnnxRuntimeEngine(path)
    comparisons = [
        (inputs, _run_module(module, inputs, tensors), engine(inputs))
        for inputs in _inputs(stage, tensors, spec, prompts)
    ]
    tolerance = tolerance_of(tensors, "fp32", comparisons[0][1])
    return tolerance, tuple(
        _compare(f"{stage} of {spec.name}", inputs, actual, expected, tolerance)
        for inputs, expected, actual in comparisons
    )


def _compare(what: str, inputs: Arrays, actual: Arrays, expected: Arrays, tolerance: float) -> Parity:
    """`actual`, `expected`: outputs of ONNX Runtime and PyTorch, of any equal shapes and dtypes."""
    shapes = {name: tuple(array.shape) for name, array in inputs.items()}
    for name, array in expected.items():
        if actual[name].shape != array.shape or actual[name].dtype != array.dtype:
            raise CheckpointError(
                f"The export of the {what} is wrong: for inputs {shapes} its {name} is {actual[name].dtype} "
                f"{actual[name].shape}, and PyTorch's {array.dtype} {array.shape}. No bundle was written."
            )
    error = np.concatenate(
        [np.abs(actual[name].astype(np.float64) - array).ravel() for name, array in expected.items()]
    )
    deviation = np.concatenate([array.ravel() for array in expected.values()]).std()
    record = Parity(shapes, float(error.max()), float(error.mean()), float(deviation))
    if not record.max_abs_error <= tolerance:  # so written, NaN is a failure
        raise CheckpointError(
            f"The export of the {what} differs from PyTorch: for inputs {shapes} by up to {record.max_abs_error:.3g}, "
            f"on average by {record.mean_abs_error:.3g}; allowed is {tolerance:.3g} (the output's deviation is "
            f"{record.output_std:.3g}). No bundle was written. If these are not finite, the checkpoint's weights are "
            "damaged or overflow in fp32."
        )
    return record


def _run_module(module: nn.Module, inputs: Mapping[str, NDArray[Any]], tensors: StageSpec) -> Arrays:
    import torch

    with torch.inference_mode():
        outputs = module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {tensor.name: output.numpy() for tensor, output in zip(tensors.outputs, outputs, strict=True)}


def _inputs(stage: str, tensors: StageSpec, spec: ModelSpec, prompts: Prompts) -> Iterator[Arrays]:
    """The inputs to compare on, the native size first."""
    rng = np.random.default_rng(0)
    if stage == TEXT_ENCODER:
        yield from (prompts.input_ids(rng, batch) for batch in (1, 2, 5))
        return
    if stage == SAFETY_CHECKER:
        shape = tensors.inputs[0].dims
        yield from ({CLIP_INPUT: rng.standard_normal((batch, *shape), dtype=np.float32)} for batch in (1, 2, 5))
        return
    factor = spec.vae_scale_factor
    for case, (batch, height, width) in enumerate(_sizes(spec)):
        latents = rng.standard_normal((batch, spec.latent_channels, height, width), dtype=np.float32)
        if stage == UNET:
            encoded = prompts.encoded(rng, batch)
            if case == 1:  # a prompt in two chunks
                hidden = encoded[ENCODER_HIDDEN_STATES]
                encoded[ENCODER_HIDDEN_STATES] = np.concatenate([hidden, hidden[::-1]], axis=1)
            timestep = np.linspace(981, 1, batch, dtype=np.float32)[:, np.newaxis]
            added = _added_inputs(tensors, batch, width * factor, height * factor)
            yield {"sample": latents, "timestep": timestep, **encoded, **added}
        elif stage == VAE_DECODER:
            yield {"latent_sample": latents}
        elif stage == VAE_ENCODER:
            yield {"image": rng.integers(0, 256, (batch, height * factor, width * factor, 3), dtype=np.uint8)}


def _added_inputs(tensors: StageSpec, batch: int, width: int, height: int) -> Arrays:
    """What the UNet takes besides latents, timestep and text; each row's its own."""
    added: Arrays = {}
    for tensor in tensors.inputs:
        if tensor.name == TIME_IDS:
            added[TIME_IDS] = np.stack([time_ids(width + row, height) for row in range(batch)])
        elif tensor.name == TIMESTEP_COND:
            scales = np.linspace(9, 1, batch)
            added[TIMESTEP_COND] = np.stack([guidance_embedding(float(scale), tensor.dims[0]) for scale in scales])
    return added


def _sizes(spec: ModelSpec) -> list[tuple[int, int, int]]:
    """(batch, height, width) in latent pixels: native, not square, small with a larger batch, and larger than native."""
    multiple = spec.size_multiple // spec.vae_scale_factor
    height, width = spec.height // spec.size_multiple, spec.width // spec.size_multiple
    half = max(1, width // 2)
    units = [(1, height, width), (2, height, half), (5, half, half), (1, height + 1, width + 2)]
    return [(batch, rows * multiple, columns * multiple) for batch, rows, columns in units]
