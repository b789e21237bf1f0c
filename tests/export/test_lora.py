"""LoRAs in the formats that are shared: whose layers their names mean, DoRA, differences, PEFT's own settings, messages."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffuserve.errors import CheckpointError
from diffuserve_export.checkpoint.checkpoint import open_checkpoint
from diffuserve_export.checkpoint.load import model_from_checkpoint
from diffuserve_export.checkpoint.loaded_model import LoadedModel
from diffuserve_export.export import bundle_from_checkpoint
from diffuserve_export.lora import Lora, fuse_loras, lora_from_text
from diffuserve_export.quiet import quiet
from diffuserve_export.reference_image import reference_from_model
from tests.export.lora_files import NAMINGS, File, assert_weights, changeable, weights_of
from tests.export.tiny import write_sdxl_checkpoint

ATTENTION = "unet.down_blocks.0.attentions.0.transformer_blocks.0."
QUERY, OUT, CONVOLUTION = f"{ATTENTION}attn1.to_q.weight", f"{ATTENTION}attn1.to_out.0.weight", "unet.conv_in.weight"
TEXT = "text_encoder.encoder.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def plain(shared_checkpoint: Path) -> LoadedModel:
    return model_from_checkpoint(open_checkpoint(shared_checkpoint))


@pytest.fixture(scope="module")
def plain_xl(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return model_from_checkpoint(open_checkpoint(write_sdxl_checkpoint(tmp_path_factory.mktemp("xl") / "xl")))


def make(model: LoadedModel, naming: str, *weights: str, seed: int = 0, alpha: float | None = 3.0) -> File:
    """Every weight with a rank of its own."""
    rng, file = np.random.default_rng(seed), File(model, naming)
    for number, weight in enumerate(weights):
        file.add(weight, rng, rank=2 + number, alpha=None if alpha is None else alpha + number)
    return file


def fused(model: LoadedModel, *loras: Lora) -> LoadedModel:
    changed = copy.deepcopy(model)
    fuse_loras(changed, loras)
    return changed


def fused_by_diffusers(model: LoadedModel, path: Path) -> LoadedModel:
    changed = copy.deepcopy(model)
    with quiet():
        pipeline = changed.pipeline()
        pipeline.load_lora_weights(path.parent, weight_name=path.name)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    return changed


def with_formula(weights: dict[str, Any], file: File, scale: float) -> dict[str, Any]:
    return {name: (weight + scale * file.products.get(name, 0)).astype(np.float32) for name, weight in weights.items()}


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_layer_is_found_by_its_name(
    naming: str, plain: LoadedModel, plain_xl: LoadedModel, tmp_path: Path
) -> None:
    for model in (plain, plain_xl):
        file = make(model, naming, *changeable(model))
        path = file.save(tmp_path / "style.safetensors")
        assert_weights(fused(model, Lora(path, 0.5)), model, [(0.5, file.products)])


@pytest.mark.parametrize("naming", ["kohya", "diffusers", "original"])
def test_diffusers_finds_the_same_layers(
    naming: str, plain: LoadedModel, plain_xl: LoadedModel, tmp_path: Path
) -> None:
    """Where all alphas are alike, diffusers' own loader is another witness to what the names mean."""
    model = plain_xl if naming == "original" else plain
    wanted = [name for name in changeable(model) if ".attn" in name or ".self_attn." in name or "resnets" in name]
    if naming == "kohya":  # of kohya's convolutions diffusers reads those of the original names only
        wanted = [name for name in wanted if "resnets" not in name]
    rng, file = np.random.default_rng(0), File(model, naming)
    for weight in wanted:
        file.add(weight, rng, rank=4, alpha=None if naming == "diffusers" else 2.0)
    path = file.save(tmp_path / "style.safetensors")
    ours, theirs = weights_of(fused(model, Lora(path, 1.0))), weights_of(fused_by_diffusers(model, path))
    assert sum((ours[name] != weight).any() for name, weight in weights_of(model).items()) == len(wanted)
    for name, weight in theirs.items():
        np.testing.assert_allclose(ours[name], weight, atol=1e-5, err_msg=name)


