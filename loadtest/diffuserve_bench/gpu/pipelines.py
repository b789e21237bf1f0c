"""diffusers' own pipeline on the model's configs: eager, with the UNet as CUDA graphs, and with it compiled."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from diffuserve.bundle.manifest import Manifest
from diffuserve.tensors import ENCODER_HIDDEN_STATES, TEXT_EMBEDS, UNET
from diffuserve_bench.gpu.cuda_graphs import Graphed
from diffuserve_bench.gpu.loop import backlog_of
from diffuserve_bench.gpu.model import model_in
from diffuserve_bench.gpu.record import PhaseRecord, Skipped
from diffuserve_bench.gpu.settings import Settings
from diffuserve_bench.gpu.torch_device import compiler_on, median_s, precision_on, torch_device
from diffuserve_bench.gpu.torch_models import random_unet, random_vae
from diffuserve_bench.mixture import GUIDANCE_SCALE
from diffuserve_bench.torch_unet import Tensors
from diffuserve_loadtest.workload.plan import plan

if TYPE_CHECKING:
    import torch

_RUNS = 3
Forward = Callable[..., tuple["torch.Tensor"]]
Call = Callable[[Tensors], "torch.Tensor"]


def measure(settings: Settings, record: PhaseRecord) -> None:
    """Images a second of guided requests that are alike, and of the mixture that the in-flight loop gets. Prompts are embedded
    before; latents or images stay on the device.

    Raises:
        Skipped: it is not a model that StableDiffusionPipeline draws with.
    """
    device = torch_device(settings)
    bundle, manifest = model_in(settings)
    if any(tensor.name == TEXT_EMBEDS for tensor in manifest.components[UNET].tensors.inputs):
        raise Skipped("only Stable Diffusion 1 and 2 are measured with diffusers' pipeline, and this is XL")
    precision, dtype = precision_on(device)
    unet = random_unet(bundle, device, dtype)
    draw = _Drawing(manifest, unet, random_vae(bundle, device, dtype), device, settings, record, precision)
    eager = unet.forward
    with record.part(way="eager"):
        draw.alike("eager")
        draw.mixture_in_batches("eager")
    with record.part(way="CUDA graph"):
        if device.type != "cuda":
            raise Skipped("a CPU has no CUDA graphs")
        unet.forward = graphed(eager)
        draw.alike("CUDA graph")
        draw.mixture_alone("CUDA graph")
    with record.part(way="torch.compile"):
        unet.forward = compiled(eager, device)
        draw.alike("torch.compile")
        draw.mixture_alone("torch.compile")


def graphed(forward: Forward, capture: Callable[[Call, Tensors], Call] = Graphed) -> Forward:
    """A UNet's forward as one graph for each number of rows; takes what StableDiffusionPipeline gives it.

    Args:
        forward: the UNet's own.
        capture: makes of a call and its first inputs what replays it.
    """
    graphs: dict[int, Call] = {}

    def call(tensors: Tensors) -> torch.Tensor:
        return forward(tensors["sample"], tensors["timestep"], tensors[ENCODER_HIDDEN_STATES], return_dict=False)[0]

    def replay(
        sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **nothing: Any
    ) -> tuple[torch.Tensor]:
        inputs = {"sample": sample, "timestep": timestep, ENCODER_HIDDEN_STATES: encoder_hidden_states}
        if len(sample) not in graphs:
            graphs[len(sample)] = capture(call, inputs)
        return (graphs[len(sample)](inputs).clone(),)

    return replay


def compiled(forward: Forward, device: torch.device) -> Forward:
    """Compiled for each number of rows by itself."""
    import torch

    return torch.compile(forward, dynamic=False, backend=compiler_on(device))


class _Drawing:
    """The pipeline, and what is written down of it."""

    def __init__(
        self,
        manifest: Manifest,
        unet: Any,
        vae: Any,
        device: torch.device,
        settings: Settings,
        record: PhaseRecord,
        precision: str,
    ) -> None:
        import torch
        from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

        pipeline_class: Any = StableDiffusionPipeline  # untyped
        scheduler_class: Any = DPMSolverMultistepScheduler
        model = manifest.model
        self._pipeline = pipeline_class(
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            unet=unet,
            scheduler=scheduler_class.from_config(manifest.scheduler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self._pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator(device).manual_seed(0)
        shape = (1, model.max_tokens, model.hidden_size)
        self._text = torch.randn(shape, device=device, dtype=unet.dtype, generator=generator)
        self._size = {"width": model.width, "height": model.height}
        self._manifest, self._device, self._settings = manifest, device, settings
        self._record, self._precision = record, precision

    def alike(self, way: str) -> None:
        steps = self._settings.sizes.pipeline_steps
        for images, kind in itertools.product(self._settings.sizes.pipeline_batches, ("latent", "pt")):
            with self._record.part(images=images, output=kind, way=way):
                seconds = median_s(lambda: self._draw(images, steps, kind), self._device, _RUNS)  # noqa: B023
                unit = {"latent": "images/s to latents", "pt": "images/s to pixels"}[kind]
                self._figure("pipeline", images / seconds, unit, way, images=images, steps=steps)

    def mixture_alone(self, way: str) -> None:
        """A request after another."""
        batches = [(1, steps) for steps in self._backlog()]
        seconds = median_s(lambda: self._draw_all(batches), self._device, 1)
        self._figure("mixture, one at a time", len(batches) / seconds, "images/s to latents", way)

    def mixture_in_batches(self, way: str) -> None:
        """Requests of as many steps together, as if all had been known before: the best that batches of whole requests do."""
        most = max(self._settings.sizes.pipeline_batches)
        counts = Counter(self._backlog())
        batches = [
            (min(most, count - first), steps) for steps, count in counts.items() for first in range(0, count, most)
        ]
        seconds = median_s(lambda: self._draw_all(batches), self._device, 1)
        self._figure("mixture, in batches of alike requests", counts.total() / seconds, "images/s to latents", way)

    def _backlog(self) -> list[int]:
        """Steps of each request."""
        workload = backlog_of(self._manifest, self._settings)
        return [plan(workload, number).fields["steps"] for number in range(self._settings.sizes.backlog)]

    def _draw_all(self, batches: Sequence[tuple[int, int]]) -> None:
        """`batches`: images and steps of each."""
        for images, steps in batches:
            self._draw(images, steps)

    def _draw(self, images: int, steps: int, output: str = "latent") -> None:
        self._pipeline(
            prompt_embeds=self._text,
            negative_prompt_embeds=self._text,
            num_images_per_prompt=images,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE_SCALE,
            output_type=output,
            **self._size,
        )

    def _figure(self, name: str, value: float, unit: str, way: str, **settings: Any) -> None:
        self._record.figure(name, value, unit, way=way, precision=self._precision, **settings)
