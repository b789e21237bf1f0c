"""An autoencoder's residual streams brought into the range of half precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# fp16's largest number is 65504, and other pictures may go further than those that are measured. What is within four times the
# aim stays as it is, so that a second fit changes nothing.
_AIM, _BEARABLE = 4096.0, 4 * 4096.0


def fit_half_range(vae: Any, images: Tensor) -> None:
    """Scales what passes between an AutoencoderKL's blocks, so that fp16 does not overflow in it, and changes nothing of what it
    computes: every branch of a residual block begins with a GroupNorm, and so does the way out. The latents stay the same.

    Without it the streams may grow without bound, since nothing but the norms' epsilon depends on their scale; Stable
    Diffusion XL's autoencoder is known for it, and its repair (madebyollin/sdxl-vae-fp16-fix) was trained.

    Args:
        vae: AutoencoderKL in fp32 without attention; its weights are changed.
        images: (N, 3, H, W) float32 in -1 .. 1, whose streams are measured.
    """
    largest: dict[nn.Module, float] = {}
    hooks = [
        module.register_forward_hook(lambda module, _, output: largest.__setitem__(module, float(output.abs().max())))
        for part in (vae.encoder, vae.decoder)
        for module, _ in _stream(part)
    ]
    with torch.inference_mode():
        vae.decode(vae.encode(images).latent_dist.mean)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for part in (vae.encoder, vae.decoder):
            scale = 1.0
            for module, is_residual in _stream(part):
                before = scale
                if not is_residual or module.conv_shortcut is not None:
                    scale = 1.0 if largest[module] <= _BEARABLE else _AIM / largest[module]
                if is_residual:
                    _multiply(module.conv2, scale, scale)
                    if module.conv_shortcut is not None:
                        _multiply(module.conv_shortcut, scale / before, scale)
                else:
                    _multiply(module, scale / before, scale)


def _stream(part: Any) -> Iterator[tuple[Any, bool]]:
    """What the stream goes through, in order, and whether it is a residual block or a convolution."""
    yield part.conv_in, False
    blocks = [part.mid_block, *part.up_blocks] if hasattr(part, "up_blocks") else [*part.down_blocks, part.mid_block]
    for block in blocks:
        for resnet in block.resnets:
            yield resnet, True
        for sampler in getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None) or ():
            yield sampler.conv, False


def _multiply(convolution: nn.Conv2d, weight: float, bias: float) -> None:
    convolution.weight.mul_(weight)
    if convolution.bias is not None:
        convolution.bias.mul_(bias)