def test_two_namings_in_one_file(plain: LoadedModel, tmp_path: Path) -> None:
    kohya, diffusers = make(plain, "kohya", QUERY), make(plain, "diffusers", CONVOLUTION, alpha=None)
    kohya.tensors |= diffusers.tensors
    path = kohya.save(tmp_path / "style.safetensors")
    assert_weights(fused(plain, Lora(path, 1.0)), plain, [(1.0, kohya.products), (1.0, diffusers.products)])
    kohya.tensors |= make(plain, "lycoris", QUERY).tensors
    with pytest.raises(CheckpointError, match=r"attn1\.to_q has two tensors of one kind: lora_unet_.* and lycoris_"):
        fused(plain, Lora(kohya.save(path), 1.0))


def test_the_oldest_names_of_diffusers(plain: LoadedModel, tmp_path: Path) -> None:
    file = make(plain, "old diffusers", QUERY, OUT, TEXT, alpha=None)
    renames = (
        ("to_out.0", "to_out"),
        (".self_attn.q_proj.lora.", ".self_attn.to_q_lora."),
        (".attn1.to_", ".attn1.processor.to_"),
        (".lora.", "_lora."),
        ("unet.", ""),
    )
    renamed = {reduce(lambda key, pair: key.replace(*pair), renames, key): array for key, array in file.tensors.items()}
    assert any(key.endswith("transformer_blocks.0.attn1.processor.to_out_lora.down.weight") for key in renamed)
    save_file(renamed, tmp_path / "style.safetensors")
    assert_weights(fused(plain, Lora(tmp_path / "style.safetensors", 1.0)), plain, [(1.0, file.products)])


