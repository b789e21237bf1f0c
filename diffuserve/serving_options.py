"""How one server serves its bundle, besides the limits of what it accepts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from diffuserve.batching.policies import DEFAULT_POLICY, POLICIES
from diffuserve.bundle.manifest import ModelSpec
from diffuserve.defaults import CALL_TIMEOUT_S
from diffuserve.limits import Limits
from diffuserve.options import check, check_known, from_parameters, option, options_of

BATCHING = ("inflight", "request", "none")


@dataclass(frozen=True)
class Serving:
    """What `diffuserve.pipeline.Pipeline` is given, whichever server it runs in.

    Raises:
        ConfigurationError: there is no such batching or policy, or a number is out of its range.
    """

    batching: str = option(
        "inflight", "inflight; request and none batch whole requests or nothing, to measure against.", choices=BATCHING
    )
    policy: str = option(DEFAULT_POLICY, "Whose step is next, with inflight.", choices=tuple(POLICIES))
    unet_instances: int = option(
        1, "Copies of the UNet, one for each GPU; the loop keeps a call in flight for each.", least=1, most=64
    )
    call_timeout_s: float = option(
        CALL_TIMEOUT_S,
        "Seconds after which a stage's call counts as hung: its requests fail, and the stage's process is started again.",
        least=0.001,
        most=24 * 3600,
    )
    require_safety_checker: bool = option(False, "Serve no bundle without a safety checker.")

    def __post_init__(self) -> None:
        check(self)


def limits_and_serving(model: ModelSpec, parameters: Mapping[str, str]) -> tuple[Limits, Serving]:
    """What a server's configuration says; `diffuserve.options.to_parameters` writes it.

    Args:
        model: the bundle's, which some defaults depend on.
        parameters: text by name; what is missing has its default.

    Raises:
        ConfigurationError: a name is unknown, or a value is not allowed.
    """
    check_known(parameters, [*options_of(Limits), *options_of(Serving)])
    return Limits.from_parameters(model, parameters), from_parameters(Serving(), parameters)
