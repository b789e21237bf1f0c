"""What travels between a client and a server, whatever carries it."""

from __future__ import annotations

from collections.abc import Mapping

from diffuserve.request import FIELDS
from diffuserve.request_fields import Field
from diffuserve.tensors import TensorSpec

# A parameter of Triton's request reaches the model as it was sent: a whole number of 64 bits, a double, text, or true or
# false, so that every value is checked and refused in one place. An input would be cut to its dtype by Triton's HTTP front
# end without a word (2^32 + 2 to 2), and what does not fit refused in Triton's words. Prompts are inputs nevertheless, since a
# parameter's text ends at its first NUL; and the priority, since Triton keeps a parameter of that name for itself.
REQUEST: Mapping[str, Field] = FIELDS
"""Everything that a client may send, by name."""

# Every dim is 1: requests are not batched by Triton, the in-flight loop does that. All are optional to Triton, so that a
# missing one is told in our words.
REQUEST_INPUTS = tuple(
    TensorSpec(name, field.dtype, (1,), optional=True) for name, field in REQUEST.items() if field.tensor
)
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
)
# Those of RESPONSE that are image files: bytes, which JSON cannot carry as they are.
FILES = frozenset({"preview", "image"})
