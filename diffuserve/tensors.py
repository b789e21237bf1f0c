"""Name, dtype and dims of every tensor between the stages; those on the wire are in `diffuserve.wire`.

The exported graphs and the Triton configurations are made from this table. Dtypes are Triton's names; dims leave out the
batch dimension. Those of any length have a name, by which whoever makes an input knows what to fill in.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

NUMPY_DTYPE = {
    "FP32": "float32",
    "INT32": "int32",
    "INT64": "int64",
    "FP64": "float64",
    "UINT8": "uint8",
    "BOOL": "bool",
    "BYTES": "object",
}


# Dimensions of any length: of a prompt, of latents, and of images in pixels.
TOKENS = "tokens"
LATENT_HEIGHT, LATENT_WIDTH = "latent_height", "latent_width"
HEIGHT, WIDTH = "height", "width"


class TensorSpec(msgspec.Struct, frozen=True):
    """One tensor: `dims` without the batch dimension; of any length are those with a name, and lists, whose only one is -1."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]
    optional: bool = False

    @property
    def triton_dims(self) -> tuple[int, ...]:
        """`dims` as Triton writes them: -1 is any length."""
        return tuple(-1 if isinstance(dim, str) else dim for dim in self.dims)

    @property
    def free_dims(self) -> tuple[str, ...]:
        """The names of those of any length."""
        return tuple(dim for dim in self.dims if isinstance(dim, str))

    def shape(self, batch: int, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """A shape of it, batch included, with the length of each named dimension from `sizes`."""
        return (batch, *(sizes[dim] if isinstance(dim, str) else dim for dim in self.dims))


class StageSpec(msgspec.Struct, frozen=True):
    """The inputs and outputs of one stage."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


# The stages that every model has, in the order in which a prompt passes them.
TEXT_ENCODER = "text_encoder"
UNET = "unet"
VAE_DECODER = "vae_decoder"
VAE_ENCODER = "vae_encoder"
STAGES = (TEXT_ENCODER, UNET, VAE_DECODER, VAE_ENCODER)
# The one that some have: it looks at finished images.
SAFETY_CHECKER = "safety_checker"

SAMPLE = "sample"
TIMESTEP = "timestep"
ENCODER_HIDDEN_STATES = "encoder_hidden_states"
TEXT_EMBEDS = "text_embeds"
TIME_IDS = "time_ids"
TIMESTEP_COND = "timestep_cond"
NOISE_PRED = "noise_pred"
LATENT_SAMPLE = "latent_sample"
IMAGE = "image"
# Whether all that an image was rounded from is finite: bytes cannot tell black from not a number.
FINITE = "finite"
CLIP_INPUT = "clip_input"
CONCEPT_SCORES = "concept_scores"

# What Stable Diffusion's safety checker looks for; its concepts have no published names.
_CONCEPTS = 17


def stage_specs(
    *,
    max_tokens: int,
    hidden_size: int,
    latent_channels: int,
    pooled_size: int = 0,
    guidance_size: int = 0,
    checked_px: int = 0,
) -> dict[str, StageSpec]:
    """Tensors of each stage of a Stable Diffusion model.

    Args:
        max_tokens: the tokenizer's length L (77 in Stable Diffusion).
        hidden_size: width D of the text encoder's hidden state; of both encoders' together, if there are two.
        latent_channels: C, channels of the VAE's latents.
        pooled_size: width P of the second text encoder's pooled embedding (SDXL); 0 where there is one encoder only.
        guidance_size: width G of the guidance scale's embedding (LCM); 0 where the UNet takes none.
        checked_px: side S of what the safety checker sees of an image; 0 where there is none.
    """
    input_ids: tuple[TensorSpec, ...] = (TensorSpec("input_ids", "INT32", (max_tokens,)),)
    pooled: tuple[TensorSpec, ...] = ()
    added: tuple[TensorSpec, ...] = ()
    if pooled_size:
        input_ids += (TensorSpec("input_ids_2", "INT32", (max_tokens,)),)
        pooled = (TensorSpec(TEXT_EMBEDS, "FP32", (pooled_size,)),)
        added = (*pooled, TensorSpec(TIME_IDS, "FP32", (6,)))
    if guidance_size:
        added += (TensorSpec(TIMESTEP_COND, "FP32", (guidance_size,)),)
    hidden = TensorSpec(ENCODER_HIDDEN_STATES, "FP32", (max_tokens, hidden_size))
    # The UNet takes any number of tokens, since longer prompts are encoded in chunks.
    context = TensorSpec(ENCODER_HIDDEN_STATES, "FP32", (TOKENS, hidden_size))
    latent_dims = (latent_channels, LATENT_HEIGHT, LATENT_WIDTH)
    sample = TensorSpec(SAMPLE, "FP32", latent_dims)
    noise_pred = TensorSpec(NOISE_PRED, "FP32", latent_dims)
    latent_sample = TensorSpec(LATENT_SAMPLE, "FP32", latent_dims)
    image = TensorSpec(IMAGE, "UINT8", (HEIGHT, WIDTH, 3))
    specs = {
        TEXT_ENCODER: StageSpec(input_ids, (hidden, *pooled)),
        # The timestep is batched: rows of one call may be at different steps. Triton has no batched scalar, so each
        # row's timestep is a vector of one, and the exported graph drops that dimension.
        UNET: StageSpec((sample, TensorSpec(TIMESTEP, "FP32", (1,)), context, *added), (noise_pred,)),
        VAE_DECODER: StageSpec((latent_sample,), (image, TensorSpec(FINITE, "BOOL", (1,)))),
        VAE_ENCODER: StageSpec((image,), (latent_sample,)),
    }
    if checked_px:
        clip_input = TensorSpec(CLIP_INPUT, "FP32", (3, checked_px, checked_px))
        specs[SAFETY_CHECKER] = StageSpec((clip_input,), (TensorSpec(CONCEPT_SCORES, "FP32", (_CONCEPTS,)),))
    return specs


STABLE_DIFFUSION = "stable_diffusion"
