"""The phases, in the order in which they run."""

from __future__ import annotations

from dataclasses import dataclass

_PACKAGE = __package__


@dataclass(frozen=True)
class Phase:
    """One phase: a function of a module, called with `Settings` and a `PhaseRecord` in a process of its own.

    `target`: "module:function"; `seconds`: after which it is killed; `text`: what it measures.
    """

    name: str
    target: str
    seconds: float
    text: str


PHASES = (
    Phase("ceilings", f"{_PACKAGE}.ceilings:measure", 40, "the card: matrix products, copies, a convolution"),
    Phase("tests", f"{_PACKAGE}.gpu_tests:measure", 90, "the tests that need a GPU, counted"),
    Phase("model", f"{_PACKAGE}.model:measure", 120, "random weights for the model, fp16, operations of a UNet row"),
    Phase("unet", f"{_PACKAGE}.unet_rows:measure", 150, "the UNet by number of rows on each engine, memory, error"),
    Phase("loop", f"{_PACKAGE}.loop:measure", 200, "in-flight batching, whole requests and none, the engine alone"),
    Phase("stages", f"{_PACKAGE}.other_stages:measure", 60, "text encoder, VAE decoder and encoder on each engine"),
    Phase("images", f"{_PACKAGE}.images:measure", 60, "whole requests in one process, from a text to a PNG"),
    Phase("torch", f"{_PACKAGE}.torch_rows:measure", 180, "PyTorch's UNet by rows: eager, CUDA graph, torch.compile"),
    Phase("diffusers", f"{_PACKAGE}.pipelines:measure", 240, "diffusers' pipeline, alike and mixed requests"),
    Phase("bundle", f"{_PACKAGE}.selection:measure", 150, "a real bundle on each engine: its image, its trials"),
)
