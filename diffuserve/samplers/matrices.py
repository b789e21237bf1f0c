"""A sampler's trajectory as a table of small matrices, how one is made, and how rows advance by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Row = NDArray[np.float64]  # weights of [S_0 .. S_{K-1}, model_output, noise]: (K + 2,) float64


@dataclass(frozen=True)
class Trajectory:
    """One sampler's way from noise, or from a noised image, to image. Shared between requests: arrays are read-only.

    K, the slots of its state, is as small as the sampler allows: latents alone, or latents and earlier predictions.

    Attributes:
        init_noise_sigma: what is drawn from nothing begins as unit noise times this.
        noising: (n, 2) float32, weights of [image's latents, unit noise] in the latents that evaluation i takes: what an
            image is noised with to begin there (diffusers' `add_noise`).
        timesteps: (n,) float32, 0 .. T-1, for the n evaluations of the UNet; may lie between training's timesteps.
        input_scale: (n,) float32, what the latents are multiplied with on their way to the UNet.
        update: (n, K, K + 2) float32, from [S_0 .. S_{K-1}, model_output, noise] to the next state.
        draws_noise: (n,) bool, whether evaluation i is followed by a draw of noise; elsewhere its weights are 0.
        steps_done: (n,) int64, sampling steps completed after evaluation i. The last is `steps`.
        denoised: (n, 2) float32, weights of [S_0, model_output] in the image that evaluation i predicts: for previews.
    """

    sampler: str
    steps: int
    init_noise_sigma: float
    noising: Float32
    timesteps: Float32
    input_scale: Float32
    update: Float32
    draws_noise: NDArray[np.bool_]
    steps_done: NDArray[np.int64]
    denoised: Float32

    @property
    def evaluations(self) -> int:
        """n, the UNet calls that one row takes: one per step, or more."""
        return len(self.timesteps)

    @property
    def slots(self) -> int:
        """K."""
        return int(self.update.shape[1])


def initial_state(noise: Float32, trajectory: Trajectory) -> Float32:
    """One image's state before the first step, (K, C, h, w) float32. `noise`: (C, h, w) float32, unit variance."""
    state = np.zeros((trajectory.slots, *noise.shape), np.float32)
    np.multiply(noise, np.float32(trajectory.init_noise_sigma), out=state[0])
    return state


def noised_state(image: Float32, noise: Float32, trajectory: Trajectory) -> Float32:
    """The state of one image that is drawn over: its latents, noised to where the trajectory begins.

    Args:
        image, noise: (C, h, w) float32, unit variance.

    Returns:
        (K, C, h, w) float32.
    """
    of_image, of_noise = trajectory.noising[0]
    state = np.zeros((trajectory.slots, *image.shape), np.float32)
    state[0] = of_image * image + of_noise * noise
    return state


def advance(
    states: Sequence[Float32], model_output: Float32, noise: Float32, updates: Sequence[Float32]
) -> list[Float32]:
    """Takes B rows, each at its own step of its own trajectory, one UNet evaluation further.

    Args:
        states: B of (K, C, h, w) float32, K that of each row's trajectory.
        model_output: (B, C, h, w) float32, the UNet's prediction, after guidance.
        noise: (B, C, h, w) float32, unit variance; zeros in rows whose trajectory draws none.
        updates: B of (K, K + 2) float32, `trajectory.update[i]` of each row.

    Returns:
        B of (K, C, h, w) float32, new arrays. A row does not depend on the others, to the last bit.
    """
    # A product for each row, since they differ in K. One for all would be a loop over the rows too, inside NumPy, and
    # all would have to carry, stack and multiply the slots of the row that has most.
    advanced = []
    for state, output, draw, update in zip(states, model_output, noise, updates, strict=True):
        inputs = np.concatenate([state, output[None], draw[None]])
        following: Float32 = update @ inputs.reshape(len(inputs), -1)
        advanced.append(following.reshape(state.shape))
    return advanced


def basis(slots: int) -> list[Row]:
    """The unit vectors [S_0 .. S_{K-1}, model_output, noise] of a state of K slots."""
    return list(np.eye(slots + 2))


@dataclass(frozen=True)
class Evaluation:
    """One call of the UNet and what the sampler makes of it.

    Attributes:
        timestep: 0 .. T-1, what the UNet is told.
        state: up to K rows, what the slots hold afterwards, the latents first. Slots beyond them become 0.
        x0: the image that it predicts, of S_0 and the model output alone.
        noising: what S_0 is made of: the weights of the image and of unit noise.
        input_scale: see `Trajectory`. 1 for variance-preserving latents, which go to the UNet as they are.
        completes_step: false where the step needs further evaluations.
    """

    timestep: float
    state: Sequence[Row]
    x0: Row
    noising: tuple[float, float]
    input_scale: float = 1.0
    completes_step: bool = True


def trajectory_from_evaluations(
    sampler: str, evaluations: Sequence[Evaluation], init_noise_sigma: float = 1.0
) -> Trajectory:
    """The table, in float32 and read-only."""
    slots = len(evaluations[0].x0) - 2
    update = np.zeros((len(evaluations), slots, slots + 2))
    for matrix, evaluation in zip(update, evaluations, strict=True):
        matrix[: len(evaluation.state)] = evaluation.state
    steps_done = np.cumsum([evaluation.completes_step for evaluation in evaluations], dtype=np.int64)
    result = Trajectory(
        sampler=sampler,
        steps=int(steps_done[-1]),
        init_noise_sigma=init_noise_sigma,
        noising=np.array([evaluation.noising for evaluation in evaluations], np.float32),
        timesteps=np.array([evaluation.timestep for evaluation in evaluations], np.float32),
        input_scale=np.array([evaluation.input_scale for evaluation in evaluations], np.float32),
        update=update.astype(np.float32),
        draws_noise=update[:, :, -1].any(axis=1),
        steps_done=steps_done,
        denoised=np.array([evaluation.x0[[0, slots]] for evaluation in evaluations], np.float32),
    )
    for array in vars(result).values():
        if isinstance(array, np.ndarray):
            array.flags.writeable = False
    return result
