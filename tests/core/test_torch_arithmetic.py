"""The loop's arithmetic by PyTorch against NumPy's, on the CPU, on a device that counts, and on a GPU if there is one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest

from diffuserve.batching.arithmetic import Advanced, Arithmetic
from diffuserve.batching.jobs import Job, Latent
from diffuserve.batching.loop import InflightLoop
from diffuserve.batching.numpy_arithmetic import NumpyArithmetic
from diffuserve.batching.policies import fair
from diffuserve.batching.selection import InflightSelection
from diffuserve.engines.gpu import gpu_architectures
from diffuserve.errors import StageFailed
from diffuserve.samplers import SAMPLERS, NoiseSchedule, initial_state, noised_state, trajectory
from diffuserve.samplers.noise import Generator

torch = pytest.importorskip("torch")

from diffuserve.batching.torch_arithmetic import TorchArithmetic  # noqa: E402
from diffuserve.batching.torch_transfers import TorchTransfers  # noqa: E402
from tests.core.counted_device import DEVICE, CountedDevice, DeviceTensor  # noqa: E402

SCHEDULE = NoiseSchedule.from_config(
    {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "skip_prk_steps": True}
)
SHAPE = (4, 8, 8)
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not gpu_architectures(), reason="needs an NVIDIA GPU")]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])


def by_torch(device: str, timeout_s: float = 60) -> TorchArithmetic:
    return TorchArithmetic(TorchTransfers(torch.device(device), timeout_s))


def make_job(
    sampler: str = "euler",
    *,
    guidance_scale: float = 1.0,
    steps: int = 4,
    start: int = 0,
    seed: int = 0,
    text: float = 0.3,
    tokens: int = 7,
    **fields: Any,
) -> Job:
    return Job(
        trajectory=trajectory(SCHEDULE, sampler, steps, start),
        shape=fields.pop("shape", SHAPE),
        seeds=fields.pop("seeds", [seed]),
        conditioning={"encoder_hidden_states": np.full((tokens, 5), text, np.float32)},
        unconditional={"encoder_hidden_states": np.zeros((tokens, 5), np.float32)} if guidance_scale > 1 else None,
        guidance_scale=guidance_scale,
        priority=5,
        arrival_s=0,
        **fields,
    )


def predict(sample: Any, timestep: Any, text: Any) -> Any:
    """A UNet whose rows depend on nothing else, by NumPy."""
    output: Any = np.float32(0.4) * np.tanh(sample) + (text * timestep / 1000)[:, None, None, None].astype(np.float32)
    return output


Denoise = Callable[[Any, Any, Any], Awaitable[Any]]


async def numpy_unet(sample: Any, timestep: Any, conditioning: Any) -> Any:
    return predict(sample, timestep, conditioning["encoder_hidden_states"].mean(axis=(1, 2)))


async def torch_unet(sample: Any, timestep: Any, conditioning: Any) -> Any:
    """The same on the device: nothing but tensors there comes in."""
    hidden = conditioning["encoder_hidden_states"]
    assert sample.device == timestep.device == hidden.device
    output = predict(*(np.asarray(each.cpu()) for each in (sample, timestep)), np.asarray(hidden.cpu()).mean((1, 2)))
    return torch.from_numpy(output).to(sample.device)


def draw(
    arithmetic: Arithmetic, unet: Denoise, make_jobs: Callable[[], Sequence[Job]], max_rows: int = 64
) -> list[Any]:
    """The latents of each job, on the host, or its exception."""

    async def main() -> list[Any]:
        loop = InflightLoop(unet, InflightSelection(max_rows, fair), arithmetic=arithmetic, max_active_images=64)
        results = await asyncio.gather(*map(loop.denoise, make_jobs()), return_exceptions=True)
        await loop.close()
        return [each if isinstance(each, np.ndarray | Exception) else each.cpu().numpy() for each in results]

    return asyncio.run(main())


def close(actual: Any, expected: Any) -> bool:
    """To within float32's rounding, over all steps."""
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    return bool((actual.shape, actual.dtype) == (expected.shape, expected.dtype) and error < 2e-6)


