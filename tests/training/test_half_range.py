"""An autoencoder whose streams would overflow in fp16 computes there what it did in fp32, once it has been fitted."""

from __future__ import annotations

from typing import Any

import torch


def a_vae() -> Any:
    """Of random weights, whose streams grow beyond fp16's range."""
    import diffusers

    library: Any = diffusers
    torch.manual_seed(0)
    vae = library.AutoencoderKL(
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).eval()
    with torch.no_grad():
        for part in (vae.encoder, vae.decoder):
            part.conv_in.weight.mul_(3e3)
        for sampler in (*vae.encoder.down_blocks[0].downsamplers, *vae.decoder.up_blocks[0].upsamplers):
            sampler.conv.weight.mul_(1e3)
    return vae


def test_it_is_the_same_function_within_the_range_of_fp16() -> None:
    from diffuserve_training.half_range import fit_half_range

    vae = a_vae()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def latents_and_images(vae: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            latents = vae.encode(images.to(dtype)).latent_dist.mean
            return latents.float(), vae.decode(latents).sample.float()

    expected = latents_and_images(vae, torch.float32)
    assert not all(tensor.isfinite().all() for tensor in latents_and_images(a_vae().half(), torch.float16))
    fit_half_range(vae, images)
    torch.testing.assert_close(latents_and_images(vae, torch.float32), expected, rtol=1e-3, atol=1e-4)
    weights = {name: weight.clone() for name, weight in vae.state_dict().items()}
    fit_half_range(vae, images)
    assert all(torch.equal(weight, weights[name]) for name, weight in vae.state_dict().items())
    for actual, wanted in zip(latents_and_images(vae.half(), torch.float16), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0.05, atol=0.05)
