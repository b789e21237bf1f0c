"""Each exported stage in ONNX Runtime against its PyTorch module, on the same inputs.

In two steps, so that the module's weights can be given up before ONNX Runtime loads them once more: `references_of`
keeps what the module makes of inputs, `parity_of_onnx` compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.bundle.manifest import Component, ModelSpec, Parity
from diffuserve.conditioning import guidance_embedding, time_ids
from diffuserve.engines import load_engine
from diffuserve.errors import CheckpointError
from diffuserve.stages import finite_rows
from diffuserve.tensors import (
    CLIP_INPUT,
    ENCODER_HIDDEN_STATES,
    FINITE,
    SAFETY_CHECKER,
    TEXT_ENCODER,
    TIME_IDS,
    TIMESTEP_COND,
    UNET,
    VAE_DECODER,
    VAE_ENCODER,
    StageSpec,
)
from diffuserve.trials.tolerance import tolerance_of
from diffuserve_export.graphs.finite_values import not_finite
from diffuserve_export.sizes import native_units

if TYPE_CHECKING:
    from torch import nn

Arrays = dict[str, NDArray[Any]]


# Rows of the comparisons of what has one size only; the last is the largest.
_BATCHES = (1, 2, 5)


@dataclass(frozen=True)
class Reference:
    """A module's outputs for inputs, both by name."""

    inputs: Arrays
    outputs: Arrays


def random_input_ids(tokenizers: Sequence[Any], tensors: StageSpec) -> Arrays:
    """Random prompts as the text encoder's inputs, (B, L) int32 by name.

    Args:
        tokenizers: those of transformers, in the order of the inputs.
        tensors: the text encoder's.
    """
    rng = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz  ")
    texts = ["".join(rng.choice(letters, rng.integers(1, 200))) for _ in range(_BATCHES[-1])]
    return {
        tensor.name: tokenizer(
            texts, padding="max_length", truncation=True, max_length=tensor.triton_dims[0], return_tensors="np"
        ).input_ids.astype(np.int32)
        for tensor, tokenizer in zip(tensors.inputs, tokenizers, strict=True)
    }


def references_of(
    module: nn.Module, stage: str, tensors: StageSpec, spec: ModelSpec, texts: Arrays
) -> tuple[Reference, ...]:
    """Runs a stage's module at several batch sizes and image sizes.

    Args:
        module: the stage's.
        stage: a name of `diffuserve.tensors`.
        tensors: the stage's.
        spec: the model's.
        texts: for the text encoder `random_input_ids`, for the UNet what the text encoder makes of them; (B, ...) by
            input name.

    Returns:
        The native size, or what stands for it, first.

    Raises:
        CheckpointError: what the module makes is not finite.
    """
    references = []
    for inputs in _inputs(stage, tensors, spec, texts):
        outputs = _run_module(module, inputs, tensors)
        if not finite_rows(outputs).all():
            raise not_finite(f"{stage} of {spec.name}", {stage: module})
        references.append(Reference(inputs, outputs))
    return tuple(references)


def parity_of_onnx(
    path: Path, component: Component, references: Sequence[Reference], what: str, *, strict: bool = True
) -> tuple[float, tuple[Parity, ...]]:
    """Compares an exported graph with what its module made of the same inputs. What ONNX Runtime makes of the graph stays
    stored beside it.

    Args:
        path: the .onnx file.
        component: its own, whose tolerance and parity are not known yet.
        references: `references_of` its module.
        what: to call it in messages.
        strict: whether an error beyond the tolerance raises; it is in the records in either case.

    Returns:
        The tolerance, in the output's unit, and one record for each reference.

    Raises:
        CheckpointError: an output's shape differs, its error exceeds the tolerance, or it is not finite.
    """
    engine = load_engine(path, component, threads=0)
    tolerance = tolerance_of(component.tensors, component.precision, references[0].outputs)
    return tolerance, tuple(
        _compare(what, each.inputs, engine(each.inputs), each.outputs, tolerance, strict) for each in references
    )


