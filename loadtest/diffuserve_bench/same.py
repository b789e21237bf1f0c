"""An image does not depend on its company: random requests drawn together, against the same drawn alone."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.bundle.manifest import ModelSpec, read_manifest
from diffuserve.samplers import SAMPLERS
from diffuserve.trials.similarity import psnr_db
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.launcher import TritonServer
from diffuserve_bench.mixture import PROMPT, sizes_of
from diffuserve_client import AsyncClient
from diffuserve_loadtest.report.report import Plot, Report, Table
from diffuserve_loadtest.report.summary import summarise

_STEPS = (4, 20)  # some checkpoints' pndm takes at least 4
_IDENTICAL_DB = 100.0


def measure_same(bundle: Path, repository: Path, *, requests: int, in_flight: int) -> Report:
    """Draws every request together with `in_flight` - 1 others, and again with the server to itself."""
    fields = random_requests(read_manifest(bundle).model, requests, seed=0)
    with TritonServer(repository, TritonAddress.on_free_ports()) as server:
        together = asyncio.run(_draw(server, fields, in_flight))
        alone = asyncio.run(_draw(server, fields, 1))
    figures_db = [psnr_db(one, other) for one, other in zip(together, alone, strict=True)]
    finite_db = [figure for figure in figures_db if math.isfinite(figure)]
    identical = 1 - len(finite_db) / len(figures_db)
    least = f"{min(finite_db):.1f}" if finite_db else "-"
    median = f"{summarise(finite_db).p50:.1f}" if finite_db else "-"
    return Report(
        "same",
        {"bundle": str(bundle), "requests": requests, "in_flight": in_flight},
        {
            "identical": identical,
            "least_db": min(finite_db, default=None),
            "images": [
                {**request, "psnr_db": figure if math.isfinite(figure) else None}
                for request, figure in zip(fields, figures_db, strict=True)
            ],
        },
        [
            Table(
                f"{requests} requests, {in_flight} in flight, against alone",
                ("identical to the byte", "least PSNR of the others, dB", "their median"),
                [(f"{identical:.1%}", least, median)],
            )
        ],
        plots={"psnr": _plot(figures_db)},
    )


def _plot(figures_db: Sequence[float]) -> Plot:
    ranked = [(rank, min(figure, _IDENTICAL_DB)) for rank, figure in enumerate(sorted(figures_db), 1)]
    label = f"PSNR, dB; identical to the byte is drawn at {_IDENTICAL_DB:g}"
    return Plot({"in a batch against alone": ranked}, "images, the worst first", label)


def random_requests(model: ModelSpec, count: int, seed: int) -> list[dict[str, Any]]:
    """Requests that agree on nothing, with every sampler and two sizes."""
    choose = random.Random(seed)  # noqa: S311 - a load, no secret
    requests = []
    for number in range(count):
        width, height = choose.choice(sizes_of(model))
        requests.append(
            {
                "prompt": f"{PROMPT}, number {number}",
                "negative_prompt": choose.choice(("", "blurry")),
                "steps": choose.randint(*_STEPS),
                "guidance_scale": choose.choice((1.0, 3.0, 5.0, 7.5)),
                "sampler": choose.choice(sorted(SAMPLERS)),
                "seed": choose.randrange(2**32),
                "width": width,
                "height": height,
            }
        )
    return requests


async def _draw(server: TritonServer, requests: Sequence[dict[str, Any]], in_flight: int) -> list[NDArray[np.uint8]]:
    """Every request's pixels, flat, in the requests' order."""
    room = asyncio.Semaphore(in_flight)
    async with AsyncClient(server.address.grpc) as client:

        async def one(fields: dict[str, Any]) -> NDArray[np.uint8]:
            async with room:
                return np.frombuffer((await client.generate(**fields, format="raw")).encoded[0], np.uint8)

        return list(await asyncio.gather(*(one(fields) for fields in requests)))
