from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffuserve.batching.jobs import Job
from diffuserve.batching.loop import InflightLoop
from diffuserve.batching.policies import POLICIES, Policy, fair
from diffuserve.batching.request_selection import RequestSelection
from diffuserve.batching.selection import InflightSelection
from diffuserve.errors import StageFailed
from diffuserve.samplers import SAMPLERS, NoiseSchedule, advance, initial_state, trajectory
from diffuserve.samplers.noise import Generator
from diffuserve.stages import checked
from diffuserve.stats import Stats
from diffuserve.tensors import UNET
from diffuserve_bench.virtual_time import run_in_virtual_time

SCHEDULE = NoiseSchedule.from_config(
    {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "skip_prk_steps": True}
)
SHAPES = ((4, 8, 8), (4, 8, 12))


@dataclass
class FakeUNet:
    """A row's prediction depends on that row alone, as a UNet's does. A call takes `seconds` of virtual time."""

    seconds: float = 1.0
    on_call: Callable[[int], None] = lambda number: None
    calls: list[tuple[int, ...]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    async def __call__(self, sample: Any, timestep: Any, conditioning: Any) -> Any:
        self.calls.append(sample.shape)
        self.tokens.append(conditioning["encoder_hidden_states"].shape[1])
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.seconds)
            self.on_call(len(self.calls))
            return predict(sample, timestep, conditioning["encoder_hidden_states"])
        finally:
            self.running -= 1


def predict(sample: Any, timestep: Any, hidden: Any) -> Any:
    text = hidden.mean(axis=(1, 2))
    return np.float32(0.4) * np.tanh(sample) + (text * timestep / 1000)[:, None, None, None].astype(np.float32)


def make_job(
    *,
    seed: int = 0,
    steps: int = 4,
    sampler: str = "euler",
    guidance_scale: float = 1.0,
    images: int = 1,
    text: float = 0.3,
    tokens: int = 7,
    **fields: Any,
) -> Job:
    hidden = {"encoder_hidden_states": np.full((tokens, 5), text, np.float32)}
    nothing = {"encoder_hidden_states": np.zeros((tokens, 5), np.float32)}
    return Job(
        trajectory=trajectory(SCHEDULE, sampler, steps),
        shape=fields.pop("shape", SHAPES[0]),
        seeds=[seed + index for index in range(images)],
        conditioning=hidden,
        unconditional=nothing if guidance_scale > 1 else None,
        guidance_scale=guidance_scale,
        priority=fields.pop("priority", 5),
        arrival_s=asyncio.get_running_loop().time(),
        **fields,
    )


def alone(job: Job) -> Any:
    """What the job should give: its images one by one, row by row, with no batching anywhere."""
    latents = []
    for seed in job.seeds:
        generator = Generator(seed)
        state = initial_state(generator.randn(job.shape), job.trajectory)
        for i in range(job.trajectory.evaluations):
            sample = (state[0] * job.trajectory.input_scale[i])[None]
            timestep = job.trajectory.timesteps[i : i + 1]
            output = predict(sample, timestep, job.conditioning["encoder_hidden_states"][None])
            if job.unconditional is not None:
                free = predict(sample, timestep, job.unconditional["encoder_hidden_states"][None])
                output = free + np.float32(job.guidance_scale) * (output - free)
            noise = generator.randn(job.shape) if job.trajectory.draws_noise[i] else np.zeros(job.shape, np.float32)
            state = advance(state[None], output, noise[None], job.trajectory.update[i][None])[0]
        latents.append(state[0])
    return np.stack(latents)


def make_loop(unet: Any, *, max_rows: int = 8, policy: Policy = fair, **options: Any) -> InflightLoop:
    selection = options.pop("selection", None) or InflightSelection(max_rows, policy)
    timeout_s = options.pop("call_timeout_s", 300)
    settings = {"max_active_images": 64, **options}

    async def denoise(*inputs: Any) -> Any:
        return await checked(UNET, unet(*inputs), timeout_s)

    return InflightLoop(denoise, selection, clock=asyncio.get_running_loop().time, **settings)


async def finish(loop: InflightLoop, *waited: Any) -> list[Any]:
    results = await asyncio.gather(*waited, return_exceptions=True)
    assert loop.images_active == 0
    assert loop.rows_left == 0
    await asyncio.sleep(1e6)  # a call that nobody waits for any more may still be in flight
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    return results


