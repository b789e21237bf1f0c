"""The names of the original layout, for the shapes of published models, against those that diffusers converts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffuserve_export.checkpoint.accounting import Origin, whole_trailing_layers
from diffuserve_export.checkpoint.original_layout import ignored_in_original, origins_in_original

CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def unet_config(levels: str, widths: tuple[int, ...], **settings: Any) -> dict[str, Any]:
    """`levels`: x with attention, - without, from the outermost."""
    kinds = [CROSS if level == "x" else PLAIN for level in levels]
    return {
        "block_out_channels": widths,
        "down_block_types": tuple(down for down, _ in kinds),
        "up_block_types": tuple(up for _, up in reversed(kinds)),
        **settings,
    }


UNETS = {
    "1.5": unet_config("xxx-", (320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8),
    "2.1": unet_config(
        "xxx-",
        (320, 640, 1280, 1280),
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
    ),
    "XL": unet_config(
        "-xx",
        (320, 640, 1280),
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    # Pruned ones: fewer and uneven transformers, no attention in the middle, one layer a block.
    "SSD-1B": unet_config(
        "-xx",
        (320, 640, 1280),
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=((0, 0), (2, 2), (4, 4)),
        reverse_transformer_layers_per_block=((4, 4, 10), (2, 1, 1), (0, 0, 0)),
        mid_block_type="UNetMidBlock2D",
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    "one layer": unet_config("xx", (320, 640), cross_attention_dim=768, attention_head_dim=8, layers_per_block=1),
}
PREFIX = "model.diffusion_model."


@pytest.mark.parametrize("name", UNETS)
def test_unets(name: str) -> None:
    with init_empty_weights():
        unet = UNet2DConditionModel(**UNETS[name])
    origins = origins_in_original({"unet": unet}, [])["unet"]
    # Each tensor stands for itself by a number of its own.
    numbers = {origin.name: torch.tensor(i) for i, origin in enumerate(origins.values())}
    converted = convert_ldm_unet_checkpoint(numbers, dict(unet.config))
    assert len(numbers) == len(origins) == len(unet.state_dict())
    assert {key: int(value) for key, value in converted.items()} == {
        key: int(numbers[origin.name]) for key, origin in origins.items()
    }


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae."])
@pytest.mark.parametrize("layers", [1, 2])
def test_autoencoders(layers: int, prefix: str) -> None:
    with init_empty_weights():
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=layers,
        )
    names = {origin.name for origin in origins_in_original({"vae": vae}, [])["vae"].values()}
    named = [name.replace("first_stage_model.", prefix) for name in names]
    origins = origins_in_original({"vae": vae}, named)["vae"]
    numbers = {origin.name: torch.full((1, 1, 1, 1), i) for i, origin in enumerate(origins.values())}
    assert set(named) == set(numbers)
    converted = convert_ldm_vae_checkpoint(numbers, dict(vae.config))
    assert {key: int(value) for key, value in converted.items()} == {
        key: int(numbers[origin.name]) for key, origin in origins.items()
    }
    assert {value.shape for key, value in converted.items() if ".attentions." in key} == {(1, 1)}
    assert all(origin.convolution == (".attentions." in key) for key, origin in origins.items())


def text_config(layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=11,
        hidden_size=6,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        projection_dim=6,
    )


def file_shape(origin: Origin, shape: torch.Size) -> tuple[int, ...]:
    return (3 * shape[0], *shape[1:]) if origin.third is not None else tuple(shape)


@pytest.mark.parametrize(
    ("prefix", "model_class", "layers"),
    [
        ("cond_stage_model.model.", CLIPTextModel, 23),
        ("conditioner.embedders.0.model.", CLIPTextModel, 23),
        ("conditioner.embedders.1.model.", CLIPTextModelWithProjection, 32),
    ],
)
def test_open_clip(prefix: str, model_class: Any, layers: int) -> None:
    """The projection is square here, so that its shape does not tell whether it is transposed."""
    model = model_class(text_config(layers))
    two = model_class is CLIPTextModelWithProjection
    part = "text_encoder_2" if two else "text_encoder"
    modules = {"text_encoder": CLIPTextModel(text_config(1)), part: model}
    origins = origins_in_original(modules, [f"{prefix}ln_final.bias"])[part]
    torch.manual_seed(0)
    file = {
        origin.name: torch.randn(file_shape(origin, model.state_dict()[name].shape)) for name, origin in origins.items()
    }
    file = {name if two else name.replace("cond_stage_model.model.", prefix): array for name, array in file.items()}
    origins = origins_in_original(modules, file)[part]
    # Where there is a projection, diffusers takes from it how wide queries, keys and values are.
    converted = convert_open_clip_checkpoint(model, file, prefix=prefix)
    expected = {key.removeprefix("text_model."): value for key, value in converted.items()}
    taken = {name.removeprefix("text_model."): origin.take(file[origin.name]) for name, origin in origins.items()}
    assert taken.keys() == expected.keys()
    assert all(torch.equal(taken[name], expected[name]) for name in taken)


@pytest.mark.parametrize("two", [False, True])
def test_clip(two: bool) -> None:
    prefix = f"{'conditioner.embedders.0' if two else 'cond_stage_model'}.transformer.text_model."
    model = CLIPTextModel(text_config(12))
    modules = {
        "text_encoder": model,
        **({"text_encoder_2": CLIPTextModelWithProjection(text_config(1))} if two else {}),
    }
    origins = origins_in_original(modules, [])["text_encoder"]
    assert {origin.name.startswith(prefix) for origin in origins.values()} == {True}
    file = {origin.name: torch.tensor(i) for i, origin in enumerate(origins.values())}
    converted = convert_ldm_clip_checkpoint(file)
    assert {key.removeprefix("text_model."): int(value) for key, value in converted.items()} == {
        key.removeprefix("text_model."): i for i, key in enumerate(origins)
    }


def test_tensors_that_are_no_weights() -> None:
    one = {"text_encoder": CLIPTextModel(text_config(2))}
    two = {**one, "text_encoder_2": CLIPTextModelWithProjection(text_config(2))}
    for name, with_one, with_two in (
        ("alphas_cumprod", True, True),
        ("log_one_minus_alphas_cumprod", True, True),
        ("sqrt_recipm1_alphas_cumprod", True, True),
        ("posterior_log_variance_clipped", True, True),
        ("v_pred", True, True),
        ("cond_stage_model.transformer.vision_model.embeddings.position_ids", True, True),
        ("cond_stage_model.model.text_projection", True, True),
        ("conditioner.embedders.0.transformer.text_projection.weight", True, True),
        ("conditioner.embedders.1.model.text_projection", False, False),
        ("conditioner.embedders.1.model.logit_scale", True, True),
        ("model_ema.diffusion_modelout0bias", True, True),
        ("model_ema.diffusion_modelout1bias", False, False),
        ("alphas", False, False),
        ("loss.logvar", False, False),
        ("control_model.zero_convs.0.0.bias", False, False),
        ("safety_checker.concept_embeds", False, False),
        ("lora_unet_mid_block.alpha", False, False),
    ):
        names = [name, f"{PREFIX}out.0.bias"]
        assert ignored_in_original(one, names) == ({name} if with_one else set())
        assert ignored_in_original(two, names) == ({name} if with_two else set())


def test_trailing_layers_are_left_out_whole() -> None:
    names = [f"x.layers.{i}.{rest}" for i in range(4) for rest in ("a", "b.c")]
    assert whole_trailing_layers(names, "x.layers.", 3) == {"x.layers.3.a", "x.layers.3.b.c"}
    assert len(whole_trailing_layers(names, "x.layers.", 2)) == 4
    assert whole_trailing_layers(names, "x.layers.", 4) == set()
    assert whole_trailing_layers(names, "layers.", 2) == set()
    assert whole_trailing_layers(names[:-1], "x.layers.", 2) == set()
    assert whole_trailing_layers([*names, "x.layers.3.d"], "x.layers.", 3) == set()
    assert whole_trailing_layers([name for name in names if "2" not in name], "x.layers.", 2) == set()
