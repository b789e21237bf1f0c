"""What the card can do at best: the figures that all others are shares of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffuserve_bench.gpu.record import PhaseRecord
from diffuserve_bench.gpu.settings import Settings, Sizes
from diffuserve_bench.gpu.torch_device import median_s, torch_device

if TYPE_CHECKING:
    import torch

# Of Stable Diffusion 1.5 at 512x512: 16 guided images, 64x64 latents, 320 channels, and the first matrix behind attention.
_ROWS, _SIDE, _CHANNELS, _WIDER = 32, 64, 320, 2560


def measure(settings: Settings, record: PhaseRecord) -> None:
    """A product of square matrices and one of the UNet's, a 3x3 convolution of the UNet's and a copy."""
    import torch

    device, sizes = torch_device(settings), settings.sizes
    generator = torch.Generator(device).manual_seed(0)
    rows, image_side = (_ROWS, _SIDE) if device.type == "cuda" else (1, 8)
    with torch.inference_mode():
        for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            with record.part(figure="matrix product", precision=precision):
                side = sizes.matrix_side
                _product(record, sizes, device, generator, (side, side, side), dtype, precision)
                unet = (rows * image_side * image_side, _CHANNELS, _WIDER)
                _product(record, sizes, device, generator, unet, dtype, precision)
            with record.part(figure="convolution", precision=precision):
                _convolution(
                    record, sizes, device, generator, (rows, _CHANNELS, image_side, image_side), dtype, precision
                )
        with record.part(figure="copy"):
            _copy(record, sizes, device)


def _product(
    record: PhaseRecord,
    sizes: Sizes,
    device: torch.device,
    generator: torch.Generator,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    precision: str,
) -> None:
    """`shape`: rows, the side that both matrices share, columns. Random numbers, since a card multiplies zeros faster."""
    import torch

    rows, shared, columns = shape
    left = torch.randn(rows, shared, device=device, dtype=dtype, generator=generator)
    right = torch.randn(shared, columns, device=device, dtype=dtype, generator=generator)
    result = torch.empty(rows, columns, device=device, dtype=dtype)
    seconds = median_s(lambda: torch.mm(left, right, out=result), device, sizes.calls, inner=sizes.inner)
    rate = 2 * rows * shared * columns / seconds
    record.figure("matrix product", rate / 1e12, "TFLOP/s", precision=precision, shape=f"{rows}x{shared}x{columns}")


def _convolution(
    record: PhaseRecord,
    sizes: Sizes,
    device: torch.device,
    generator: torch.Generator,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    precision: str,
) -> None:
    """`shape`: of the image, (B, C, h, w)."""
    import torch

    channels_last = torch.channels_last
    image = torch.randn(shape, device=device, dtype=dtype, generator=generator)
    filters = torch.randn(_CHANNELS, _CHANNELS, 3, 3, device=device, dtype=dtype, generator=generator)
    image, filters = image.to(memory_format=channels_last), filters.to(memory_format=channels_last)
    seconds = median_s(
        lambda: torch.nn.functional.conv2d(image, filters, padding=1), device, sizes.calls, inner=sizes.inner
    )
    rate = 2 * image.numel() * _CHANNELS * 9 / seconds
    named = f"{'x'.join(map(str, shape))}, 3x3"
    record.figure("convolution", rate / 1e12, "TFLOP/s", precision=precision, shape=named)


def _copy(record: PhaseRecord, sizes: Sizes, device: torch.device) -> None:
    import torch

    source = torch.ones(sizes.copy_mib << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = median_s(lambda: target.copy_(source), device, sizes.calls)
    record.figure("copy", 2 * source.numel() / seconds / 1e12, "TB/s read and written", mib=sizes.copy_mib)
