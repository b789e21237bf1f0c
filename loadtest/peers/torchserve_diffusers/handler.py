"""Diffusers in TorchServe: one pipeline call for all requests of a batch that agree on steps and guidance."""

import io
import os

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline


class DiffusersHandler:
    def initialize(self, context):
        folder = os.path.join(context.system_properties["model_dir"], "checkpoint")
        self.pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)
        self.pipe.scheduler = DPMSolverMultistepScheduler.from_config(self.pipe.scheduler.config)
        self.pipe.set_progress_bar_config(disable=True)

    def handle(self, data, context):
        requests = [item["body"] for item in data]
        answers = [b""] * len(requests)
        groups = {}
        for index, request in enumerate(requests):
            groups.setdefault((request["steps"], request["guidance_scale"]), []).append(index)
        for (steps, guidance_scale), members in groups.items():
            images = self.pipe(
                [requests[index]["prompt"] for index in members],
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(requests[index]["seed"]) for index in members],
            ).images
            for index, image in zip(members, images):
                stream = io.BytesIO()
                image.save(stream, "png")
                answers[index] = stream.getvalue()
                context.set_response_content_type(index, "image/png")
        return answers
