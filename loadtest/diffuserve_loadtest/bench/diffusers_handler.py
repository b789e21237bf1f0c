"""The opponent of `diffuserve bench torchserve`, and no part of what is served: a handler in the way of TorchServe's own
example for diffusers, which calls the pipeline once for the whole batch, with one setting for all.

It runs in TorchServe's worker. Unlike the example it answers with PNG files instead of lists of numbers, which is faster.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any


class DiffusersHandler:
    """The checkpoint is in the archive; steps and guidance are those of the environment of the benchmark."""

    def initialize(self, context: Any) -> None:
        """Loads the pipeline, fp32 on the CPU."""
        import diffusers
        import torch

        folder = os.path.join(context.system_properties["model_dir"], "checkpoint")  # noqa: PTH118 - as in the example
        library: Any = diffusers
        self._pipe = library.StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)
        self._pipe.scheduler = library.DPMSolverMultistepScheduler.from_config(self._pipe.scheduler.config)
        self._pipe.set_progress_bar_config(disable=True)
        self._steps = int(os.environ["BENCH_STEPS"])
        self._guidance_scale = float(os.environ["BENCH_GUIDANCE_SCALE"])

    def handle(self, data: Sequence[dict[str, Any]], context: Any) -> list[bytes]:
        """One pipeline call for the batch."""
        prompts = [request["body"]["prompt"] for request in data]
        images = self._pipe(prompts, num_inference_steps=self._steps, guidance_scale=self._guidance_scale).images
        for index in range(len(data)):
            context.set_response_content_type(index, "image/png")
        return [_png(image) for image in images]


def _png(image: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "png")
    return stream.getvalue()