@devices
@pytest.mark.parametrize("max_rows", [64, 3])
def test_every_sampler_with_guidance_and_without_in_one_loop(device: str, max_rows: int) -> None:
    def jobs() -> list[Job]:
        return [
            make_job(
                sampler, guidance_scale=guidance, steps=5 + index % 3, seed=index, text=index / 10, seeds=[index, 100]
            )
            for index, sampler in enumerate(SAMPLERS)
            for guidance in (1.0, 7.5)
        ]

    expected = draw(NumpyArithmetic(), numpy_unet, jobs, max_rows)
    for actual, latents in zip(draw(by_torch(device), torch_unet, jobs, max_rows), expected, strict=True):
        assert close(actual, latents)


def latents_of(arithmetic: Arithmetic, image: bool = False) -> list[Latent]:
    """Of every sampler, at different steps, some guided, over an image or nothing; the last two not finite."""
    random = np.random.default_rng(0)
    latents = []
    for index, sampler in enumerate([*SAMPLERS, "ddim", "heun"]):
        job = make_job(sampler, guidance_scale=1 + index % 3, steps=6, start=index % 2, preview_every=1 + index % 2)
        generator = Generator(index)
        noise = generator.randn(SHAPE)
        picture = random.standard_normal(SHAPE, dtype=np.float32)
        state = noised_state(picture, noise, job.trajectory) if image else initial_state(noise, job.trajectory)
        state[1:] = random.standard_normal(state[1:].shape)
        if index >= len(SAMPLERS):
            state[-1, 1, 2, 3] = np.nan if index % 2 else np.inf
        job.conditioning = {name: arithmetic.place(array) for name, array in job.conditioning.items()}
        if job.unconditional is not None:
            job.unconditional = {name: arithmetic.place(array) for name, array in job.unconditional.items()}
        latents.append(Latent(job, arithmetic.place(state), generator, position=index % 4))
    return latents


ALL = range(len(SAMPLERS) + 2)


def advanced(
    arithmetic: Arithmetic, unet: Denoise, rows: Sequence[int] = ALL, *, image: bool = False
) -> list[Advanced | None]:
    """What a step makes of some of `latents_of`."""

    async def main() -> list[Advanced | None]:
        latents = latents_of(arithmetic, image)
        step = arithmetic.step([latents[row] for row in rows])
        return await step.advance(await unet(*step.unet_inputs()))

    return asyncio.run(main())


def on_host(result: Advanced | None) -> tuple[Any, Any]:
    if result is None:
        return None, None
    state = result.state if isinstance(result.state, np.ndarray) else result.state.cpu().numpy()
    return state, result.denoised


@devices
@pytest.mark.parametrize("image", [False, True])
def test_one_step_of_any_mixture(device: str, image: bool) -> None:
    expected = advanced(NumpyArithmetic(), numpy_unet, image=image)
    results = advanced(by_torch(device), torch_unet, image=image)
    assert [result is None for result in results] == [False] * len(SAMPLERS) + [True] * 2
    for result, other in zip(results[: len(SAMPLERS)], expected[: len(SAMPLERS)], strict=True):
        (state, denoised), (known_state, known_denoised) = on_host(result), on_host(other)
        assert close(state, known_state)
        assert (denoised is None) == (known_denoised is None)
        assert denoised is None or close(denoised, known_denoised)
    assert any(result and result.denoised is not None for result in results)