def test_rows_of_any_mixture_share_every_call_and_come_out_as_alone() -> None:
    async def main() -> None:
        unet = FakeUNet()
        stats = Stats()
        loop = make_loop(unet, max_rows=64, stats=stats)
        jobs = [
            make_job(
                seed=index,
                steps=3 + index,
                sampler=sampler,
                guidance_scale=guidance,
                images=1 + index % 2,
                text=0.1 * index,
            )
            for index, (sampler, guidance) in enumerate(
                (sampler, guidance) for sampler in SAMPLERS for guidance in (1.0, 5.0)
            )
        ]
        results = await finish(loop, *(loop.denoise(job) for job in jobs))
        for job, latents in zip(jobs, results, strict=True):
            np.testing.assert_allclose(latents, alone(job), rtol=1e-5, atol=1e-5)
        assert len(unet.calls) == max(job.trajectory.evaluations for job in jobs)  # nobody added a call of its own
        assert stats.total("unet_rows") == stats.total("unet_rows_shareable") == sum(job.rows_total for job in jobs)

    run_in_virtual_time(main())


def test_a_request_joins_the_running_batch_at_the_next_step_and_leaves_at_its_own_last() -> None:
    async def main() -> None:
        unet = FakeUNet()
        loop = make_loop(unet)
        long = asyncio.create_task(loop.denoise(make_job(steps=50)))
        await asyncio.sleep(10.5)
        await loop.denoise(make_job(steps=4, seed=1))
        # It arrived in the middle of the long one's eleventh step, and took its own four from the twelfth on.
        assert asyncio.get_running_loop().time() == pytest.approx(15.0)
        await long
        assert asyncio.get_running_loop().time() == pytest.approx(50.0)
        await finish(loop)
        assert [rows for rows, *_ in unet.calls] == [1] * 11 + [2] * 4 + [1] * 35

    run_in_virtual_time(main())


def test_more_latents_than_the_row_budget_take_turns() -> None:
    async def main() -> None:
        unet = FakeUNet()
        loop = make_loop(unet, max_rows=5)
        jobs = [make_job(seed=index, guidance_scale=3.0, steps=5, images=3) for index in range(4)]
        results = await finish(loop, *(loop.denoise(job) for job in jobs))
        for job, latents in zip(jobs, results, strict=True):
            np.testing.assert_allclose(latents, alone(job), rtol=1e-5, atol=1e-5)
        assert max(rows for rows, *_ in unet.calls) == 4  # two guided images: a third would be six rows

    run_in_virtual_time(main())


@pytest.mark.parametrize("policy", POLICIES)
def test_a_short_request_does_not_wait_for_a_long_ones_last_step(policy: str) -> None:
    async def main() -> None:
        loop = make_loop(FakeUNet(), max_rows=4, policy=POLICIES[policy])
        long = asyncio.create_task(loop.denoise(make_job(steps=100, images=3)))
        await asyncio.sleep(1.5)
        started_s = asyncio.get_running_loop().time()
        await loop.denoise(make_job(steps=4))
        assert asyncio.get_running_loop().time() - started_s < 6
        await finish(loop, long)

    run_in_virtual_time(main())


def test_sizes_do_not_mix_and_neither_stands_behind_the_other() -> None:
    async def main() -> None:
        unet = FakeUNet()
        loop = make_loop(unet)
        large = asyncio.create_task(loop.denoise(make_job(steps=50, shape=(4, 8, 12))))
        await asyncio.sleep(5.5)
        await loop.denoise(make_job(steps=5, shape=(4, 8, 8)))
        assert asyncio.get_running_loop().time() <= 5.5 + 11  # every other call is its own
        await finish(loop, large)
        assert {shape[1:] for shape in unet.calls} == {(4, 8, 8), (4, 8, 12)}

    run_in_virtual_time(main())