def test_bfloat16(plain: LoadedModel, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    file = make(plain, "kohya", QUERY, alpha=None)
    tensors = {name: torch.from_numpy(array).bfloat16() for name, array in file.tensors.items()}
    save_torch(tensors, tmp_path / "style.safetensors")
    down, up = (tensor.float().numpy().astype(np.float64) for tensor in tensors.values())
    changes = [(0.5, {QUERY: up @ down})]
    assert_weights(fused(plain, Lora(tmp_path / "style.safetensors", 0.5)), plain, changes)


def test_linear_layers_and_convolutions_of_one_pixel_stand_for_each_other(
    plain: LoadedModel, plain_xl: LoadedModel, tmp_path: Path
) -> None:
    """proj_in is a convolution in Stable Diffusion 1 and linear in XL, and files have either form for both."""
    xl = "unet.down_blocks.1.attentions.0.proj_in.weight"
    for model, name in ((plain, "unet.down_blocks.0.attentions.0.proj_in.weight"), (plain_xl, xl)):
        file = make(model, "kohya", name)
        for key, array in file.tensors.items():
            if array.ndim:
                file.tensors[key] = array[:, :, 0, 0] if array.ndim == 4 else array[:, :, None, None]
        path = file.save(tmp_path / "style.safetensors")
        assert_weights(fused(model, Lora(path, 1.0)), model, [(1.0, file.products)])


def test_dora(plain: LoadedModel, tmp_path: Path) -> None:
    """W + scale * (m (W + BA) / |W + BA| - W), norms over each output's weights, or over each input's (LyCORIS)."""
    rng, before = np.random.default_rng(3), weights_of(plain)
    for naming, part, axis in (
        ("kohya", "dora_scale", 0),
        ("kohya", "dora_scale", 1),
        ("diffusers", "lora_magnitude_vector", 0),
    ):
        file, changes = File(plain, naming), {}
        for name in (QUERY, CONVOLUTION, f"{ATTENTION}ff.net.2.weight"):
            weight = before[name].astype(np.float64)
            key = file.add(name, rng, rank=3, alpha=1.5 if naming == "kohya" else None)
            merged = weight + file.products[name]
            norms = np.sqrt((merged**2).sum(axis=tuple(i for i in range(weight.ndim) if i != axis), keepdims=True))
            magnitude = rng.uniform(0.5, 2, norms.shape).astype(np.float32)
            changes[name] = magnitude * merged / norms - weight
            # PEFT keeps a linear layer's as a vector, and a convolution's with the outputs second.
            as_peft = magnitude.ravel() if weight.ndim == 2 else magnitude.reshape(1, -1, 1, 1)
            file.tensors[f"{key}.{part}"] = magnitude if naming == "kohya" else as_peft
        path = file.save(tmp_path / "style.safetensors")
        for scale in (1.0, 0.5, 0.0):
            assert_weights(fused(plain, Lora(path, scale)), plain, [(scale, changes)])


def test_dora_of_peft_is_what_diffusers_fuses(plain: LoadedModel, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    file = make(plain, "diffusers", QUERY, OUT, alpha=None)
    for name in (QUERY, OUT):
        magnitude = rng.uniform(0.5, 2, len(weights_of(plain)[name])).astype(np.float32)
        file.tensors[f"{file.key(name)}.lora_magnitude_vector"] = magnitude
    path = file.save(tmp_path / "style.safetensors")
    ours, theirs = weights_of(fused(plain, Lora(path, 1.0))), weights_of(fused_by_diffusers(plain, path))
    for name, weight in theirs.items():
        np.testing.assert_allclose(ours[name], weight, atol=1e-5, err_msg=name)


def test_differences_of_weights_biases_and_norms(plain: LoadedModel, tmp_path: Path) -> None:
    before = weights_of(plain)
    norm = f"{ATTENTION}norm1"
    changes = {
        name: np.random.default_rng(5).standard_normal(before[name].shape).astype(np.float32)
        for name in (QUERY, CONVOLUTION, "unet.conv_in.bias", f"{norm}.weight", f"{norm}.bias")
    }
    prefix = "lora_unet_" + norm.removeprefix("unet.").replace(".", "_")
    tensors = {
        "lora_unet_conv_in.diff": changes[CONVOLUTION],
        "lora_unet_conv_in.diff_b": changes["unet.conv_in.bias"],
        f"{prefix}.w_norm": changes[f"{norm}.weight"],
        f"{prefix}.b_norm": changes[f"{norm}.bias"],
        File(plain, "comfyui").key(QUERY) + ".diff": changes[QUERY],
    }
    save_file(tensors, tmp_path / "style.safetensors")
    assert_weights(fused(plain, Lora(tmp_path / "style.safetensors", -0.5)), plain, [(-0.5, changes)])
    save_file({**tensors, f"{File(plain, 'kohya').key(QUERY)}.diff_b": np.ones(32, "f4")}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"to_q\.diff_b changes a bias, and unet\..*to_q has none"):
        fused(plain, Lora(tmp_path / "b.safetensors", 1.0))


PEFT_SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "init_lora_weights": True}


def write_adapter(folder: Path, file: File, **settings: Any) -> Path:
    """As PEFT's save_pretrained() does."""
    folder.mkdir(exist_ok=True)
    tensors = {f"base_model.model.{name.partition('.')[2]}": array for name, array in file.tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(PEFT_SETTINGS | settings))
    return folder


@pytest.mark.parametrize("name", [QUERY, TEXT])
def test_a_folder_of_peft(name: str, plain: LoadedModel, tmp_path: Path) -> None:
    file = make(plain, "diffusers", name, alpha=None)  # of rank 2
    for settings, factor in (
        ({}, 6 / 2),
        ({"use_rslora": True}, 6 / np.sqrt(2)),
        ({"alpha_pattern": {"nothing": 1, "attn1.to_q|q_proj": 5}}, 5 / 2),
        ({"init_lora_weights": "gaussian"}, 6 / 2),
    ):
        folder = write_adapter(tmp_path / "my style", file, **settings)
        for path in (folder, folder / "adapter_model.safetensors"):
            lora = lora_from_text(f"{path}:0.5")
            assert lora.fused.name == "my style"
            assert_weights(fused(plain, lora), plain, [(0.5 * factor, file.products)])


def test_the_folder_s_settings_are_part_of_its_hash(plain: LoadedModel, tmp_path: Path) -> None:
    file = make(plain, "diffusers", QUERY, alpha=None)
    hashes = {Lora(write_adapter(tmp_path / "a", file, lora_alpha=alpha), 1.0).fused.sha256 for alpha in (1, 2)}
    assert len(hashes) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "says that it is a LOHA"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights='pissa_niter_4', which changes the base model's own",
        ),
        ({"use_qalora": True}, "has use_qalora, a variant"),
        ({"lora_alpha": "much"}, "adapter_config.json is damaged: Expected `float`"),
        ({"use_dora": True}, r"its settings say use_dora, and unet\..*to_q has no magnitudes"),
        ({"alpha_pattern": {"(([a-z0-9_.]+)+)+!": 4}}, r"has the alpha_pattern '\(\(\[a-z.* write the layers' names"),
        ({"alpha_pattern": {".*.*.*.*x": 4}}, "up to 3 times"),
        ({"alpha_pattern": {"(": 4}}, "adapter_config.json is damaged"),
    ],
)
def test_adapters_of_peft_that_are_more_than_lora(
    settings: dict[str, Any], message: str, plain: LoadedModel, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "a", make(plain, "diffusers", QUERY, alpha=None), **settings)
    with pytest.raises(CheckpointError, match=message):
        fused(plain, Lora(folder, 1.0))


