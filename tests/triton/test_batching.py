"""What in-flight batching promises, on the real server."""

from __future__ import annotations

import itertools
import math
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from diffuserve.bundle.manifest import read_manifest
from diffuserve.samplers import SAMPLERS, NoiseSchedule, trajectory
from diffuserve.trials.similarity import psnr_db
from diffuserve.triton.launcher import TritonServer
from diffuserve_client import Client
from tests.gate import Gate
from tests.metrics import COUNTING, counted, read_metrics, waiting_and_running
from tests.waiting import wait_for, wait_until


def mixed_requests(count: int, sizes: tuple[tuple[int, int], ...]) -> list[dict[str, Any]]:
    """Requests that agree on nothing."""
    choose = random.Random(3)  # noqa: S311 - test data
    samplers, guidance = itertools.cycle(SAMPLERS), itertools.cycle((1.0, 3.0, 5.0, 7.5))
    return [
        {
            "prompt": choose.choice(("a red heart, flat", "a rocket, glossy", "an apple", "")),
            "steps": choose.randint(4, 16),
            "sampler": next(samplers),
            "guidance_scale": next(guidance),
            "seed": choose.randrange(2**32),
            "width": sizes[index % len(sizes)][0],
            "height": sizes[index % len(sizes)][1],
        }
        for index in range(count)
    ]


def generate_all(client: Client, requests: list[dict[str, Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda request: client.generate(**request, format="raw").images[0], requests))


def test_an_image_does_not_depend_on_its_company(client: Client) -> None:
    requests = mixed_requests(8, ((128, 128), (96, 64)))
    alone = [client.generate(**request, format="raw").images[0] for request in requests]
    together = generate_all(client, requests)
    figures = [psnr_db(image, reference) for image, reference in zip(together, alone, strict=True)]
    identical = sum(math.isinf(figure) for figure in figures)
    print(f"{identical} of {len(figures)} identical to the byte, least PSNR {min(figures):.1f} dB")
    assert min(figures) >= 50


def test_mixed_requests_share_the_unets_calls(client: Client, server: TritonServer, bundle: Path, gate: Gate) -> None:
    schedule = NoiseSchedule.from_config(read_manifest(bundle).scheduler)

    def rows(request: dict[str, Any]) -> int:
        evaluations = trajectory(schedule, request["sampler"], request["steps"]).evaluations
        return evaluations * (1 + (request["guidance_scale"] > 1))

    requests = mixed_requests(16, ((128, 128),))
    before = counted(server.address, client, gate)
    with gate.closed(), ThreadPoolExecutor(1) as pool:
        together = pool.submit(generate_all, client, requests)
        wait_for([len(requests), 0], lambda: waiting_and_running(server.address))
        gate.open()
        together.result()
    after = counted(server.address, client, gate)
    used = {name: after[name] - before[name] for name in ("unet_rows", "unet_calls", "unet_rows_shareable")}
    mean_batch = used["unet_rows"] / used["unet_calls"]
    share = used["unet_rows"] / used["unet_rows_shareable"]
    print(
        f"mean UNet batch {mean_batch:.2f} rows over {used['unet_calls']:.0f} calls; "
        f"{share:.1%} of the rows that could share did"
    )
    assert used["unet_rows"] == sum(map(rows, requests)) + COUNTING
    assert mean_batch > 6
    assert share >= 0.95
    # Triton counts the same, a moment after its answers.
    figures = ("nv_inference_count", "unet"), ("nv_inference_exec_count", "unet")
    wait_for(
        [after["unet_rows"] + COUNTING, gate.came],
        lambda: [read_metrics(server.address.metrics)[figure] for figure in figures],
    )


def test_a_short_request_overtakes_a_long_one(client: Client, server: TritonServer, gate: Gate) -> None:
    with gate.closed(), ThreadPoolExecutor(2) as pool:
        long = pool.submit(client.generate, "a rocket", steps=80)
        wait_until(lambda: gate.holds)
        short = pool.submit(client.generate, "a rocket", steps=3)
        wait_for([2, 0], lambda: waiting_and_running(server.address))
        gate.close(after=8)  # far fewer than the long one needs
        assert short.result().images
        assert not long.done()
        gate.open()
        assert long.result().denoise_s > 0


def test_cancelling_frees_the_rows(client: Client, server: TritonServer, gate: Gate) -> None:
    with gate.closed(after=2):
        events = client.stream("a rocket", steps=150, num_images=8)
        for event in events:
            if event.step == 2:  # type: ignore[union-attr]
                break
        wait_for([0, 1], lambda: waiting_and_running(server.address))
        events.close()
        wait_for([0, 0], lambda: waiting_and_running(server.address))


def test_images_of_one_request_have_seeds_of_their_own(client: Client) -> None:
    several = client.generate("an apple", num_images=3, seed=2**32 - 2, steps=4, format="raw")
    assert several.seeds == [2**32 - 2, 2**32 - 1, 0]
    for seed, image in zip(several.seeds, several.images, strict=True):
        single = client.generate("an apple", seed=seed, steps=4, format="raw").images[0]
        assert psnr_db(image, single) >= 50
