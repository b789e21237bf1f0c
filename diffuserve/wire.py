"""What travels between a client and a server, whatever carries it, and the version of that.

WIRE_VERSION is raised when something changes its meaning or goes away. Additions leave it as it is: a server refuses an
unknown field by name, and a client ignores unknown values and events of a response.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffuserve import __version__
from diffuserve.bundle.manifest import ModelSpec
from diffuserve.errors import InvalidRequest
from diffuserve.limits import Limits
from diffuserve.request import FIELDS, TextToImageRequest, request_from_fields
from diffuserve.request_fields import Field, Flag, Integer
from diffuserve.tensors import TensorSpec

WIRE_VERSION = 1

_DESCRIBE = Flag("Answer with what the server offers, and draw nothing. Other fields are ignored.", setting=False)
_VERSION = Integer(
    "The version of the wire that the client speaks; a client that sends none is served.",
    high=2**31 - 1,
    default=WIRE_VERSION,
    setting=False,
)

# A parameter of Triton's request reaches the model as it was sent: a whole number of 64 bits, a double, text, or true or
# false, so that every value is checked and refused in one place. An input would be cut to its dtype by Triton's HTTP front
# end without a word (2^32 + 2 to 2), and what does not fit refused in Triton's words. Prompts are inputs nevertheless, since a
# parameter's text ends at its first NUL; and the priority, since Triton keeps a parameter of that name for itself.
REQUEST: Mapping[str, Field] = {**FIELDS, "describe": _DESCRIBE, "wire_version": _VERSION}
"""Everything that a client may send, by name."""

# Every dim is 1: requests are not batched by Triton, the in-flight loop does that. All are optional to Triton, so that a
# missing one is told in our words.
REQUEST_INPUTS = tuple(
    TensorSpec(name, field.dtype, (1,), optional=True) for name, field in REQUEST.items() if field.tensor
)


def request_from_wire(sent: Mapping[str, Any], model: ModelSpec, limits: Limits) -> TextToImageRequest | None:
    """The request that a client has sent, checked; None where it asks for the server's description.

    Args:
        sent: values by name of REQUEST; a missing one or None means the default.
        model, limits: the server's.

    Raises:
        InvalidRequest: as `request_from_fields`; or the client speaks another version.
    """
    if _DESCRIBE.check("describe", sent.get("describe"), model, limits):
        return None
    version = _VERSION.check("wire_version", sent.get("wire_version"), model, limits)
    if version != WIRE_VERSION:
        raise InvalidRequest(
            f"The client speaks version {version} of the wire, and the server version {WIRE_VERSION}. "
            f"Use the client of the server's version, diffuserve {__version__}."
        )
    fields = {name: value for name, value in sent.items() if name not in ("describe", "wire_version")}
    return request_from_fields(fields, model, limits)