def test_peft_s_file_without_its_settings(plain: LoadedModel, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", make(plain, "diffusers", QUERY, alpha=None))
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"was written by PEFT, and its strength stands in adapter_config\.json"):
        fused(plain, Lora(folder, 1.0))


def test_patterns_are_for_names_within_the_component(plain: LoadedModel, tmp_path: Path) -> None:
    """As PEFT has them, which knows no parts: anchored, too."""
    file = make(plain, "diffusers", QUERY, alpha=None)
    pattern = "^" + re.escape(QUERY.removeprefix("unet.").removesuffix(".weight"))
    header = {"unet.r": 2, "unet.lora_alpha": 6, "unet.alpha_pattern": {pattern: 5}}
    path = file.save(tmp_path / "style.safetensors", lora_adapter_metadata=json.dumps(header))
    assert_weights(fused(plain, Lora(path, 1.0)), plain, [(5 / 2, file.products)])
    folder = write_adapter(tmp_path / "a", file, alpha_pattern={pattern: 5})
    assert_weights(fused(plain, Lora(folder, 1.0)), plain, [(5 / 2, file.products)])


def test_settings_in_the_header(plain: LoadedModel, tmp_path: Path) -> None:
    """diffusers' own training scripts write alpha into the file's header, by part."""
    unet, text = make(plain, "diffusers", QUERY, alpha=None), make(plain, "diffusers", TEXT, alpha=None)
    unet.tensors |= text.tensors
    header = {"unet.r": 2, "unet.lora_alpha": 6, "text_encoder.r": 2, "text_encoder.lora_alpha": 1}
    path = unet.save(tmp_path / "style.safetensors", format="pt", lora_adapter_metadata=json.dumps(header))
    changes = [(6 / 2, unet.products), (1 / 2, text.products)]
    assert_weights(fused(plain, Lora(path, 1.0)), plain, changes)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('{"r": 2, "lora_alpha": 6}', "in its header is for none of unet, text_encoder_2, text_encoder"),
        ('{"transformer.r": 2, "transformer.lora_alpha": 6}', "in its header is for none of unet"),
        ('{"unet.r": ' + "[" * 200_000, "in its header is damaged"),
    ],
)
def test_settings_in_the_header_that_cannot_be_meant(
    entry: str, message: str, plain: LoadedModel, tmp_path: Path
) -> None:
    path = make(plain, "diffusers", QUERY, alpha=None).save(tmp_path / "a.safetensors", lora_adapter_metadata=entry)
    with pytest.raises(CheckpointError, match=message):
        fused(plain, Lora(path, 1.0))


def test_a_text_encoder_that_two_families_share(plain: LoadedModel, plain_xl: LoadedModel, tmp_path: Path) -> None:
    """The names and shapes of Stable Diffusion XL's first text encoder are those of 1's, so the header decides."""
    for model, naming, base in ((plain, "kohya", "sdxl_base_v1-0"), (plain_xl, "kohya", "sd_v1")):
        file = make(model, naming, TEXT)
        with pytest.raises(
            CheckpointError, match=r"it was trained for another family\. Its header names the base model"
        ):
            fused(model, Lora(file.save(tmp_path / "a.safetensors", ss_base_model_version=base), 1.0))
        fused(model, Lora(file.save(tmp_path / "a.safetensors", ss_base_model_version="my own"), 1.0))


def test_a_scale_beyond_all_numbers(plain: LoadedModel, tmp_path: Path) -> None:
    path = make(plain, "kohya", QUERY).save(tmp_path / "style.safetensors")
    with pytest.raises(
        CheckpointError, match=r"With style\.safetensors:1e\+300 the weight of unet\..* Take a smaller scale"
    ):
        fused(plain, Lora(path, 1e300))


def test_several(shared_checkpoint: Path, plain: LoadedModel, tmp_path: Path) -> None:
    first, second = make(plain, "diffusers", QUERY, OUT), make(plain, "kohya", QUERY, seed=1)
    loras = (Lora(first.save(tmp_path / "a.safetensors"), 1.0), Lora(second.save(tmp_path / "b.safetensors"), -0.25))
    opened = open_checkpoint(shared_checkpoint, loras=loras)
    assert_weights(model_from_checkpoint(opened), plain, [(1.0, first.products), (-0.25, second.products)])
    assert opened.source == "tiny + a.safetensors:1 + b.safetensors:-0.25"
    assert [(lora.name, lora.scale) for lora in opened.fused_loras] == [("a", 1.0), ("b", -0.25)]
    data = opened.loras[0].path.read_bytes()
    tensors = load_file(opened.loras[0].path)
    weights = data[-sum(tensor.nbytes for tensor in tensors.values()) :]
    [named, _] = opened.fused_loras
    assert named.sha256 == hashlib.sha256(data).hexdigest()
    assert named.weights_sha256 == hashlib.sha256(weights).hexdigest() != named.sha256


