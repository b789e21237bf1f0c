"""Diffusers behind FastAPI, a request at a time: `python server.py CHECKPOINT PORT`."""

import io
import sys
import threading

import torch
import uvicorn
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from fastapi import FastAPI, Response
from pydantic import BaseModel


class Draw(BaseModel):
    prompt: str
    steps: int = 20
    guidance_scale: float = 5.0
    seed: int = 0


app = FastAPI()
lock = threading.Lock()
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.float32, safety_checker=None)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)


@app.post("/generate")
def generate(request: Draw) -> Response:  # FastAPI runs a plain function in a thread
    generator = torch.Generator().manual_seed(request.seed)
    with lock:
        [image] = pipe(
            request.prompt,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            generator=generator,
        ).images
    stream = io.BytesIO()
    image.save(stream, "png")
    return Response(stream.getvalue(), media_type="image/png")


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
