"""An engine as PyTorch's are, made of another one: on the CPU, tensors in and tensors out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffuserve.stages import Engine


class TorchFacade:
    """`kinds`: of each call, whether its inputs were tensors."""

    device = torch.device("cpu")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.kinds: list[bool] = []

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        [tensors] = {isinstance(array, torch.Tensor) for array in inputs.values()}
        self.kinds.append(tensors)
        if not tensors:
            return self._engine(inputs)
        outputs = self._engine({name: tensor.contiguous().numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(array) for name, array in outputs.items()}