def test_the_reference_image_is_of_weights_merged_by_the_formula(
    shared_checkpoint: Path, plain: LoadedModel, tmp_path: Path
) -> None:
    """Merged here by numpy and drawn by diffusers: the same to the byte, and not the plain checkpoint's."""
    import torch

    file = File(plain, "kohya")
    for number, weight in enumerate((QUERY, OUT, CONVOLUTION, TEXT, "unet.conv_out.weight")):
        file.add(weight, np.random.default_rng(number), rank=4, alpha=0.5 * number)
    opened = open_checkpoint(shared_checkpoint, loras=(Lora(file.save(tmp_path / "style.safetensors"), 0.7),))
    merged = copy.deepcopy(plain)
    for name, weight in with_formula(weights_of(plain), file, 0.7).items():
        part, _, rest = name.partition(".")
        module = getattr(merged, part)
        module.get_parameter(
            rest if rest in dict(module.named_parameters()) else f"text_model.{rest}"
        ).data = torch.from_numpy(weight)
    images = {}
    for title, model in (("ours", model_from_checkpoint(opened)), ("numpy's", merged), ("plain", plain)):
        (tmp_path / title).mkdir()
        reference_from_model(opened, model, tmp_path / title)
        images[title] = (tmp_path / title / "reference.png").read_bytes()
    assert images["ours"] == images["numpy's"] != images["plain"]


def test_the_hash_follows_file_and_scale(shared_checkpoint: Path, plain: LoadedModel, tmp_path: Path) -> None:
    a = make(plain, "diffusers", QUERY).save(tmp_path / "a.safetensors")
    b = make(plain, "diffusers", QUERY, seed=1).save(tmp_path / "b.safetensors")
    loras: list[tuple[Lora, ...]] = [
        (),
        (Lora(a, 1.0),),
        (Lora(a, 0.5),),
        (Lora(b, 1.0),),
        (Lora(a, 1.0), Lora(b, 1.0)),
    ]
    hashes = {open_checkpoint(shared_checkpoint, loras=some).sha256 for some in loras}
    assert len(hashes) == len(loras)


def other_width(plain: LoadedModel, path: Path) -> Path:
    """Keys of this model, widths of another."""
    file = make(plain, "kohya", QUERY)
    down = next(name for name in file.tensors if "down" in name)
    file.tensors[down] = np.ones((2, 64), np.float32)
    return file.save(path)


def other_layers(plain: LoadedModel, path: Path) -> Path:
    """A layer that the model has, and one of a deeper model."""
    file = make(plain, "kohya", QUERY)
    for name in [*file.tensors]:
        file.tensors[name.replace("blocks_0_attn1", "blocks_9_attn1")] = file.tensors[name]
    return file.save(path, ss_base_model_version="sdxl_base_v1-0")


def second_text_encoder(plain: LoadedModel, path: Path) -> Path:
    file = make(plain, "kohya", TEXT)
    tensors = {name.replace("lora_te_", "lora_te2_"): array for name, array in file.tensors.items()}
    save_file(tensors, path, metadata={"ss_base_model_version": "sdxl_base_v1-0"})
    return path


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (other_width, "its layer leads from 64 to 32 numbers, and the model's from 32 to 32"),
        (
            other_layers,
            r"1 of its 2 layers are not this model's: .*blocks_9_attn1_to_q\. .*base model: sdxl_base_v1-0\.",
        ),
        (second_text_encoder, "1 of its 1 layers are not this model's: lora_te2_.*base model: sdxl_base_v1-0"),
    ],
)
def test_of_another_base_model(
    write: Callable[[LoadedModel, Path], Path], reason: str, shared_checkpoint: Path, plain: LoadedModel, tmp_path: Path
) -> None:
    path = write(plain, tmp_path / "style.safetensors")
    message = rf"style.safetensors does not fit this checkpoint: .*{reason}.*text width of 32"
    with pytest.raises(CheckpointError, match=message):
        bundle_from_checkpoint(open_checkpoint(shared_checkpoint, loras=(Lora(path, 1.0),)), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (("lora_unet_conv_in.hada_w1_a", "lora_unet_conv_in.hada_w1_b"), "is LoHa: "),
        (("lora_unet_conv_in.lokr_w1", "lora_unet_conv_in.lokr_w2"), "is LoKr: "),
        (("lora_unet_conv_in.oft_blocks",), "is OFT: "),
        (("clip_l",), "is a textual inversion: clip_l"),
        (("lora_unet_conv_in.a1.weight",), "is GLoRA: "),
        (("unet.conv_in.lora_B.bias",), "is a LoRA's own bias: "),
        (("conv_in.weight",), "holds no LoRA: none of its tensors is called .* The first is conv_in.weight"),
        ((), "holds no LoRA: it is empty"),
    ],
)
def test_what_is_not_a_lora_is_called_what_it_is(
    keys: tuple[str, ...], kind: str, plain: LoadedModel, tmp_path: Path
) -> None:
    save_file({key: np.ones((4, 4), np.float32) for key in keys}, tmp_path / "style.safetensors")
    with pytest.raises(CheckpointError, match=kind):
        fused(plain, Lora(tmp_path / "style.safetensors", 1.0))


