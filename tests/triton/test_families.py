"""Each family, and a bundle on OpenVINO and on PyTorch, through the real server, against diffusers' own pipeline in fp32."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from diffuserve.bundle.file_samples import sample_file
from diffuserve.bundle.manifest import read_manifest
from diffuserve.trials.selecting import select_engines
from diffuserve.trials.similarity import psnr_db
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.launcher import TritonServer
from diffuserve.triton.placement import read_placement, write_placement
from diffuserve_client import Client
from diffuserve_export.checkpoint.schedulers import scheduler_from_sampler
from diffuserve_export.repository.assemble import repository_from_bundle
from tests.families import Family

LONG = "a cat, blue, on a table, " * 8
MIN_PSNR_DB = 50


def requests_to(family: Family) -> list[dict[str, Any]]:
    """Requests that agree on little: steps, samplers, guidance, sizes, long and negative prompts."""
    wide, tall = {"width": 24, "height": 16}, {"width": 16, "height": 32}
    requests = [
        {"prompt": "a cat, blue", "sampler": "ddim", "steps": 3, "guidance_scale": 5.0, **wide},
        {"prompt": "a cat, blue", "sampler": "euler", "steps": 6, "guidance_scale": 1.0, **tall},
        {"prompt": "", "sampler": "euler_a", "steps": 4, "guidance_scale": 3.0, **wide},
        {"prompt": LONG, "sampler": "dpmpp_2m_karras", "steps": 7, "guidance_scale": 5.0, **wide},
        {"prompt": LONG, "sampler": "unipc", "steps": 5, "guidance_scale": 1.0, **tall},
        {"prompt": "Grüße 😀", "sampler": "heun", "steps": 3, "guidance_scale": 7.5, **tall},
        {"prompt": "a dog", "sampler": "lcm", "steps": 4, "guidance_scale": 2.0, **wide},
    ]
    if family.name != "lcm":  # such a model knows no negative prompts
        requests += [
            {
                "prompt": "a cat",
                "negative_prompt": "a dog",
                "sampler": "pndm",
                "steps": 5,
                "guidance_scale": 5.0,
                **wide,
            },
            {"prompt": "a cat", "negative_prompt": LONG, "sampler": "ddim", "steps": 4, "guidance_scale": 4.0, **tall},
        ]
    return [{**request, "seed": seed} for seed, request in enumerate(requests)]


def served(client: Client, requests: Sequence[dict[str, Any]]) -> list[Any]:
    """All at once, so that parity is shown in mixed batches."""
    with ThreadPoolExecutor(len(requests)) as pool:
        results = list(pool.map(lambda request: client.generate(**request), requests))
    assert not any(result.warnings for result in results)
    return [result.images[0] for result in results]


def reference(pipeline: Any, request: dict[str, Any]) -> Any:
    """The image as diffusers draws it. Prompts of several chunks, which it does not know, it gets embedded."""
    import torch

    prompt, negative_prompt = request["prompt"], request.get("negative_prompt", "")
    texts: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative_prompt or None}
    if LONG in (prompt, negative_prompt):
        texts = embedded(pipeline, prompt, negative_prompt)
    own_scheduler = pipeline.scheduler
    pipeline.scheduler = scheduler_from_sampler(request["sampler"], own_scheduler.config)
    try:
        image = pipeline(
            **texts,
            num_inference_steps=request["steps"],
            generator=torch.Generator().manual_seed(request["seed"]),
            **{name: request[name] for name in ("guidance_scale", "width", "height")},
        ).images[0]
    finally:
        pipeline.scheduler = own_scheduler
    assert np.asarray(image).std() > 10  # it is a picture
    return image


def embedded(pipeline: Any, prompt: str, negative_prompt: str) -> dict[str, Any]:
    """Both prompts in as many chunks of 75 tokens as the longer one needs, by the pipeline's own text encoders."""
    import torch

    is_xl = hasattr(pipeline, "text_encoder_2")
    parts = [(pipeline.tokenizer, pipeline.text_encoder)]
    if is_xl:
        parts.append((pipeline.tokenizer_2, pipeline.text_encoder_2))

    def encode(text: str, chunks: int) -> tuple[Any, Any]:
        """Hidden states, (1, 77 * chunks, D), and the pooled embedding of the first chunk, (1, P) for XL."""
        hidden, pooled = [], None
        for tokenizer, encoder in parts:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            rows = []
            for chunk in range(chunks):
                row = [tokenizer.bos_token_id, *ids[75 * chunk : 75 * chunk + 75], tokenizer.eos_token_id]
                rows.append(row + [tokenizer.pad_token_id] * (77 - len(row)))
            with torch.inference_mode():
                outputs = encoder(torch.tensor(rows), output_hidden_states=True)
            states = outputs.hidden_states[-2] if is_xl else outputs.last_hidden_state
            hidden.append(states.reshape(1, 77 * chunks, -1))
            if is_xl and encoder is pipeline.text_encoder_2:
                pooled = outputs.text_embeds[:1]
        return torch.cat(hidden, dim=-1), pooled

    def tokens(text: str) -> int:
        return len(pipeline.tokenizer(text, add_special_tokens=False).input_ids)

    chunks = -(-max(tokens(prompt), tokens(negative_prompt)) // 75)
    assert chunks > 1
    hidden, pooled = encode(prompt, chunks)
    negative_hidden, negative_pooled = encode(negative_prompt, chunks)
    embeds = {"prompt_embeds": hidden, "negative_prompt_embeds": negative_hidden}
    if is_xl:
        if not negative_prompt:  # as the pipeline itself does for the checkpoint
            negative_hidden, negative_pooled = torch.zeros_like(hidden), torch.zeros_like(pooled)
        embeds |= {
            "negative_prompt_embeds": negative_hidden,
            "pooled_prompt_embeds": pooled,
            "negative_pooled_prompt_embeds": negative_pooled,
        }
    return embeds


def check(images: Sequence[Any], pipeline: Any, requests: Sequence[dict[str, Any]]) -> None:
    figures = [psnr_db(image, reference(pipeline, each)) for image, each in zip(images, requests, strict=True)]
    lines = [f"{figure:6.1f} dB  {each}" for figure, each in zip(figures, requests, strict=True)]
    print("\n".join(lines))
    assert min(figures) >= MIN_PSNR_DB, "\n".join(lines)


def test_each_family_as_served_beside_another(
    family: Family, bundle: Path, reference_pipeline: Any, tmp_path: Path
) -> None:
    repository_from_bundle(bundle, tmp_path / "repository")
    repository_from_bundle(family.bundle, tmp_path / "repository", name=family.name)
    requests = requests_to(family)
    others: list[dict[str, Any]] = [
        {"prompt": "a red heart, flat", "sampler": sampler, "steps": 6, "guidance_scale": 5.0, "seed": seed}
        for seed, sampler in enumerate(("ddim", "euler", "dpmpp_2m"))
    ]
    others = [{**other, "width": 128, "height": 128} for other in others]
    with (
        TritonServer(tmp_path / "repository", TritonAddress.on_free_ports()) as server,
        Client(server.address.grpc, model=family.name) as client,
        Client(server.address.grpc) as other,
        ThreadPoolExecutor(2) as pool,
    ):
        beside = pool.submit(served, other, others)
        images = served(client, requests)
        check(beside.result(), reference_pipeline, others)
    check(images, family.pipeline, requests)


def requests_of_all_kinds() -> list[dict[str, Any]]:
    """Of the bundled model: prompts, samplers, guidance and sizes."""
    prompts = ("a slice of pizza, glossy, on a blue background", "a red heart, flat")
    requests: list[dict[str, Any]] = [
        {
            "prompt": prompt,
            "sampler": sampler,
            "steps": steps,
            "guidance_scale": scale,
            "width": width,
            "height": height,
        }
        for prompt in prompts
        for sampler, steps, scale, width, height in (("dpmpp_2m", 8, 5.0, 128, 128), ("euler_a", 5, 1.0, 64, 96))
    ]
    return [{**request, "seed": seed} for seed, request in enumerate(requests)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_bundle_on_openvino_as_served(bundle: Path, reference_pipeline: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    repository = tmp_path / "repository"
    select_engines(folder, "openvino")
    repository_from_bundle(folder, repository)
    requests = requests_of_all_kinds()

    def serve() -> list[Any]:
        address = TritonAddress.on_free_ports()
        with TritonServer(repository, address), Client(address.grpc) as client:
            return served(client, requests)

    images = serve()
    check(images, reference_pipeline, requests)
    compiled = {path: path.stat().st_mtime_ns for path in repository.rglob("*.openvino")}
    assert len(compiled) == len(read_manifest(folder).components)

    # Graphs that cannot be read any more: the second start has nothing but what the first has compiled.
    for path in folder.rglob("model.onnx"):
        path.unlink()
    for path in repository.rglob("model.onnx"):
        placement = read_placement(path.parent)
        path.write_bytes(b"no model")
        names = [file.name for file in placement.files]
        files = tuple(sample_file(path.parent, path.parent / name) for name in names)
        write_placement(path.parent, msgspec.structs.replace(placement, files=files))
    again = serve()
    assert {path: path.stat().st_mtime_ns for path in repository.rglob("*.openvino")} == compiled
    assert min(psnr_db(image, first) for image, first in zip(again, images, strict=True)) >= MIN_PSNR_DB


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_bundle_on_pytorch_as_served(bundle: Path, reference_pipeline: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    select_engines(folder, "torch")
    repository_from_bundle(folder, tmp_path / "repository")
    requests = requests_of_all_kinds()
    address = TritonAddress.on_free_ports()
    with TritonServer(tmp_path / "repository", address), Client(address.grpc) as client:
        images = served(client, requests)
    check(images, reference_pipeline, requests)