def test_long_prompts_and_short_ones_are_served_side_by_side() -> None:
    async def main() -> None:
        unet = FakeUNet()
        loop = make_loop(unet)
        jobs = [
            make_job(seed=index, steps=6, guidance_scale=guidance_scale, tokens=tokens, text=0.1 + 0.1 * index)
            for index, (guidance_scale, tokens) in enumerate([(1.0, 7), (3.0, 21), (3.0, 7), (1.0, 21)])
        ]
        results = await finish(loop, *(loop.denoise(job) for job in jobs))
        for job, latents in zip(jobs, results, strict=True):
            np.testing.assert_allclose(latents, alone(job), rtol=1e-5, atol=1e-5)
        assert [rows for rows, *_ in unet.calls] == [3] * 12  # prompts of one length share every call
        assert sorted(unet.tokens) == [7] * 6 + [21] * 6

        long = [asyncio.create_task(loop.denoise(make_job(steps=50, tokens=21, seed=index))) for index in range(2)]
        await asyncio.sleep(5.5)
        started_s = asyncio.get_running_loop().time()
        await loop.denoise(make_job(steps=5))
        # It has a call in three: the time is shared by the images of each shape.
        assert asyncio.get_running_loop().time() - started_s <= 5 * 3 + 2
        await finish(loop, *long)

    run_in_virtual_time(main())


def test_rows_agree_on_all_conditioning_or_do_not_share_a_call() -> None:
    async def main() -> None:
        pooled, wider = make_job(), make_job()
        pooled.conditioning = {**pooled.conditioning, "text_embeds": np.zeros(3, np.float32)}
        wider.conditioning = {**wider.conditioning, "text_embeds": np.zeros(4, np.float32)}
        other = make_job()  # an input of the same shape under another name
        other.conditioning = {**other.conditioning, "image_embeds": np.zeros(3, np.float32)}
        different = [make_job(), make_job(tokens=14), make_job(shape=SHAPES[1]), pooled, wider, other]
        assert len({job.batch_key for job in different}) == len(different)
        again = make_job(seed=5, text=0.7, guidance_scale=3.0, sampler="ddim")
        assert again.batch_key == different[0].batch_key
        reordered = make_job()
        reordered.conditioning = dict(reversed(pooled.conditioning.items()))
        assert reordered.batch_key == pooled.batch_key

    run_in_virtual_time(main())


def test_the_more_urgent_goes_first_and_the_other_is_not_starved() -> None:
    async def main() -> None:
        loop = make_loop(FakeUNet(), max_rows=1)
        clock = asyncio.get_running_loop().time
        low_steps_s: list[float] = []
        low = make_job(priority=9, steps=2, on_step=lambda step, _: low_steps_s.append(clock()))
        urgent = [make_job(priority=0, steps=10, seed=index) for index in range(30)]
        await finish(loop, *(loop.denoise(job) for job in [low, *urgent]))
        # Its level gains one for every ten seconds in which nothing of it has run, and is nine behind.
        assert low_steps_s == pytest.approx([91, 182], abs=2)

    run_in_virtual_time(main())


def test_one_client_with_many_requests_does_not_starve_another_with_one() -> None:
    async def main() -> None:
        loop = make_loop(FakeUNet(), max_rows=4)
        many = [
            asyncio.create_task(loop.denoise(make_job(steps=10, seed=index, client_id="many"))) for index in range(40)
        ]
        await asyncio.sleep(20.5)
        started_s = asyncio.get_running_loop().time()
        await loop.denoise(make_job(steps=10, client_id="one"))
        assert asyncio.get_running_loop().time() - started_s < 12  # a row in every call from the next one on
        await finish(loop, *many)

    run_in_virtual_time(main())


@pytest.mark.parametrize("together", [True, False])
def test_the_baselines_run_whole_requests(together: bool) -> None:
    async def main() -> None:
        unet = FakeUNet()
        loop = make_loop(unet, selection=RequestSelection(8, together=together))
        alike = [make_job(seed=index, steps=5, guidance_scale=3.0) for index in range(3)]
        others = [
            make_job(seed=9, steps=7, guidance_scale=3.0),
            make_job(seed=10, steps=5, guidance_scale=3.0, tokens=14),
        ]
        results = await finish(loop, *(loop.denoise(job) for job in [*alike, *others]))
        for job, latents in zip([*alike, *others], results, strict=True):
            np.testing.assert_allclose(latents, alone(job), rtol=1e-5, atol=1e-5)
        expected = [6] * 5 + [2] * 7 + [2] * 5 if together else [2] * 27
        assert [rows for rows, *_ in unet.calls] == expected

    run_in_virtual_time(main())


