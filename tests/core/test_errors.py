from __future__ import annotations

import re

import pytest

from diffuserve import errors
from diffuserve.errors import TRITON_CODE, DiffuserveError, QueueFull, from_wire, to_wire

# Those that travel: other packages have some that they raise themselves.
TREE = [each for each in DiffuserveError.__subclasses__() if each.__module__ == errors.__name__]
MESSAGES = ["", "plain", "two\nlines", "[in] brackets", "with [invalid_request] inside", "Grüße 😀", "a=b c]"]
# What TritonError has a constructor for, in triton_python_backend_utils.
TRITON_CODES = {
    "ALREADY_EXISTS",
    "CANCELLED",
    "INTERNAL",
    "INVALID_ARG",
    "NOT_FOUND",
    "UNAVAILABLE",
    "UNKNOWN",
    "UNSUPPORTED",
}


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "in ensemble 'x', ",
        "[request id: <id_unknown>] ",
        "[request id: 7] Failed to process the request(s) for model 'stable_diffusion', message: ",
        "[warning] [error x=1] ",
    ],
)
@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize("error_class", TREE)
def test_round_trip(error_class: type[DiffuserveError], message: str, prefix: str) -> None:
    error = from_wire(prefix + to_wire(error_class(message)))
    assert type(error) is error_class
    assert str(error) == message


@pytest.mark.parametrize("retry_after_s", [0.1, 1.0, 2.5, 60.0, 1200.0, 1e-7])
def test_retry_after_s_travels(retry_after_s: float) -> None:
    error = from_wire(f"Triton says: {to_wire(QueueFull('full', retry_after_s))}")
    assert isinstance(error, QueueFull)
    assert error.retry_after_s == pytest.approx(retry_after_s, rel=0.05)
    assert str(error) == "full"


def test_wire_format() -> None:
    assert to_wire(QueueFull("64 are waiting", 2.5)) == "[queue_full retry_after_s=2.5] 64 are waiting"
    assert to_wire(errors.Draining("soon")) == "[draining] soon"
    without = from_wire("[queue_full] 64 are waiting")
    assert isinstance(without, QueueFull)
    assert without.retry_after_s == 1.0


@pytest.mark.parametrize(
    "text",
    ["", "Connection refused", "[queue_full]no space", "[no_such_code] text", "[QUEUE_FULL] text", "queue_full text"],
)
def test_foreign_texts_carry_no_error(text: str) -> None:
    assert from_wire(text) is None


def test_the_drawn_tree_is_the_real_one() -> None:
    assert errors.__doc__ is not None
    drawn = re.findall(r"[├└]── (\w+) +(\w+) +\S", errors.__doc__)
    assert drawn == [(error_class.__name__, error_class.code) for error_class in TREE]
    assert not any(error_class.__subclasses__() for error_class in TREE)
    assert len({error_class.code for error_class in TREE}) == len(TREE)


def test_triton_knows_the_codes() -> None:
    assert set(TRITON_CODE) <= set(TREE)
    assert set(TRITON_CODE.values()) <= TRITON_CODES
