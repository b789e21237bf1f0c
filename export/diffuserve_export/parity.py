"""Each exported stage in ONNX Runtime against its PyTorch module, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.bundle import ModelSpec, Parity
from diffuserve.engines.onnxruntime import OnnxRuntimeEngine
from diffuserve.errors import CheckpointError
from diffuserve.tensors import TEXT_ENCODER, UNET, VAE_DECODER, VAE_ENCODER, stage_specs

if TYPE_CHECKING:
    from torch import nn

Arrays = dict[str, NDArray[Any]]

# The largest error allowed, as a share of the output's standard deviation. fp32 in another order of summation gives
# about 1e-5; a wrong operator or a frozen shape gives an error near the deviation itself.
RELATIVE_TOLERANCE = 1e-3
# For images: two values on either side of a rounding boundary differ by one level of 255, however close they are.
TOLERANCE_LEVELS = 1.0


def parity_of_onnx(
    path: Path, module: nn.Module, stage: str, spec: ModelSpec, text_encoder: nn.Module
) -> tuple[float, tuple[Parity, ...]]:
    """Compares at several batch sizes and image sizes.

    Args:
        path: the stage's .onnx file.
        module: what it was exported from.
        stage: one of `diffuserve.tensors.STAGES`.
        spec: the model's.
        text_encoder: the text encoder's module, to condition the UNet on what it is conditioned on in use.

    Returns:
        The tolerance, in the output's unit, and one record for each comparison.

    Raises:
        CheckpointError: an output's shape differs, its error exceeds the tolerance, or PyTorch's is not finite.
    """
    engine = OnnxRuntimeEngine(path)
    (output,) = stage_specs(
        max_tokens=spec.max_tokens, hidden_size=spec.hidden_size, latent_channels=spec.latent_channels
    )[stage].outputs
    comparisons = [
        (inputs, _run_module(module, inputs), engine(inputs)[output.name])
        for inputs in _inputs(stage, spec, lambda ids: _run_module(text_encoder, {"input_ids": ids}))
    ]
    tolerance = TOLERANCE_LEVELS if stage == VAE_DECODER else RELATIVE_TOLERANCE * float(comparisons[0][1].std())
    return tolerance, tuple(
        _compare(f"{stage} of {spec.name}", inputs, actual, expected, tolerance)
        for inputs, expected, actual in comparisons
    )


def _compare(what: str, inputs: Arrays, actual: NDArray[Any], expected: NDArray[Any], tolerance: float) -> Parity:
    """`actual`, `expected`: outputs of ONNX Runtime and PyTorch, of any equal shape and dtype."""
    shapes = {name: tuple(array.shape) for name, array in inputs.items()}
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise CheckpointError(
            f"The export of the {what} is wrong: for inputs {shapes} it returns {actual.dtype} {actual.shape}, and "
            f"PyTorch {expected.dtype} {expected.shape}. No bundle was written."
        )
    error = np.abs(actual.astype(np.float64) - expected)
    record = Parity(shapes, float(error.max()), float(error.mean()), float(expected.std()))
    if not record.max_abs_error <= tolerance:  # so written, NaN is a failure
        raise CheckpointError(
            f"The export of the {what} differs from PyTorch: for inputs {shapes} by up to {record.max_abs_error:.3g}, "
            f"on average by {record.mean_abs_error:.3g}; allowed is {tolerance:.3g} (the output's deviation is "
            f"{record.output_std:.3g}). No bundle was written. If these are not finite, the checkpoint's weights are "
            "damaged or overflow in fp32."
        )
    return record


def _run_module(module: nn.Module, inputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    import torch

    with torch.inference_mode():
        return module(**{name: torch.from_numpy(array) for name, array in inputs.items()}).numpy()


def _inputs(stage: str, spec: ModelSpec, encode: Callable[[NDArray[np.int32]], NDArray[Any]]) -> Iterator[Arrays]:
    """The inputs to compare on, the native size first."""
    rng = np.random.default_rng(0)

    def input_ids(batch: int) -> NDArray[np.int32]:
        # The first 256 entries of a byte-level vocabulary are the bytes: every tokenizer has them.
        return rng.integers(0, 256, (batch, spec.max_tokens), dtype=np.int32)

    if stage == TEXT_ENCODER:
        yield from ({"input_ids": input_ids(batch)} for batch in (1, 2, 5))
        return
    for case, (batch, height, width) in enumerate(_sizes(spec)):
        latents = rng.standard_normal((batch, spec.latent_channels, height, width), dtype=np.float32)
        if stage == UNET:
            hidden = encode(input_ids(batch))
            if case == 1:  # a prompt in two chunks
                hidden = np.concatenate([hidden, hidden[::-1]], axis=1)
            timestep = np.linspace(981, 1, batch, dtype=np.float32)[:, np.newaxis]
            yield {"sample": latents, "timestep": timestep, "encoder_hidden_states": hidden}
        elif stage == VAE_DECODER:
            yield {"latent_sample": latents}
        elif stage == VAE_ENCODER:
            factor = spec.vae_scale_factor
            yield {"image": rng.integers(0, 256, (batch, height * factor, width * factor, 3), dtype=np.uint8)}


def _sizes(spec: ModelSpec) -> list[tuple[int, int, int]]:
    """(batch, height, width) in latent pixels: native, not square, small with a larger batch, and larger than native."""
    multiple = spec.size_multiple // spec.vae_scale_factor
    height, width = spec.height // spec.size_multiple, spec.width // spec.size_multiple
    half = max(1, width // 2)
    units = [(1, height, width), (2, height, half), (5, half, half), (1, height + 1, width + 2)]
    return [(batch, rows * multiple, columns * multiple) for batch, rows, columns in units]