def test_alpha_alone_changes_nothing(plain: LoadedModel, tmp_path: Path) -> None:
    """As resized files have it for layers of which nothing was left."""
    file = make(plain, "kohya", QUERY)
    file.tensors[f"{file.key(OUT)}.alpha"] = np.array(4, np.float32)
    path = file.save(tmp_path / "style.safetensors")
    assert_weights(fused(plain, Lora(path, 1.0)), plain, [(1.0, file.products)])


@pytest.mark.parametrize(
    "name",
    ["stil größer 模型", "v1.0 [pruned] #1, 100%", "-leading 'quotes\"", "C:0.5", "{braces} $HOME `x`", ".hidden"],
)
def test_odd_file_names(name: str, shared_checkpoint: Path, plain: LoadedModel, tmp_path: Path) -> None:
    file = make(plain, "kohya", QUERY)
    lora = lora_from_text(f"{file.save(tmp_path / f'{name}.safetensors')}:-0.5")
    opened = open_checkpoint(shared_checkpoint, loras=(lora,))
    assert (lora.scale, opened.fused_loras[0].name) == (-0.5, name)
    assert_weights(model_from_checkpoint(opened), plain, [(-0.5, file.products)])


def test_text_form(plain: LoadedModel, tmp_path: Path) -> None:
    path = make(plain, "kohya", QUERY).save(tmp_path / "a:b.safetensors")
    half = make(plain, "kohya", QUERY).save(tmp_path / "half:0.5")
    upper = make(plain, "kohya", QUERY).save(tmp_path / "STYLE.SAFETENSORS")
    folder = write_adapter(tmp_path / "adapter", make(plain, "diffusers", QUERY, alpha=None))
    for text, expected in (
        (f"{path}:-0.5", Lora(path, -0.5)),
        (f"{path}", Lora(path, 1.0)),
        (f"{upper}:2", Lora(upper, 2.0)),
        (f"{folder}:2", Lora(folder, 2.0)),
    ):
        assert lora_from_text(text) == expected
    half.rename(tmp_path / "half:0.5.safetensors")
    assert lora_from_text(f"{half}.safetensors") == Lora(tmp_path / "half:0.5.safetensors", 1.0)
    (tmp_path / "pickle.pt").write_bytes(b"")
    (tmp_path / "short.safetensors").write_bytes(path.read_bytes()[:-1])
    for text, message in (
        (f"{path}:strong", "'strong' is not a scale"),
        (f"{path}:nan", "'nan' is not a scale"),
        (f"{path}:0,8", "'0,8' is not a scale.*Write a decimal point, not a comma"),
        (f"{path}:", "'' is not a scale"),
        (f"{tmp_path}/missing.safetensors:1", r"there is no file .*missing\.safetensors\."),
        (f"{tmp_path}/missing.safetensors", r"there is no file .*missing\.safetensors\."),
        (f"{tmp_path}/pickle.pt:1", "only .safetensors files are read"),
        (f"{folder}/adapter_config.json:1", f"give the folder that .* lies in, {folder}"),
        (f"{tmp_path}:1", "is a folder without adapter_model.safetensors"),
        (f"{tmp_path}/short.safetensors:1", "is damaged or cut short"),
    ):
        with pytest.raises(CheckpointError, match=message):
            lora_from_text(text)
