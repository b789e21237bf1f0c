"""Image sizes that an export compares at."""

from __future__ import annotations

from diffuserve.bundle.manifest import ModelSpec

# In latent pixels: the largest native side that is compared as it is, and what stands for larger ones. On a CPU, an SDXL
# image of 1024 px takes minutes per step, and tells no more about a graph than one of 192 px.
_MAX_LATENT_SIDE = 32
_REDUCED_LATENT_SIDE = 24


def native_units(spec: ModelSpec) -> tuple[int, int]:
    """Height and width of the native size, or of a smaller one of about its shape where that is large, in units of
    `size_multiple`."""
    sides = spec.height // spec.size_multiple, spec.width // spec.size_multiple
    latent_side = max(spec.height, spec.width) / spec.vae_scale_factor
    shrink = _REDUCED_LATENT_SIDE / latent_side if latent_side > _MAX_LATENT_SIDE else 1.0
    rows, columns = (max(1, round(side * shrink)) for side in sides)
    return rows, columns