def test_a_cancelled_request_frees_its_rows_at_the_next_step() -> None:
    async def main() -> None:
        unet = FakeUNet()
        loop = make_loop(unet)
        tasks = [asyncio.create_task(loop.denoise(make_job(steps=20, seed=index))) for index in range(3)]
        await asyncio.sleep(4.5)
        tasks[1].cancel()
        results = await finish(loop, *tasks)
        assert isinstance(results[1], asyncio.CancelledError)
        assert [rows for rows, *_ in unet.calls] == [3] * 5 + [2] * 15

    run_in_virtual_time(main())


def test_a_waiting_request_can_be_cancelled_too() -> None:
    async def main() -> None:
        loop = make_loop(FakeUNet(), max_active_images=1)
        running = asyncio.create_task(loop.denoise(make_job(steps=10)))
        waiting = asyncio.create_task(loop.denoise(make_job(steps=10, seed=1)))
        await asyncio.sleep(2.5)
        waiting.cancel()
        await running
        assert asyncio.get_running_loop().time() == pytest.approx(10.0)
        await finish(loop, waiting)

    run_in_virtual_time(main())


def broken_unets() -> dict[str, Callable[[Any], Any]]:
    def raises(prediction: Any) -> Any:
        raise RuntimeError("out of memory")

    return {
        "raises": raises,
        "nan": lambda prediction: np.full_like(prediction, np.nan),
        "shape": lambda prediction: prediction[:, :2],
    }


@pytest.mark.parametrize("failure", broken_unets())
def test_a_failing_call_fails_the_requests_in_it_and_the_loop_goes_on(failure: str) -> None:
    break_prediction = broken_unets()[failure]

    async def main() -> None:
        class Breaking(FakeUNet):
            async def __call__(self, sample: Any, timestep: Any, conditioning: Any) -> Any:
                prediction = await super().__call__(sample, timestep, conditioning)
                return break_prediction(prediction) if len(self.calls) == 3 else prediction

        loop = make_loop(Breaking())
        first = [asyncio.create_task(loop.denoise(make_job(steps=5, seed=index))) for index in range(2)]
        await asyncio.sleep(2.5)  # the third call is under way
        later = make_job(steps=5, seed=9)
        results = await finish(loop, *first, loop.denoise(later))
        assert all(isinstance(result, StageFailed) for result in results[:2])
        np.testing.assert_allclose(results[2], alone(later), rtol=1e-5, atol=1e-5)

    run_in_virtual_time(main())


def test_one_rows_nan_fails_that_request_only() -> None:
    async def main() -> None:
        class Poisoned(FakeUNet):
            async def __call__(self, sample: Any, timestep: Any, conditioning: Any) -> Any:
                prediction = await super().__call__(sample, timestep, conditioning)
                prediction[conditioning["encoder_hidden_states"][:, 0, 0] == np.float32(0.5)] = np.inf
                return prediction

        loop = make_loop(Poisoned())
        jobs = [make_job(seed=index, text=text) for index, text in enumerate((0.2, 0.5, 0.7))]
        results = await finish(loop, *(loop.denoise(job) for job in jobs))
        assert isinstance(results[1], StageFailed)
        for index in (0, 2):
            np.testing.assert_allclose(results[index], alone(jobs[index]), rtol=1e-5, atol=1e-5)

    run_in_virtual_time(main())


def test_a_loop_that_dies_fails_what_it_had_and_starts_again() -> None:
    async def main() -> None:
        loop = make_loop(FakeUNet(), policy=lambda job, now_s: job.seeds[0].bit_length() if job.seeds != [13] else None)
        first = [asyncio.create_task(loop.denoise(make_job(seed=seed, steps=9))) for seed in (1, 2)]
        await asyncio.sleep(1.5)
        unlucky = loop.denoise(make_job(seed=13))  # the order of None and a number is not defined
        results = await asyncio.gather(*first, unlucky, return_exceptions=True)
        assert all(isinstance(result, StageFailed) for result in results)
        later = make_job(seed=3)
        [latents] = await finish(loop, loop.denoise(later))
        np.testing.assert_allclose(latents, alone(later), rtol=1e-5, atol=1e-5)

    run_in_virtual_time(main())


