"""Which parameters of a config.pbtxt are Triton's own: all others are ours, and have to be known."""

from __future__ import annotations

from collections.abc import Mapping

# Read by the Python backend (its README) and by the dynamic batcher (Triton's user guide, "Custom Batching"). The batcher's
# library may want more, of names that only it knows; none is needed here, since the loop makes up the batches.
CPU_INPUTS_ONLY = "FORCE_CPU_ONLY_INPUT_TENSORS"
_TRITONS_OWN = frozenset({"EXECUTION_ENV_PATH", CPU_INPUTS_ONLY, "TRITON_BATCH_STRATEGY_PATH"})


def without_tritons_own(parameters: Mapping[str, str]) -> dict[str, str]:
    """The parameters that a model of ours reads, by name."""
    return {name: text for name, text in parameters.items() if name not in _TRITONS_OWN}
