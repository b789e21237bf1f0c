"""From a checkpoint to a bundle: ONNX graphs, compared with PyTorch, and the manifest that describes them.

Importing a module of this package loads no torch; what needs it imports it when called. `modules` is the exception: it
defines torch modules, and is itself imported when an export runs.
"""
