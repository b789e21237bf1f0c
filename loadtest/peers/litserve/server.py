"""Diffusers behind LitServe with its dynamic batching: `python server.py CHECKPOINT PORT`."""

import io
import sys

import litserve as ls
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from fastapi import Response


class Diffusers(ls.LitAPI):
    def setup(self, device):
        self.pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.float32, safety_checker=None)
        self.pipe.scheduler = DPMSolverMultistepScheduler.from_config(self.pipe.scheduler.config)
        self.pipe.set_progress_bar_config(disable=True)

    def decode_request(self, request):
        return request

    def batch(self, inputs):
        return inputs

    def predict(self, requests):
        images = [None] * len(requests)
        groups = {}
        for index, request in enumerate(requests):
            groups.setdefault((request["steps"], request["guidance_scale"]), []).append(index)
        for (steps, guidance_scale), members in groups.items():
            drawn = self.pipe(
                [requests[index]["prompt"] for index in members],
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(requests[index]["seed"]) for index in members],
            ).images
            for index, image in zip(members, drawn):
                images[index] = image
        return images

    def unbatch(self, output):
        return output

    def encode_response(self, image):
        stream = io.BytesIO()
        image.save(stream, "png")
        return Response(stream.getvalue(), media_type="image/png")


if __name__ == "__main__":
    server = ls.LitServer(Diffusers(max_batch_size=8, batch_timeout=0.05), accelerator="cpu", timeout=600)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", generate_client_file=False)
