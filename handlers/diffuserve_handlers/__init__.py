"""diffuserve on TorchServe: the handler that a model archive's few lines of entry point derive from."""

from diffuserve_handlers.handler import TextToImageHandler

__all__ = ["TextToImageHandler"]
