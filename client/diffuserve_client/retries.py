"""Which failures are worth another try, and when: one policy for both clients.

Only what the server cannot have begun is sent again: a request that it refused (`QueueFull`, `Draining`), and one that
found no server. What was sent and not answered may have been drawn, so it is never repeated here; whoever called decides.

The waits are exponential with full jitter (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015): a
random time below a bound that doubles, so that clients which were refused together do not come back together. A server's
own hint (`retry_after_s`) is the least that is waited, the jitter comes on top.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict

from diffuserve.errors import DiffuserveError, Draining, InvalidRequest, QueueFull, ServerUnavailable

if TYPE_CHECKING:
    from tenacity import RetryCallState

# Three tries more reach over about the two seconds in which a full queue moves on; a server that loads again takes longer,
# and a caller who wants to wait for that asks for more.
DEFAULT_RETRIES = 3
_FIRST_S = 0.25
_MOST_S = 8.0


class Retrying(TypedDict):
    """Arguments of `tenacity.Retrying` and `tenacity.AsyncRetrying`."""

    retry: Any
    wait: Any
    stop: Any
    retry_error_callback: Any


def check_retries(retries: int) -> int:
    """Raises InvalidRequest if it is not a number of retries."""
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise InvalidRequest(f"retries is {retries!r}; it must be a whole number from 0, which means none.")
    return retries


def retrying(
    retries: int, timeout_s: float | None, *, clock: Callable[[], float] = time.monotonic, jitter: Any = random.uniform
) -> Retrying:
    """The policy for one request.

    Args:
        retries: how often it is sent again at most.
        timeout_s: what the request itself allows; no wait begins that would end after it. None sets no bound.
        clock: seconds, monotonic.
        jitter: a random number between two.
    """
    started_s = clock()

    def wait_s(state: RetryCallState) -> float:
        error = _error_of(state)
        least_s = error.retry_after_s if isinstance(error, QueueFull) else 0.0
        waited_s: float = least_s + jitter(0.0, min(_MOST_S, _FIRST_S * 2 ** (state.attempt_number - 1)))
        return waited_s

    def enough(state: RetryCallState) -> bool:
        if state.attempt_number > retries:
            return True
        return timeout_s is not None and clock() - started_s + state.upcoming_sleep >= timeout_s

    def give_up(state: RetryCallState) -> None:
        error = _error_of(state)
        if isinstance(error, DiffuserveError) and state.attempt_number > 1:
            error.tries = state.attempt_number
            said = str(error)
            stop = "" if said.endswith((".", "!", "?")) else "."
            error.args = (f"{said}{stop} It was tried {error.tries} times.",)
        if error is not None:
            raise error

    return Retrying(
        retry=lambda state: is_safe(_error_of(state)),
        wait=wait_s,
        stop=enough,
        retry_error_callback=give_up,
    )


def is_safe(error: BaseException | None) -> bool:
    """Whether it is certain that no server has begun the request."""
    if isinstance(error, ServerUnavailable):
        return error.never_begun
    return isinstance(error, (QueueFull, Draining))


def _error_of(state: RetryCallState) -> BaseException | None:
    return None if state.outcome is None else state.outcome.exception()
