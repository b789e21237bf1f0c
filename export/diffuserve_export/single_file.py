"""A checkpoint as one .safetensors file in the layout of the original code, as most fine-tuned models are shared.

It holds weights only: configs and tokenizers come from a checkpoint in diffusers' format.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from diffuserve.errors import CheckpointError
from diffuserve_export.quiet import quiet
from diffuserve_export.safetensors_file import TensorInfo

_PARTS: Mapping[str, tuple[str, ...]] = {
    "UNet (model.diffusion_model)": ("model.diffusion_model.",),
    "autoencoder (first_stage_model)": ("first_stage_model.", "vae."),
    "text encoder (cond_stage_model or conditioner)": ("cond_stage_model.", "conditioner.embedders."),
}
# Playground 2.5 and CosXL: the noise is not that of a beta schedule.
_EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")


def check_parts(file: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Raises CheckpointError for a file that is something else than a whole checkpoint of Stable Diffusion."""
    if edm := [name for name in _EDM if name in tensors]:
        raise CheckpointError(
            f"{file} has {' and '.join(edm)}: it was trained with EDM's noise (Karras et al., arXiv:2206.00364), as Playground "
            "2.5 and CosXL were, which is not supported."
        )
    missing = [part for part, prefixes in _PARTS.items() if not any(name.startswith(prefixes) for name in tensors)]
    if missing:
        raise CheckpointError(
            f"{file} holds no {' and no '.join(missing)}, so it is no whole checkpoint in the original layout. Give a LoRA by "
            "--lora beside its checkpoint; and for weights in diffusers' format the folder with the model_index.json."
        )


def config_of_single_file(file: Path, tensors: Mapping[str, TensorInfo]) -> str:
    """The id on the Hugging Face hub of the checkpoint whose configs diffusers takes for such a file.

    It follows from which tensors there are. What follows from none of them is not known: whether a Stable Diffusion 2.x
    model predicts v or epsilon, for one, so it is the configs that decide.

    Raises:
        CheckpointError: it is of a kind that is not supported.
    """
    with quiet():
        from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type

    try:
        kind = infer_diffusers_model_type(tensors)  # which looks at names and shapes
    except Exception:  # it fails in many ways for files of which it knows half
        kind = "unknown"
    # v1 is also what diffusers calls that which it does not know.
    if kind not in ("v1", "v2", "xl_base") or "model.diffusion_model.input_blocks.0.0.weight" not in tensors:
        raise CheckpointError(
            f"{file} is not a Stable Diffusion 1.x, 2.x or XL model in the original layout (diffusers takes it for "
            f"{kind}). A LoRA, a VAE or a UNet alone is no checkpoint: give a LoRA by --lora beside its checkpoint."
        )
    return str(DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"])
