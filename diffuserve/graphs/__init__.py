"""Exported ONNX graphs, rewritten for an engine: fused operators, 16 bits, channels last."""
