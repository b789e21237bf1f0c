"""A checkpoint as one .safetensors file in the layout of the original code, as most fine-tuned models are shared.

It holds weights only. diffusers knows the layout; configs and tokenizers come from a checkpoint in its own format.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffuserve.errors import CheckpointError
from diffuserve_export.quiet import quiet

if TYPE_CHECKING:
    from diffuserve_export.checkpoint import Checkpoint

# Components that the pipelines would load, and that nothing here needs.
_LEFT_OUT = ("scheduler", "safety_checker", "feature_extractor", "image_encoder")


def config_of_single_file(file: Path) -> str:
    """The id on the Hugging Face hub of the checkpoint whose configs diffusers takes for such a file.

    It follows from which tensors there are. What follows from none of them is not known: whether a Stable Diffusion 2.x
    model predicts v or epsilon, for one, so it is the configs that decide.

    Raises:
        CheckpointError: it is of a kind that is not supported.
    """
    with quiet():
        from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type

    kind = infer_diffusers_model_type(_Shapes(file))
    # v1 is also what diffusers calls that which it does not know.
    if kind not in ("v1", "v2", "xl_base") or "model.diffusion_model.input_blocks.0.0.weight" not in _Shapes(file):
        raise CheckpointError(
            f"{file} is not a Stable Diffusion 1.x, 2.x or XL model in the original layout (diffusers takes it for "
            f"{kind}). A LoRA, a VAE or a UNet alone is no checkpoint: give a LoRA by --lora beside its checkpoint."
        )
    return str(DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"])


def parts_of_single_file(file: Path, checkpoint: Checkpoint, tokenizers: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's UNet, VAE and text encoders.

    Args:
        file: where all weights are.
        checkpoint: where the configs are.
        tokenizers: by component; diffusers would load them once more.

    Raises:
        CheckpointError: the weights are not those that the configs describe.
    """
    import diffusers

    pipeline_class = getattr(diffusers, checkpoint.pipeline)
    left_out = {part: None for part in _LEFT_OUT if part in inspect.signature(pipeline_class).parameters}
    try:
        pipeline = pipeline_class.from_single_file(
            str(file), config=str(checkpoint.path), local_files_only=True, **left_out, **tokenizers
        )
    except Exception as error:  # KeyErrors for what is not in the file, and each library's own errors
        raise CheckpointError(
            f"{file} cannot be loaded with the configs of {checkpoint.path}: {type(error).__name__}: {error}. They are "
            "probably of another kind of model: name a folder of the same kind by --config."
        ) from error
    parts = {part: getattr(pipeline, part) for part in checkpoint.configs if part not in ("scheduler", *tokenizers)}
    for part, module in parts.items():
        # diffusers leaves what is not in the file without memory behind it.
        if missing := [name for name, weight in module.named_parameters() if weight.is_meta]:
            raise CheckpointError(
                f"{file} lacks {len(missing)} of the weights that {checkpoint.path / part / 'config.json'} describes: "
                f"{', '.join(missing[:3])} ... They are probably of another kind of model: name a folder of the same "
                "kind by --config."
            )
    return parts


class _Shapes:
    """The tensors of a safetensors file by name, of which only the shape can be asked: all that telling kinds takes."""

    def __init__(self, file: Path) -> None:
        from safetensors import safe_open

        with safe_open(file, framework="numpy") as tensors:
            self._shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def __getitem__(self, name: str) -> _Shape:
        return _Shape(self._shapes[name])


class _Shape:
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
