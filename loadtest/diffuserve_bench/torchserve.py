"""Our handler on TorchServe, against one that calls diffusers' pipeline for the whole batch; and its memory, against that
of the same bundle on Triton.

Both TorchServes run all the time and take turns, so that the machine's slow spells fall on both.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from diffuserve.bundle.manifest import read_manifest
from diffuserve.serving.http import open_url
from diffuserve.tensors import STABLE_DIFFUSION, VAE_ENCODER
from diffuserve.torchserve.address import TorchServeAddress
from diffuserve.torchserve.keys import read_inference_token
from diffuserve.torchserve.launcher import TorchServeServer
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.launcher import TritonServer
from diffuserve.triton.placement import VERSION
from diffuserve_bench.mixture import GUIDANCE_SCALE, PROMPT, SAMPLER
from diffuserve_client import Client
from diffuserve_loadtest.report.report import Report, Table
from diffuserve_loadtest.server.archives import archive_with_handler
from diffuserve_loadtest.server.watch import processes_of


def measure_torchserve(
    archive: Path, checkpoint: Path, handler: Path, repository: Path, *, steps: int, in_flight: int, rounds: int
) -> Report:
    """Guided images of the native size, all requests alike, which is what the opponent can draw in one batch.

    Args:
        archive: ours, made by `diffuserve archive`; the opponent's has the same batch size and delays.
        checkpoint: what the archived bundle was exported from, in diffusers' format.
        handler: the opponent's.
        repository: the same bundle for Triton, of which memory is measured.
        steps: of every image.
        in_flight: requests sent at once; the next ones follow when all have been answered.
        rounds: how often each is measured, after one round that is not.
    """
    seconds: dict[str, list[float]] = {"ours": [], "diffusers": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        opponent = archive_with_handler(archive, checkpoint, handler, folder / "diffusers.mar")
        started_s = time.perf_counter()
        with _server(archive, folder / "ours.json") as ours:
            ready_s = time.perf_counter() - started_s
            with _server(opponent, folder / "diffusers.json") as diffusers:
                servers = {"ours": ours, "diffusers": diffusers}
                for number in range(rounds + 1):
                    for kind, server in servers.items():
                        round_s = _round_s(server, steps, in_flight)
                        if number:  # the first fills caches and allocates
                            seconds[kind].append(round_s)
            worker_bytes = processes_of(ours.pid)["worker"].proportional_bytes
            model = ours.archive.manifest.model
            settings = {name: ours.archive.config[name] for name in ("batchSize", "maxBatchDelay")}
    triton_bytes = _triton_bytes(repository, steps, in_flight)
    rates = {kind: in_flight / statistics.median(values) for kind, values in seconds.items()}
    ratio, memory_ratio = rates["ours"] / rates["diffusers"], worker_bytes / sum(triton_bytes.values())
    return Report(
        "torchserve",
        {"archive": str(archive), "steps": steps, "in_flight": in_flight, "rounds": rounds, **settings},
        {
            "seconds_by_round": seconds,
            "ratio": ratio,
            "ready_s": ready_s,
            "worker_pss_bytes": worker_bytes,
            "triton_pss_bytes": triton_bytes,
            "memory_ratio": memory_ratio,
        },
        [
            Table(
                f"{in_flight} requests at once of {steps} steps, {model.width} x {model.height}, guided",
                ("handler", "images/s", "seconds a round", "least", "most"),
                [
                    (
                        kind,
                        f"{rates[kind]:.3f}",
                        *(f"{each:.2f}" for each in (statistics.median(values), min(values), max(values))),
                    )
                    for kind, values in seconds.items()
                ],
            )
        ],
        [
            f"ours / diffusers: {ratio:.2f}",
            f"Ready in {ready_s:.1f} s.",
            f"Memory (PSS) of TorchServe's worker: {worker_bytes / 2**20:.0f} MiB; of Triton's processes of the same stages "
            f"and the in-flight model: {sum(triton_bytes.values()) / 2**20:.0f} MiB; ratio {memory_ratio:.2f}.",
        ],
    )


def _server(archive: Path, key_file: Path) -> TorchServeServer:
    return TorchServeServer(archive, TorchServeAddress.on_free_ports(), key_file=key_file)


def _round_s(server: TorchServeServer, steps: int, in_flight: int) -> float:
    """Seconds until all have been answered."""
    token = read_inference_token(server.key_file)

    def draw(number: int) -> None:
        fields: dict[str, Any] = {
            "prompt": f"{PROMPT}, number {number}",
            "steps": steps,
            "guidance_scale": GUIDANCE_SCALE,
            "seed": number,
        }
        if server.archive.path.stem != "diffusers":  # which has one sampler, the same
            fields["sampler"] = SAMPLER
        url = f"{server.address.http}/predictions/{STABLE_DIFFUSION}"
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
        with open_url(url, timeout_s=600, data=json.dumps(fields).encode(), headers=headers) as response:
            if not response.read().startswith(b"\x89PNG"):
                raise RuntimeError("the server answered with something other than an image")

    started_s = time.perf_counter()
    with ThreadPoolExecutor(in_flight) as pool:
        list(pool.map(draw, range(in_flight)))
    return time.perf_counter() - started_s


def _triton_bytes(repository: Path, steps: int, in_flight: int) -> dict[str, int]:
    """PSS of Triton's models after a round of the same requests, by name; the VAE's encoder, which TorchServe's worker does
    not load, is left out."""
    names = {STABLE_DIFFUSION, *read_manifest(repository / STABLE_DIFFUSION / VERSION).components} - {VAE_ENCODER}
    with (
        TritonServer(repository, TritonAddress.on_free_ports()) as server,
        Client(server.address.grpc) as client,
        ThreadPoolExecutor(in_flight) as pool,
    ):
        list(
            pool.map(
                lambda number: client.generate(
                    f"{PROMPT}, number {number}",
                    steps=steps,
                    guidance_scale=GUIDANCE_SCALE,
                    sampler=SAMPLER,
                    seed=number,
                ),
                range(in_flight),
            )
        )
        processes = processes_of(server.pid)
        return {name: each.proportional_bytes for name, each in processes.items() if name in names}
