"""Weights into modules, so that none is left over on either side.

Every tensor of a module is one of the file's, by a table that is written here and not in the libraries, whose loaders skip
what they do not know: `Origin` says where it lies. Every tensor of the file is some module's, or its name stands on a
list of those that are known to be none of the model's weights. Anything else is refused by name, and so is a weight that
is not a finite number.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffuserve.errors import CheckpointError
from diffuserve_export.checkpoint.weights import FLOATS, Weights, listed

if TYPE_CHECKING:
    from torch import Tensor, nn

# Beside quantised weights: what they are to be multiplied with, or what their layer's inputs are.
_SCALES = (
    "scale_weight",
    "weight_scale",
    "weight_scale_2",
    "weight_scale_inv",
    "scale_input",
    "input_scale",
    "scaled_fp8",
)


@dataclass(frozen=True)
class Origin:
    """Where a module's tensor lies.

    Attributes:
        name: of the file's tensor.
        third: which third of it along the first axis, where three lie in one; None for all of it.
        transposed: its two axes are exchanged.
        convolution: it may be that of a 1 x 1 convolution, (N, M, 1, 1), where the module has (N, M).
    """

    name: str
    third: int | None = None
    transposed: bool = False
    convolution: bool = False

    def take(self, tensor: Tensor) -> Tensor:
        """The module's tensor, of the file's; raises RuntimeError or IndexError where it cannot be."""
        if self.third is not None:
            tensor = tensor.reshape(3, -1, *tensor.shape[1:])[self.third]
        if self.transposed:
            tensor = tensor.transpose(0, 1)
        if self.convolution and set(tensor.shape[2:]) == {1}:
            tensor = tensor.flatten(1)
        return tensor


# By component, and in it by the name of the module's tensor.
Origins = Mapping[str, Mapping[str, Origin]]


def fill(
    modules: Mapping[str, nn.Module],
    origins: Origins,
    weights: Weights,
    *,
    ignored: Collection[str],
    where: Path,
    fix: str,
) -> None:
    """Gives modules their weights, in fp32.

    Args:
        modules: by component; their parameters need no memory yet.
        origins: of all of their tensors.
        weights: what is read, one tensor at a time.
        ignored: names of those that are not weights of the model's.
        where: what is said to be wrong.
        fix: what to do if so.

    Raises:
        CheckpointError: a tensor is missing, left over, of another shape or type, or not finite; which.
    """
    if problems := [*_misfits(modules, origins, weights, ignored)]:
        raise CheckpointError(f"{where}: weights and configs do not belong together. {' '.join(problems)} {fix}")
    _copy(modules, origins, weights)


def _misfits(
    modules: Mapping[str, nn.Module], origins: Origins, weights: Weights, ignored: Collection[str]
) -> Iterator[str]:
    """What is wrong, in sentences."""
    import torch

    tensors = weights.tensors
    wanted = {origin.name for part in origins.values() for origin in part.values()}
    if missing := wanted - tensors.keys():
        yield f"The file lacks {len(missing)} of the weights that the configs describe: {listed(missing)}."
    left_over = tensors.keys() - wanted - {*ignored}
    if scales := [name for name in left_over if name.rpartition(".")[2] in _SCALES]:
        yield (
            f"The weights are quantised, with scales beside them that are not applied here: {listed(scales)}. Take the "
            "checkpoint in fp32, bf16, fp16 or plain fp8."
        )
    elif left_over:
        yield f"The configs do not describe {len(left_over)} of the file's tensors: {listed(left_over)}."
    if others := {name for name in wanted & tensors.keys() if tensors[name].dtype not in FLOATS}:
        yield f"Weights are not floating-point numbers: {listed([f'{name} is {tensors[name].dtype}' for name in others])}."
    shapes = set()
    for part, module in modules.items():
        for name, weight in module.state_dict().items():
            origin = origins[part][name]
            if origin.name not in tensors:
                continue
            shape = tensors[origin.name].shape
            try:
                taken = origin.take(torch.empty(shape, device="meta")).shape
            except (RuntimeError, IndexError):
                taken = None
            if taken != weight.shape:
                times = "" if origin.third is None else "three times "
                shapes.add(f"{origin.name} is {shape} where {times}{tuple(weight.shape)} is needed")
    if shapes:
        yield f"Weights are of another shape than the configs describe: {listed(shapes)}."


def _copy(modules: Mapping[str, nn.Module], origins: Origins, weights: Weights) -> None:
    import torch
    from safetensors import safe_open

    targets: dict[str, list[tuple[str, str, Origin]]] = {}
    for part, named in origins.items():
        for name, origin in named.items():
            targets.setdefault(origin.name, []).append((part, name, origin))
    states: dict[str, dict[str, Tensor]] = {part: {} for part in modules}
    for file in sorted({weights.tensors[name].file for name in targets}):
        with safe_open(file, framework="pt") as opened:
            for name in (name for name in targets if weights.tensors[name].file == file):
                tensor = opened.get_tensor(name).to(torch.float32, copy=True)  # else it would be the file, mapped
                if not _is_finite(tensor):
                    raise CheckpointError(
                        f"{file}: {name} holds NaN, infinity, or a number beyond fp32, so nothing could be drawn with it. "
                        "The file is damaged or its training failed; take another one."
                    )
                for part, target, origin in targets[name]:
                    states[part][target] = origin.take(tensor).contiguous()
    for part, module in modules.items():
        module.load_state_dict(states[part], strict=True, assign=True)


def _is_finite(tensor: Tensor) -> bool:
    """By the least and the greatest, both of which NaN is: one pass, where torch.isfinite takes several."""
    return all(math.isfinite(end) for end in tensor.aminmax())


def layers_of(text_encoder: Any) -> int:
    """How many layers a text encoder of transformers has by its config."""
    return int(text_encoder.config.num_hidden_layers)


def whole_trailing_layers(names: Collection[str], stem: str, kept: int) -> set[str]:
    """Layers that a text encoder's config leaves out, as some skip its last ones.

    Args:
        names: of tensors.
        stem: what those of layers begin with, before their number.
        kept: how many layers there are by the config.

    Returns:
        The names of all layers from `kept` on, if nothing of any of them is missing; else none.
    """
    layers: dict[int, set[str]] = {}
    for name in names:
        number, dot, rest = name.removeprefix(stem).partition(".")
        if name.startswith(stem) and dot and number.isdecimal():
            layers.setdefault(int(number), set()).add(rest)
    left_out = {number: rests for number, rests in layers.items() if number >= kept}
    whole = {*left_out} == {*range(kept, kept + len(left_out))} and all(
        rests == layers.get(0) for rests in left_out.values()
    )
    return {f"{stem}{number}.{rest}" for number, rests in left_out.items() for rest in rests} if whole else set()
