"""The values of a response, by name: what every server answers with, in Triton's dtypes.

To add one: declare it here, and give its value in `diffuserve.events.values_from_event`.
"""

from diffuserve.tensors import TensorSpec

RESPONSE = (
    TensorSpec("event", "BYTES", (1,)),
    TensorSpec("step", "INT32", (1,)),
    TensorSpec("steps", "INT32", (1,)),
    TensorSpec("position", "INT32", (1,)),
    TensorSpec("eta_s", "FP32", (1,)),
    TensorSpec("preview", "BYTES", (-1,)),
    TensorSpec("image", "BYTES", (-1,)),
    TensorSpec("flagged", "BOOL", (-1,)),
    TensorSpec("seed", "INT64", (-1,)),
    TensorSpec("width", "INT32", (1,)),
    TensorSpec("height", "INT32", (1,)),
    TensorSpec("parameters", "BYTES", (-1,)),
    TensorSpec("warnings", "BYTES", (-1,)),
    TensorSpec("queue_s", "FP32", (1,)),
    TensorSpec("denoise_s", "FP32", (1,)),
    TensorSpec("total_s", "FP32", (1,)),
    TensorSpec("description", "BYTES", (1,)),
)
# Those of RESPONSE that are image files: bytes, which JSON cannot carry as they are.
FILES = frozenset({"preview", "image"})
