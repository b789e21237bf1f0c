"""Entry point for Triton; the model lives in the installed package."""

from diffuserve.triton.stage import StageModel as TritonPythonModel  # noqa: F401
