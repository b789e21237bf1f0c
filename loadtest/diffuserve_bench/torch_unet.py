"""diffusers' UNet in PyTorch, eager, as an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.tensors import ENCODER_HIDDEN_STATES, TEXT_EMBEDS, TIME_IDS, TIMESTEP_COND

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]


class TorchUnet:
    """Implements `diffuserve.stages.Engine`.

    Args:
        unet: a UNet2DConditionModel of diffusers, in evaluation mode.
    """

    def __init__(self, unet: Any) -> None:
        self.unet = unet

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        output = self.output(self.tensors(inputs))
        return {"noise_pred": output.float().cpu().numpy().astype(np.float32)}

    def tensors(self, inputs: Mapping[str, NDArray[Any]]) -> Tensors:
        """The inputs where the UNet is and in its precision; the timesteps, (B,), stay in fp32."""
        import torch

        tensors = {name: torch.from_numpy(array).to(self.unet.device) for name, array in inputs.items()}
        timestep = tensors.pop("timestep").squeeze(1)
        return {"timestep": timestep, **{name: tensor.to(self.unet.dtype) for name, tensor in tensors.items()}}

    def output(self, tensors: Tensors) -> torch.Tensor:
        """The prediction, (B, C, h, w) in the UNet's precision; from `tensors`."""
        import torch

        added = {name: tensors[name] for name in (TEXT_EMBEDS, TIME_IDS) if name in tensors}
        with torch.inference_mode():
            output: torch.Tensor = self.unet(
                tensors["sample"],
                tensors["timestep"],
                tensors[ENCODER_HIDDEN_STATES],
                timestep_cond=tensors.get(TIMESTEP_COND),
                added_cond_kwargs=added or None,
                return_dict=False,
            )[0]
        return output
