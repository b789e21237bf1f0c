"""Entry point for Triton; the model lives in the installed package."""

from diffuserve.triton.stable_diffusion import StableDiffusionModel as TritonPythonModel  # noqa: F401
