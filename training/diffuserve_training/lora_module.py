"""Trains a LoRA for the UNet of any Stable Diffusion checkpoint, XL included, on a folder of pictures."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from diffuserve_training.config import ConfigError, Lora
from diffuserve_training.identity import begin_run, file_digest, weights_digest, without_steps
from diffuserve_training.optimisation import optimiser_of
from diffuserve_training.pictures import Picture, load_square
from diffuserve_training.step_module import StepModule

Conditioning = dict[str, Tensor]


class LoraModule(StepModule):
    """Texts and pictures are encoded once, at the start, so that only the UNet takes part in the steps.

    The target is what the checkpoint's scheduler says, the noise or v; the loss is the plain squared error.
    """

    def __init__(self, config: Lora, pipeline: Any, pictures: Sequence[Picture]) -> None:
        super().__init__(config.optimisation)
        from diffusers import DDPMScheduler

        self.config = config
        self.scheduler: Any = DDPMScheduler.from_config(pipeline.scheduler.config)
        self._size_px = config.size_px or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        self._latents = _encode_pictures(pipeline, pictures, self._size_px)
        self._conditions = [_encode_text(pipeline, picture.caption, self._size_px) for picture in pictures]
        self._empty = _encode_text(pipeline, "", self._size_px)
        self.unet = adapted(pipeline.unet, config)

    def training_step(self, batch: tuple[Tensor, Conditioning], batch_index: int) -> Tensor:
        latents, condition = batch
        generator = self.generator()
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        total = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(total, (len(latents),), generator=generator).to(latents.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        added = {name: value for name, value in condition.items() if name != "hidden"}
        predicted = self.unet(noisy, timesteps, condition["hidden"], added_cond_kwargs=added or None).sample
        kind = self.scheduler.config.prediction_type
        target = self.scheduler.get_velocity(latents, noise, timesteps) if kind == "v_prediction" else noise
        loss = functional.mse_loss(predicted.float(), target.float())
        self.log("error", loss.detach(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        return optimiser_of(self.unet, self.optimisation, self.progress)

    def batch(self, step: int, seed: tuple[int, ...]) -> tuple[Tensor, Conditioning]:
        choose = random.Random(str(seed))  # noqa: S311 - training data, no secret
        chosen = [choose.randrange(len(self._latents)) for _ in range(self.optimisation.batch_size)]
        conditions = [
            self._empty if choose.random() < self.config.empty_captions else self._conditions[index] for index in chosen
        ]
        return self._latents[chosen], {name: torch.cat([each[name] for each in conditions]) for name in self._empty}

    def save(self, path: Path) -> None:
        """What has been learnt so far: `write_lora`."""
        write_lora(self.unet, self.config, path)


def write_lora(unet: Any, config: Lora, path: Path) -> None:
    """One safetensors file in PEFT's format, which diffusers' `load_lora_weights` and `diffuserve export --lora` read.

    Args:
        unet: with the adapter that `adapted` gave it.
        config: the adapter's.
        path: the file; its folder is made.
    """
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save

    from diffuserve.files import write_whole

    # PEFT's names for all: diffusers' own exist for attention only, and of a file that has both it loads a part. They have
    # no place for alpha, so it is multiplied in: whoever reads the file takes the rank for it.
    factor = config.alpha / config.rank
    tensors = {
        f"unet.{name}": (value.detach() * (factor if ".lora_B." in name else 1)).to(torch.float16).contiguous()
        for name, value in get_peft_model_state_dict(unet).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save(tensors, metadata={"format": "pt"}))


def adapted(unet: Any, config: Lora) -> Any:
    """The UNet, its own weights frozen, with an adapter to train.

    Raises:
        ConfigError: it has no such `target_modules`.
    """
    from peft import LoraConfig

    unet.requires_grad_(False)
    try:
        unet.add_adapter(
            LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                init_lora_weights="gaussian",
                target_modules=list(config.target_modules),
            )
        )
    except ValueError as error:
        raise ConfigError(f"target_modules does not fit this UNet: {error}") from None
    return unet


def _encode_pictures(pipeline: Any, pictures: Sequence[Picture], size_px: int) -> Tensor:
    """(N, C, h, w), scaled."""
    latents = []
    with torch.inference_mode():
        for picture in pictures:
            square = torch.from_numpy(load_square(picture.path, size_px).copy())
            image = square.permute(2, 0, 1)[None].float() / 127.5 - 1
            latents.append(pipeline.vae.encode(image).latent_dist.mode() * pipeline.vae.config.scaling_factor)
    return torch.cat(latents).clone()


def _encode_text(pipeline: Any, caption: str, size_px: int) -> Conditioning:
    """`hidden`, and for XL what goes into the UNet's added conditions, a row each."""
    with torch.inference_mode():
        encoded = pipeline.encode_prompt(
            caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    if pipeline.unet.config.addition_embed_type != "text_time":
        return {"hidden": encoded[0].clone()}
    # Original size, top left corner of the crop, and target size (Podell et al., arXiv:2307.01952, section 2.2).
    time_ids = torch.tensor([[size_px, size_px, 0, 0, size_px, size_px]], dtype=torch.float32)
    return {"hidden": encoded[0].clone(), "text_embeds": encoded[2].clone(), "time_ids": time_ids}


def train_lora(config: Lora, pictures: Sequence[Picture], output: Path, devices: str = "auto") -> Path:
    """Writes `output`/lora.safetensors, and lora-run/ with checkpoints and logs.

    Raises:
        ConfigError: the checkpoint cannot be loaded, or does not fit the configuration; lora-run/ is another training's.
    """
    import diffusers

    from diffuserve_training.run import fit, seeded

    library: Any = diffusers
    try:
        pipeline = library.DiffusionPipeline.from_pretrained(
            config.checkpoint, dtype=torch.float32, safety_checker=None, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        missing = "" if Path(config.checkpoint).is_dir() else "there is no such folder, and the Hugging Face hub: "
        raise ConfigError(f"checkpoint: {config.checkpoint} cannot be loaded: {missing}{error}") from None
    if pipeline.unet.config.time_cond_proj_dim is not None:
        raise ConfigError(
            f"checkpoint: {config.checkpoint} is a latent consistency model. It was distilled to draw in few steps, which this "
            "training would undo. Train on the checkpoint that it was distilled from."
        )
    run = begin_run(output / "lora-run", *_parts(config, pipeline, pictures))
    seeded(config.optimisation)
    module = LoraModule(config, pipeline, pictures)
    path = output / "lora.safetensors"
    fit(module, run, on_save=lambda: module.save(path), devices=devices)
    return path


def _parts(config: Lora, pipeline: Any, pictures: Sequence[Picture]) -> list[Any]:
    """What a LoRA follows from, wherever the checkpoint and the pictures are."""
    optimisation = without_steps(config.optimisation)
    networks = [each for _, each in sorted(pipeline.components.items()) if isinstance(each, torch.nn.Module)]
    schedule = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    return [
        msgspec.structs.replace(config, optimisation=optimisation, checkpoint="", images="", prompt=None),
        [picture.caption for picture in pictures],
        *(file_digest(picture.path) for picture in pictures),
        schedule,
        weights_digest(*networks),
    ]
