"""Exported ONNX graphs as PyTorch modules: operators, weights, and the module that walks the nodes."""