def _compare(what: str, inputs: Arrays, actual: Arrays, expected: Arrays, tolerance: float, strict: bool) -> Parity:
    """`actual`, `expected`: outputs of ONNX Runtime and PyTorch, of any equal shapes and dtypes; the latter are finite."""
    shapes = {name: tuple(array.shape) for name, array in inputs.items()}
    for name, array in expected.items():
        if actual[name].shape != array.shape or actual[name].dtype != array.dtype:
            raise CheckpointError(
                f"The export of the {what} is wrong: for inputs {shapes} its {name} is {actual[name].dtype} "
                f"{actual[name].shape}, and PyTorch's {array.dtype} {array.shape}. No bundle was written."
            )
    if not finite_rows(actual).all():
        raise CheckpointError(
            f"The export of the {what} is wrong: for inputs {shapes} it makes values that are not finite, and PyTorch does "
            "not. No bundle was written."
        )
    numbers = {name: array for name, array in expected.items() if name != FINITE}
    error = np.concatenate([np.abs(actual[name].astype(np.float64) - array).ravel() for name, array in numbers.items()])
    deviation = np.concatenate([array.ravel() for array in numbers.values()]).std()
    record = Parity(shapes, float(error.max()), float(error.mean()), float(deviation))
    if strict and record.max_abs_error > tolerance:
        raise CheckpointError(
            f"The export of the {what} differs from PyTorch: for inputs {shapes} by up to {record.max_abs_error:.3g}, "
            f"on average by {record.mean_abs_error:.3g}; allowed is {tolerance:.3g} (the output's deviation is "
            f"{record.output_std:.3g}). No bundle was written; --allow-differences writes it anyway."
        )
    return record


def _run_module(module: nn.Module, inputs: Mapping[str, NDArray[Any]], tensors: StageSpec) -> Arrays:
    import torch

    with torch.inference_mode():
        outputs = module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {tensor.name: output.numpy() for tensor, output in zip(tensors.outputs, outputs, strict=True)}


def _inputs(stage: str, tensors: StageSpec, spec: ModelSpec, texts: Arrays) -> Iterator[Arrays]:
    """The inputs to compare on, the native size first."""
    rng = np.random.default_rng(0)
    if stage == TEXT_ENCODER:
        yield from (_first_rows(texts, batch) for batch in _BATCHES)
        return
    if stage == SAFETY_CHECKER:
        shape = tensors.inputs[0].triton_dims
        yield from ({CLIP_INPUT: rng.standard_normal((batch, *shape), dtype=np.float32)} for batch in _BATCHES)
        return
    factor = spec.vae_scale_factor
    for case, (batch, height, width) in enumerate(_sizes(spec)):
        latents = rng.standard_normal((batch, spec.latent_channels, height, width), dtype=np.float32)
        if stage == UNET:
            encoded = _first_rows(texts, batch)
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


def _first_rows(arrays: Arrays, batch: int) -> Arrays:
    return {name: array[:batch] for name, array in arrays.items()}


def _added_inputs(tensors: StageSpec, batch: int, width: int, height: int) -> Arrays:
    """What the UNet takes besides latents, timestep and text; each row's its own."""
    added: Arrays = {}
    for tensor in tensors.inputs:
        if tensor.name == TIME_IDS:
            added[TIME_IDS] = np.stack([time_ids(width + row, height) for row in range(batch)])
        elif tensor.name == TIMESTEP_COND:
            scales = np.linspace(9, 1, batch)
            added[TIMESTEP_COND] = np.stack(
                [guidance_embedding(float(scale), tensor.triton_dims[0]) for scale in scales]
            )
    return added


def _sizes(spec: ModelSpec) -> list[tuple[int, int, int]]:
    """(batch, height, width) in latent pixels: native, then small ones in batches and not square."""
    multiple = spec.size_multiple // spec.vae_scale_factor
    units = [(1, *native_units(spec)), (2, 2, 1), (5, 1, 1), (1, 1, 3)]
    return [(batch, rows * multiple, columns * multiple) for batch, rows, columns in units]