@devices
def test_a_latent_does_not_depend_on_the_others_to_the_last_bit(device: str) -> None:
    arithmetic = by_torch(device)
    together = [on_host(each) for each in advanced(arithmetic, torch_unet)]
    for others in ([], [2, 7], [9, 0, 12, 4], [11, 5]):
        for row in range(len(SAMPLERS)):
            batch = [other for other in others if other != row]
            batch.insert(len(batch) // 2, row)
            state, denoised = on_host(advanced(arithmetic, torch_unet, batch)[batch.index(row)])
            assert state.tobytes() == together[row][0].tobytes()
            assert (denoised is None) == (together[row][1] is None)
            assert denoised is None or denoised.tobytes() == together[row][1].tobytes()


@devices
def test_a_state_has_its_own_memory(device: str) -> None:
    for result in advanced(by_torch(device), torch_unet):
        if result is not None:
            assert result.state.untyped_storage().nbytes() == result.state.nbytes


@devices
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_fails_its_own_request(device: str, value: float) -> None:
    async def poisoned(sample: Any, timestep: Any, conditioning: Any) -> Any:
        output = await torch_unet(sample, timestep, conditioning)
        spoilt = conditioning["encoder_hidden_states"][:, 0, 0] == torch.tensor(0.5)
        output[spoilt, 3, 7, 7] = value
        return output

    def jobs() -> list[Job]:
        kinds = [("euler", 0.2, 1.0), ("ddim", 0.5, 1.0), ("pndm", 0.7, 4.0), ("unipc", 0.5, 4.0), ("lcm", 0.1, 1.0)]
        return [make_job(sampler, text=text, guidance_scale=scale) for sampler, text, scale in kinds]

    expected = draw(NumpyArithmetic(), numpy_unet, jobs)
    for row, (actual, latents) in enumerate(zip(draw(by_torch(device), poisoned, jobs), expected, strict=True)):
        if row in (1, 3):
            assert isinstance(actual, StageFailed)
            assert "not finite" in str(actual)
        else:
            assert close(actual, latents)


@devices
@pytest.mark.parametrize("change", [lambda output: output[:, :2], lambda output: output.double()])
def test_an_output_of_another_kind_is_refused(device: str, change: Callable[[Any], Any]) -> None:
    async def other(*inputs: Any) -> Any:
        return change(await torch_unet(*inputs))

    [refused] = draw(by_torch(device), other, lambda: [make_job()])
    assert isinstance(refused, StageFailed)
    assert "where float32 (1, 4, 8, 8) was expected" in str(refused)


@devices
def test_previews_are_those_of_numpy(device: str) -> None:
    def seen_by(arithmetic: Arithmetic, unet: Denoise) -> list[Any]:
        seen: list[Any] = []
        preview = {"preview_every": 2, "on_step": lambda step, denoised: seen.append((step, denoised))}
        draw(arithmetic, unet, lambda: [make_job("heun", steps=5, seeds=[1, 2], **preview), make_job("lcm")], 2)
        return seen

    expected = seen_by(NumpyArithmetic(), numpy_unet)
    actual = seen_by(by_torch(device), torch_unet)
    assert [step for step, _ in actual] == [1, 2, 3, 4, 5]
    for (step, denoised), (known_step, known) in zip(actual, expected, strict=True):
        assert step == known_step
        assert (denoised is None) == (known is None)
        assert denoised is None or close(denoised, known)


async def device_unet(sample: Any, timestep: Any, conditioning: Any) -> Any:
    text = conditioning["encoder_hidden_states"].mean(dim=(1, 2))
    return 0.4 * torch.tanh(sample) + (text * timestep / 1000)[:, None, None, None]


def crossed(
    sampler: str, side: int, *, tokens: int = 7, steps: int = 6, rows: int = 3
) -> tuple[CountedDevice, list[Any]]:
    """What a loop of `rows` requests has moved until its latents are done."""
    device = CountedDevice()
    done: list[Any] = []

    async def main() -> None:
        arithmetic = TorchArithmetic(TorchTransfers(DEVICE, 60))
        loop = InflightLoop(device_unet, InflightSelection(64, fair), arithmetic=arithmetic, max_active_images=64)
        jobs = [
            make_job(sampler, seed=seed, steps=steps, guidance_scale=1 + seed, shape=(4, side, side), tokens=tokens)
            for seed in range(rows)
        ]
        done.extend(await asyncio.gather(*map(loop.denoise, jobs)))
        await loop.close()

    with device:
        asyncio.run(main())
    return device, done


def test_a_step_moves_a_few_numbers_and_not_the_latents() -> None:
    small, latents = crossed("unipc", 8)
    assert all(isinstance(each, DeviceTensor) for each in latents)
    large, _ = crossed("unipc", 32, tokens=14)
    steps, rows, slots = 6, 3, 3
    for device, side, tokens in ((small, 8, 7), (large, 32, 14)):
        # At the start, of each request the state, the prompt and, with guidance, the negative prompt.
        started = [4 * slots * 4 * side * side] * rows + [4 * tokens * 5] * (2 * rows - 1)
        assert sorted(device.to_device[: len(started)]) == sorted(started)
        # At each step, of 5 rows for 3 latents: timesteps, input scales, 2 guidance scales, a matrix for each latent.
        assert device.to_device[len(started) :] == [4 * (5 + 5 + 2 + rows * slots * (slots + 2))] * steps
        assert device.to_host == [4 * rows] * steps  # which rows are finite
    assert small.calls == large.calls
    # The UNet's are six. Products of matrices would sum in an order that depends on how many rows there are.
    assert len(small.calls) / steps < 6 + 20
    assert not {"mm", "bmm", "addmm", "baddbmm", "sum", "mv", "dot"} & {*small.calls}


def test_noise_crosses_only_where_it_is_drawn() -> None:
    device, _ = crossed("euler_a", 8)
    latent = 4 * 4 * 8 * 8
    assert device.to_device.count(3 * latent) == 5  # all steps but the last
    assert sum(device.to_host) == 6 * 3 * 4


def test_a_device_takes_what_numpy_makes() -> None:
    _, latents = crossed("dpmpp_2m_sde", 8)
    expected = draw(
        NumpyArithmetic(),
        numpy_unet,
        lambda: [make_job("dpmpp_2m_sde", seed=seed, steps=6, guidance_scale=1 + seed) for seed in range(3)],
    )
    for each, known in zip(latents, expected, strict=True):
        assert close(each.held.numpy(), known)


@pytest.fixture
def held_gpu(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The CPU in the place of a GPU, whose work is done when the event is set."""
    finished = threading.Event()

    class Recorded:
        def record(self, stream: object) -> None:
            pass

        def synchronize(self) -> None:
            assert finished.wait(60)

    def unpinned(*shape: Any, pin_memory: bool = False, empty: Any = torch.empty, **options: Any) -> Any:
        return empty(*shape, **options)

    monkeypatch.setattr(torch.cuda, "Event", Recorded)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch, "empty", unpinned)
    return finished


def on_held_gpu(timeout_s: float) -> TorchTransfers:
    transfers = TorchTransfers(torch.device("cpu"), timeout_s)
    transfers._pinned = True
    return transfers


def test_others_go_on_while_a_step_waits(held_gpu: threading.Event) -> None:
    async def main() -> list[Any]:
        fetched = asyncio.create_task(on_held_gpu(60).fetch(torch.ones(2)))
        await asyncio.sleep(0)
        assert not fetched.done()
        held_gpu.set()
        return await fetched

    [ones] = asyncio.run(main())
    assert ones.tolist() == [1, 1]


def test_a_device_that_hangs_fails_the_call(held_gpu: threading.Event) -> None:
    async def main() -> None:
        try:
            await on_held_gpu(0.01).fetch(torch.ones(2))
        finally:
            held_gpu.set()

    with pytest.raises(StageFailed, match=r"gave no answer in time; a call may take 0\.01 s"):
        asyncio.run(main())


@pytest.mark.gpu
@pytest.mark.skipif(not gpu_architectures(), reason="needs an NVIDIA GPU")
def test_a_step_waits_for_the_gpu_once() -> None:
    """PyTorch raises where anything else would wait."""

    async def main() -> None:
        arithmetic = by_torch("cuda")
        for _ in range(2):
            step = arithmetic.step(latents_of(arithmetic))
            output = await device_unet(*step.unet_inputs())
            torch.cuda._sleep(200_000_000)
            await step.advance(output)

    torch.cuda.set_sync_debug_mode("error")
    try:
        asyncio.run(main())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not gpu_architectures(), reason="needs an NVIDIA GPU")
def test_a_gpu_that_hangs_fails_the_call() -> None:
    async def slow(*inputs: Any) -> Any:
        torch.cuda._sleep(4_000_000_000)  # cycles: seconds
        return await device_unet(*inputs)

    [failed] = draw(by_torch("cuda", timeout_s=0.05), slow, lambda: [make_job()])
    assert isinstance(failed, StageFailed)
    assert "The stage unet gave no answer in time" in str(failed)
    [latents] = draw(by_torch("cuda"), device_unet, lambda: [make_job()])
    assert np.isfinite(latents).all()
