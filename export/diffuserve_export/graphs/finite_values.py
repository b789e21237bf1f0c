"""Nothing that is not finite gets into a bundle: what is said of a component that makes NaN or infinity, and the watch over
diffusers' own pipeline while it draws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffuserve.errors import CheckpointError
from diffuserve.tensors import TEXT_ENCODER, UNET, VAE_DECODER

if TYPE_CHECKING:
    from torch import Tensor, nn

    from diffuserve_export.checkpoint.loaded_model import LoadedModel

# What the pipelines' callbacks can see of the encoded text; the second is Stable Diffusion XL's.
_TEXTS = ("prompt_embeds", "add_text_embeds")


def not_finite(what: str, parts: Mapping[str, nn.Module]) -> CheckpointError:
    """The error for a component that makes values that are not finite of values that are.

    Args:
        what: the component, to call it in the message.
        parts: its modules by name; their weights tell what is wrong.
    """
    weights = {
        f"{part}.{name}": tensor
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
        if tensor.is_floating_point() and tensor.numel()
    }
    damaged = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if damaged:
        why = (
            f"{len(damaged)} of its weights hold such values, {damaged[0]} is one: the file is damaged, or the training or "
            "merge that wrote it failed. Download the checkpoint again, or take the one that it was made from"
        )
    else:
        largest = max(weights, key=lambda name: float(weights[name].abs().max()))
        why = (
            f"Its weights are finite (the largest is {float(weights[largest].abs().max()):.3g}, in {largest}), so values on "
            "the way are too large for fp32, as a failed merge or conversion makes them. Take this part from the checkpoint "
            "that it was made from; a merged model's VAE is most often its base model's. If LoRAs are fused into it, try it "
            "without them, or with smaller scales"
        )
    return CheckpointError(f"The {what} makes values that are not finite. {why}. No bundle was written.")


@contextmanager
def watched(model: LoadedModel, name: str) -> Iterator[dict[str, Any]]:
    """Watches what diffusers' pipeline draws within: the encoded text, the latents after each step, and what the VAE
    decodes them to. (What comes out at its end cannot tell: black is black.)

    Args:
        model: whose pipeline it is.
        name: the model's, in messages.

    Yields:
        Arguments for the pipeline's call.

    Raises:
        CheckpointError: something was not finite; names the component that made it.
    """
    import torch

    encoders: dict[str, Any] = {"text_encoder": model.text_encoder, "text_encoder_2": model.text_encoder_2}
    unet: Any = model.unet
    vae: Any = model.vae
    parts: dict[str, dict[str, nn.Module]] = {
        TEXT_ENCODER: {part: encoder for part, encoder in encoders.items() if encoder is not None},
        UNET: {"unet": unet},
        VAE_DECODER: {"vae": vae},
    }

    def check(stage: str, values: Tensor) -> None:
        if not torch.isfinite(values).all():
            raise not_finite(f"{stage} of {name}", parts[stage])

    def after_step(pipeline: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        for text in _TEXTS:
            if text in values:
                check(TEXT_ENCODER, values[text])
        check(UNET, values["latents"])
        return {}  # which changes nothing

    def after_decoding(module: nn.Module, arguments: Any, decoded: Tensor) -> None:
        check(VAE_DECODER, decoded)

    seen = _TEXTS if model.text_encoder_2 is not None else _TEXTS[:1]
    hook = vae.decoder.register_forward_hook(after_decoding)
    try:
        yield {"callback_on_step_end": after_step, "callback_on_step_end_tensor_inputs": ["latents", *seen]}
    finally:
        hook.remove()
