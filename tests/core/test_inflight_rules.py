"""The in-flight loop's promises, over hundreds of random loads in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffuserve.batching.jobs import Job, Latent
from diffuserve.batching.policies import POLICIES, Policy
from diffuserve.batching.selection import PRIORITY_AGEING_S, InflightSelection
from diffuserve.errors import StageFailed
from diffuserve.samplers import SAMPLERS
from diffuserve_bench.virtual_time import run_in_virtual_time
from tests.core.test_inflight import SHAPES, FakeUNet, finish, make_job, make_loop

CALL_S = 0.01
CALL_TIMEOUT_S = 0.5
FAULTS = ("raises", "nan", "shape", "hangs")


@dataclass
class FaultyUNet(FakeUNet):
    """Takes `CALL_S` a call, but for those whose number, from 0, is in `faults`."""

    faults: dict[int, str] = field(default_factory=dict)

    async def __call__(self, sample: Any, timestep: Any, conditioning: Any) -> Any:
        fault = self.faults.get(len(self.calls))
        self.seconds = 1000 if fault == "hangs" else CALL_S
        prediction = await super().__call__(sample, timestep, conditioning)
        if fault == "raises":
            raise StageFailed("injected")
        if fault == "nan":
            return np.full_like(prediction, np.nan)
        return prediction[:, :1] if fault == "shape" else prediction


class WatchedSelection(InflightSelection):
    """Checks every call that it puts together; `batches` are the jobs of each, in order."""

    def __init__(self, max_rows: int, policy: Policy, max_active_images: int) -> None:
        super().__init__(max_rows, policy)
        self.policy = policy
        self.max_active_images = max_active_images
        self.batches: list[set[Job]] = []
        self.answered: set[Job] = set()

    def select(self, jobs: Sequence[Job], now_s: float) -> list[Latent]:
        batch = super().select(jobs, now_s)
        active = sum(len(job.latents) for job in jobs)
        assert active <= self.max_active_images or len(jobs) == 1
        ready = [latent for job in jobs for latent in job.ready_latents()]
        assert bool(batch) == bool(ready)
        if batch:
            self._check(batch, ready, now_s)
            self.batches.append({latent.job for latent in batch})
        return batch

    def _check(self, batch: list[Latent], ready: list[Latent], now_s: float) -> None:
        [shape] = {latent.job.shape for latent in batch}
        rows = sum(latent.rows for latent in batch)
        assert rows <= self.max_rows
        assert len(set(map(id, batch))) == len(batch)
        assert all(any(latent is one for one in ready) for latent in batch)
        assert not self.answered & {latent.job for latent in batch}
        alike = [latent for latent in ready if latent.job.shape == shape]
        assert min(latent.job.priority for latent in alike) == min(latent.job.priority for latent in ready)
        for left_out in alike:
            if any(left_out is latent for latent in batch):
                continue
            assert left_out.rows > self.max_rows - rows  # nothing that fits is left out
            for taken in batch:
                if taken.rows >= left_out.rows:  # a smaller one may have passed one that did not fit
                    assert self._rank(taken.job, left_out.job, now_s) <= self._rank(left_out.job, taken.job, now_s)

    def _rank(self, job: Job, other: Job, now_s: float) -> tuple[float, ...]:
        if job.client_id != other.client_id:
            return (job.priority,)
        return job.priority, self.policy(job, now_s)


requests = st.lists(
    st.fixed_dictionaries(
        {
            "at_s": st.floats(0, 0.5),
            "gives_up_after_s": st.none() | st.none() | st.floats(0, 0.5),
            "steps": st.integers(1, 6),
            "sampler": st.sampled_from(sorted(SAMPLERS)),
            "guidance_scale": st.sampled_from((1.0, 4.0)),
            "images": st.integers(1, 3),
            "shape": st.sampled_from(SHAPES),
            "priority": st.sampled_from((0, 5, 5, 9)),
            "client_id": st.sampled_from(("", "one", "other")),
        }
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    requests=requests,
    faults=st.dictionaries(st.integers(0, 30), st.sampled_from(FAULTS), max_size=3),
    policy=st.sampled_from(sorted(POLICIES)),
    max_rows=st.integers(2, 9),
    max_active_images=st.integers(1, 8),
    instances=st.integers(1, 3),
)
def test_the_loop_keeps_its_promises(
    requests: list[dict[str, Any]],
    faults: dict[int, str],
    policy: str,
    max_rows: int,
    max_active_images: int,
    instances: int,
) -> None:
    """Every request ends once: with its result, or failed if a call that carried it did, or given up if it was; and every
    call keeps the rules that `WatchedSelection` checks."""

    async def main() -> None:
        unet = FaultyUNet(faults=faults)
        selection = WatchedSelection(max_rows, POLICIES[policy], max_active_images)
        loop = make_loop(
            unet,
            selection=selection,
            max_active_images=max_active_images,
            instances=instances,
            call_timeout_s=CALL_TIMEOUT_S,
        )
        failed: list[Job] = []
        finished: list[Job] = []

        async def one(at_s: float, gives_up_after_s: float | None, **fields: Any) -> None:
            await asyncio.sleep(at_s)
            steps_seen: list[int] = []
            job = make_job(**fields, on_step=lambda step, _: steps_seen.append(step))
            try:
                latents = await asyncio.wait_for(loop.denoise(job), gives_up_after_s)
            except TimeoutError:
                assert gives_up_after_s is not None
            except StageFailed:
                failed.append(job)
            else:
                finished.append(job)
                assert latents.shape == (fields["images"], *fields["shape"])
                assert steps_seen == list(range(1, fields["steps"] + 1))
            selection.answered.add(job)

        results = await finish(loop, *(one(**request) for request in requests))
        assert results == [None] * len(requests)
        assert len(unet.calls) == len(selection.batches)
        assert unet.most_running <= instances
        broken = [selection.batches[call] for call in faults if call < len(unet.calls)]
        for job in failed:
            assert any(job in batch for batch in broken)
        for job in finished:
            assert not any(job in batch for batch in broken)
        # The rules above take priorities as they are, without ageing.
        assert asyncio.get_running_loop().time() - 1e6 < PRIORITY_AGEING_S

    run_in_virtual_time(main())
