"""Image sizes that an export compares at."""

from __future__ import annotations

from diffuserve.bundle import ModelSpec

# In latent pixels. On a CPU, an SDXL image of 1024 px takes minutes a step, and tells no more about a graph than one of
# 256 px.
_MAX_LATENT_SIDE = 32


def native_units(spec: ModelSpec) -> tuple[int, int]:
    """Height and width of the native size, or of a smaller one of about its shape where that is large, in units of
    `size_multiple`."""
    sides = spec.height // spec.size_multiple, spec.width // spec.size_multiple
    most = max(1, _MAX_LATENT_SIDE * spec.vae_scale_factor // spec.size_multiple)
    shrink = min(1.0, most / max(sides))
    rows, columns = (max(1, round(side * shrink)) for side in sides)
    return rows, columns
