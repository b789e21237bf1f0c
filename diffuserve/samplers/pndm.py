"""PNDM: DDIM's step, with outputs averaged over several evaluations. Stable Diffusion 1 was published with it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from diffuserve.errors import InvalidRequest
from diffuserve.samplers.ddim import ddim_step
from diffuserve.samplers.latents import preserving, refuse_zero_snr, x0_and_eps
from diffuserve.samplers.matrices import Evaluation, Row, Trajectory, basis, trajectory_from_evaluations
from diffuserve.samplers.noise_schedule import NoiseSchedule

# Adams and Bashforth's weights of this output and the ones before it, by how many are known (eq. 12 for four).
_ADAMS_BASHFORTH: tuple[tuple[float, ...], ...] = (
    (1,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
_EARLIER = 3  # outputs that the state remembers, the latest first
_RUNGE_KUTTA_STEPS = 3  # which make them


def pndm(schedule: NoiseSchedule, steps: int, start: int) -> Trajectory:
    """Liu et al., arXiv:2202.09778, algorithm 2: Runge-Kutta (eq. 13) to begin with, then a linear multistep method.

    Matches PNDMScheduler. With `skip_prk_steps`, which Stable Diffusion has, the first step is only done again, with
    the mean of both its ends. Steps are as long as DDIM's, measured in training's timesteps.

    Raises:
        InvalidRequest: the checkpoint predicts x0 (`sample`) or has zero terminal SNR, or there are too few steps.
    """
    refuse_zero_snr("pndm", schedule)
    if schedule.prediction_type == "sample":
        raise InvalidRequest(
            "sampler is 'pndm', and this checkpoint's scheduler config has prediction_type='sample'; it may be epsilon "
            "or v_prediction. Use another sampler, such as ddim."
        )
    if not schedule.skip_prk_steps and steps - start <= _RUNGE_KUTTA_STEPS:
        left = f"; {steps - start} of them are left to draw over an image" if start else ""
        raise InvalidRequest(
            f"steps is {steps}{left}; with the sampler pndm it must be at least {_RUNGE_KUTTA_STEPS + 1}, since this "
            "checkpoint's scheduler config does not have skip_prk_steps=true. Ask for more, or use another sampler."
        )
    timesteps = schedule.inference_timesteps(steps, default_spacing="leading").round().astype(np.int64).tolist()[start:]
    solver = _Pndm(schedule, schedule.num_train_timesteps // steps)
    if schedule.skip_prk_steps:
        evaluations = solver.first_step_twice(timesteps[:2]) + solver.multistep(timesteps[1:], known=1)
    else:
        evaluations = solver.runge_kutta(timesteps[: _RUNGE_KUTTA_STEPS + 1])
        evaluations += solver.multistep(timesteps[_RUNGE_KUTTA_STEPS:], known=_EARLIER)
    return trajectory_from_evaluations("pndm", evaluations)


class _Pndm:
    """The parts of a trajectory. `jump`: training's timesteps in a step.

    The state: the latents, three earlier outputs, and for Runge-Kutta steps where they began and their outputs' mean.
    """

    def __init__(self, schedule: NoiseSchedule, jump: int) -> None:
        self._schedule = schedule
        self._jump = jump
        slots = 1 + _EARLIER + (0 if schedule.skip_prk_steps else 2)
        self._x, *self._memory, self._output, _noise = basis(slots)

    def first_step_twice(self, timesteps: Sequence[int]) -> list[Evaluation]:
        """From the first timestep to the second, and again with the mean of the outputs at both; a single one once."""
        x, output, (first, start, *_) = self._x, self._output, self._memory
        t = timesteps[0]
        once = self._evaluation(
            t, [self._step(x, output, t, t - self._jump), output, x], completes_step=len(timesteps) == 1
        )
        if len(timesteps) == 1:
            return [once]
        to = timesteps[1]
        return [once, self._evaluation(to, [self._step(start, (output + first) / 2, to + self._jump, to), first])]

    def runge_kutta(self, timesteps: Sequence[int]) -> list[Evaluation]:
        """A step of four evaluations from each timestep to the next: at its start, twice in its middle, at its end."""
        x, output = self._x, self._output
        *earlier, start, mean = self._memory
        half = self._jump // 2
        evaluations = []
        for t, to in pairwise(timesteps):
            middle = to + half
            evaluations += [
                self._evaluation(
                    t, [self._step(x, output, t, t - half), output, *earlier[:-1], x, output / 6], completes_step=False
                ),
                self._evaluation(
                    middle,
                    [self._step(start, output, t, middle), *earlier, start, mean + output / 3],
                    completes_step=False,
                ),
                self._evaluation(
                    middle, [self._step(start, output, t, to), *earlier, start, mean + output / 3], completes_step=False
                ),
                self._evaluation(to, [self._step(start, mean + output / 6, t, to), *earlier]),
            ]
        return evaluations

    def multistep(self, timesteps: Sequence[int], known: int) -> list[Evaluation]:
        """A step from each timestep. `known`: how many earlier outputs there are when it begins."""
        evaluations = []
        for t in timesteps:
            weights = _ADAMS_BASHFORTH[min(known, _EARLIER)]
            outputs = [self._output, *self._memory[:_EARLIER]]
            mean: Row = sum((w * o for w, o in zip(weights, outputs, strict=False)), start=np.zeros_like(self._x))
            evaluations.append(self._evaluation(t, [self._step(self._x, mean, t, t - self._jump), *outputs[:_EARLIER]]))
            known += 1
        return evaluations

    def _step(self, x: Row, output: Row, t: int, to: int) -> Row:
        """Eq. 9, which is DDIM's step."""
        return ddim_step(self._schedule, self._alpha_cumprod(t), self._alpha_cumprod(to), x, output)

    def _evaluation(self, t: int, state: Sequence[Row], *, completes_step: bool = True) -> Evaluation:
        alpha_cumprod = self._alpha_cumprod(t)
        x0, _eps = x0_and_eps(self._schedule, alpha_cumprod, self._x, self._output)
        return Evaluation(t, state, x0, preserving(alpha_cumprod), completes_step=completes_step)

    def _alpha_cumprod(self, t: int) -> float:
        return self._schedule.alpha_cumprod_at(t, default_set_alpha_to_one=False)
