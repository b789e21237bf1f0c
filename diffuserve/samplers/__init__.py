"""Samplers as tables: each is linear, so a whole trajectory is a list of small matrices, known before it starts.

Every sampler here computes the next latents as a linear combination of the current latents, the UNet's output, what it
remembers of earlier ones, and fresh noise. Only the weights differ, from sampler to sampler and from step to step, and
they depend on nothing but the noise schedule and the number of steps. So a request's trajectory is a table:

    state S             (K, C, h, w) for each image: slot 0 is the latents, the others are the sampler's memory
    UNet evaluation i   model_output = unet(input_scale[i] * S[0], timesteps[i])
    next state          S = update[i] @ [S[0] .. S[K-1], model_output, noise]         update[i]: (K, K + 2)

What the sampler is, and whether the UNet predicts noise, v or the image, is inside the matrices. So rows of one batch
may be at different steps of different samplers, and `advance` takes them all one step on. Each sampler has as many slots
as it needs, 1 to 6. Most evaluate the UNet once per step; heun and pndm do so more often.

The matrices are not derived by hand. A linear map is known by what it does to unit vectors, so each builder runs the
sampler's published formulas once on the unit vectors of [S_0 .. S_{K-1}, model_output, noise]: `x`, its memory, `output`
and `noise` are those vectors, `x0 = (x - sigma * output) / alpha` is the row of weights that makes x0, and an
evaluation's `state` is the list of rows that make the new slots. In float64, so that weights which cancel do so exactly.

    matrices.py     the table, its builder from evaluations, advancing by it
    latents.py      x0, eps, alpha and sigma: the formulas that samplers share
    ddim.py, pndm.py, lcm.py, euler.py, dpm_solver.py
    registry.py     each by its name

To add a sampler: write a function of (schedule, steps, start) that returns a Trajectory, and add it to SAMPLERS in registry.py.
"""

from diffuserve.samplers.matrices import Trajectory, advance, initial_state, noised_state
from diffuserve.samplers.noise_schedule import NoiseSchedule
from diffuserve.samplers.registry import SAMPLERS, Sampler, sampler_from_config, trajectory

__all__ = [
    "SAMPLERS",
    "NoiseSchedule",
    "Sampler",
    "Trajectory",
    "advance",
    "initial_state",
    "noised_state",
    "sampler_from_config",
    "trajectory",
]
