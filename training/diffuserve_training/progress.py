"""How far a training is: in steps, or, if it has only so much time, in the steps' share of that time."""

from __future__ import annotations

import time

from diffuserve_training.config import Optimisation


class Progress:
    """The place in a schedule of `optimisation.steps`. With `seconds` the schedule takes that long, however many steps of
    training there are: it measures the machine as it goes."""

    def __init__(self, optimisation: Optimisation, seconds: float | None = None) -> None:
        self._optimisation = optimisation
        self._began = time.monotonic()
        self.seconds = seconds

    def begin(self) -> None:
        """The time counts from here."""
        self._began = time.monotonic()

    def __call__(self, step: int) -> float:
        """The schedule's step, 0 .. `steps`, at a step of training."""
        if self.seconds is None:
            return step
        return min(1.0, (time.monotonic() - self._began) / self.seconds) * self._optimisation.steps

    def rate(self, step: int) -> float:
        """The learning rate's factor."""
        return self._optimisation.rate(self(step))

    def is_cooling(self, step: int) -> bool:
        return self(step) >= self._optimisation.steps - self._optimisation.cooldown_steps

    def is_over(self, step: int) -> bool:
        return self(step) >= self._optimisation.steps

    def saves(self, step: int) -> int:
        """How often `every` has passed."""
        return int(self(step) // self._optimisation.every)
