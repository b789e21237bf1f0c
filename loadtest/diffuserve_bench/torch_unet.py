"""diffusers' UNet in PyTorch, eager, as an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffuserve.stages import ArraysByName
from diffuserve.tensors import ENCODER_HIDDEN_STATES, NOISE_PRED, TEXT_EMBEDS, TIME_IDS, TIMESTEP_COND

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]


class TorchUnet:
    """Implements `diffuserve.stages.Engine`: of arrays it makes arrays, and of tensors on its device tensors there.

    Args:
        unet: a UNet2DConditionModel of diffusers, in evaluation mode.
    """

    def __init__(self, unet: Any) -> None:
        self.unet = unet

    @property
    def device(self) -> torch.device:
        device: torch.device = self.unet.device
        return device

    def __call__(self, inputs: ArraysByName) -> dict[str, Any]:
        import torch

        output = self.output(self.tensors(inputs)).float()
        on_device = all(isinstance(array, torch.Tensor) for array in inputs.values())
        return {NOISE_PRED: output if on_device else output.cpu().numpy()}

    def tensors(self, inputs: ArraysByName) -> Tensors:
        """The inputs where the UNet is and in its precision; the timesteps, (B,), stay in fp32."""
        import torch

        tensors = {name: torch.as_tensor(array, device=self.device) for name, array in inputs.items()}
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