def test_a_hung_call_is_given_up() -> None:
    async def main() -> None:
        class Hanging(FakeUNet):
            async def __call__(self, sample: Any, timestep: Any, conditioning: Any) -> Any:
                if not self.calls:
                    self.seconds = 1e6
                prediction = await super().__call__(sample, timestep, conditioning)
                return prediction

        unet = Hanging()
        loop = make_loop(unet, call_timeout_s=30)
        hung = asyncio.create_task(loop.denoise(make_job()))
        await asyncio.sleep(1)
        unet.seconds = 1.0
        later = make_job(seed=1)
        results = await finish(loop, hung, loop.denoise(later))
        assert isinstance(results[0], StageFailed)
        assert "30 s" in str(results[0])
        np.testing.assert_allclose(results[1], alone(later), rtol=1e-5, atol=1e-5)

    run_in_virtual_time(main())


def test_steps_and_previews_are_reported_once_and_in_order() -> None:
    async def main() -> None:
        seen: list[tuple[int, Any]] = []
        loop = make_loop(FakeUNet(), max_rows=2)
        job = make_job(steps=6, images=3, preview_every=2, on_step=lambda step, denoised: seen.append((step, denoised)))
        [latents] = await finish(loop, loop.denoise(job))
        assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6]
        assert [step for step, denoised in seen if denoised is not None] == [2, 4, 6]
        assert all(denoised.shape == latents.shape for _, denoised in seen if denoised is not None)
        # Euler's last step goes to sigma 0, which is the estimate itself.
        np.testing.assert_allclose(seen[-1][1], latents, rtol=1e-4, atol=1e-4)

    run_in_virtual_time(main())


def test_instances_each_have_a_call_in_flight() -> None:
    async def main() -> None:
        unet = FakeUNet()
        loop = make_loop(unet, max_rows=2, instances=2)
        jobs = [make_job(seed=index, guidance_scale=2.0) for index in range(6)]
        results = await finish(loop, *(loop.denoise(job) for job in jobs))
        for job, latents in zip(jobs, results, strict=True):
            np.testing.assert_allclose(latents, alone(job), rtol=1e-5, atol=1e-5)
        assert unet.most_running == 2

    run_in_virtual_time(main())


@st.composite
def arrivals(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "at_s": draw(st.floats(0, 30)),
        "steps": draw(st.integers(1, 12)),
        "sampler": draw(st.sampled_from(sorted(SAMPLERS))),
        "guidance_scale": draw(st.sampled_from((1.0, 4.0))),
        "images": draw(st.integers(1, 3)),
        "shape": draw(st.sampled_from(SHAPES)),
        "tokens": draw(st.sampled_from((7, 14))),
        "priority": draw(st.integers(0, 9)),
        "cancel_after_s": draw(st.none() | st.floats(0, 20)),
    }


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    requests=st.lists(arrivals(), min_size=1, max_size=12),
    failing_calls=st.sets(st.integers(1, 40), max_size=3),
    policy=st.sampled_from(sorted(POLICIES)),
    max_rows=st.integers(2, 9),
    max_active_images=st.integers(1, 8),
    instances=st.integers(1, 3),
)
def test_whatever_arrives_is_answered_once(
    requests: list[dict[str, Any]],
    failing_calls: set[int],
    policy: str,
    max_rows: int,
    max_active_images: int,
    instances: int,
) -> None:
    def fail(call: int) -> None:
        if call in failing_calls:
            raise StageFailed("injected")

    async def main() -> None:
        unet = FakeUNet(on_call=fail)
        loop = make_loop(
            unet, max_rows=max_rows, max_active_images=max_active_images, policy=POLICIES[policy], instances=instances
        )

        async def one(request: dict[str, Any]) -> None:
            fields = dict(request)
            at_s, cancel_after_s = fields.pop("at_s"), fields.pop("cancel_after_s")
            await asyncio.sleep(at_s)
            steps_seen: list[int] = []
            job = make_job(**fields, on_step=lambda step, _: steps_seen.append(step))
            try:
                latents = await asyncio.wait_for(loop.denoise(job), cancel_after_s)
            except TimeoutError:
                assert cancel_after_s is not None
            except StageFailed as error:
                assert failing_calls, error
            else:
                np.testing.assert_allclose(latents, alone(job), rtol=1e-4, atol=1e-4)
                assert steps_seen == list(range(1, fields["steps"] + 1))

        results = await finish(loop, *(one(request) for request in requests))
        assert results == [None] * len(requests)
        assert all(rows <= max_rows for rows, *_ in unet.calls)
        assert unet.most_running <= instances

    run_in_virtual_time(main())
