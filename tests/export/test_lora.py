"""LoRAs in the formats that are shared, fused into the weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from diffuserve.errors import CheckpointError
from diffuserve_export.checkpoint import open_checkpoint
from diffuserve_export.export import bundle_from_checkpoint
from diffuserve_export.load import LoadedModel, model_from_checkpoint
from diffuserve_export.lora import Lora, lora_from_text
from tests.export.tiny import write_sdxl_checkpoint

RANK = 2
# (out, in) of each layer that the LoRAs here change, in the tiny Stable Diffusion 1 checkpoint.
UNET_LAYERS = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (32, 32),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (32, 32),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0": (32, 32),
}
# diffusers tells the format of a text encoder's layers by the last of these.
TEXT_LAYERS = {"encoder.layers.0.self_attn.q_proj": (32, 32), "encoder.layers.0.self_attn.out_proj": (32, 32)}

Factors = dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]


def factors(layers: dict[str, tuple[int, int]], seed: int = 0) -> Factors:
    """A (rank, in) and B (out, rank) for each layer."""
    rng = np.random.default_rng(seed)
    return {
        name: (
            rng.standard_normal((RANK, inputs), dtype=np.float32),
            rng.standard_normal((outputs, RANK), dtype=np.float32),
        )
        for name, (outputs, inputs) in layers.items()
    }


def write_kohya(path: Path, unet: Factors, text: Factors, alpha: float) -> Path:
    tensors = {}
    for prefix, layers in (("lora_unet_", unet), ("lora_te_text_model_", text)):
        for name, (down, up) in layers.items():
            key = prefix + name.replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = down
            tensors[f"{key}.lora_up.weight"] = up
            tensors[f"{key}.alpha"] = np.array(alpha, np.float32)
    save_file(tensors, path)
    return path


def write_peft(path: Path, unet: Factors, text: Factors) -> Path:
    tensors = {}
    for prefix, layers in (("unet.", unet), ("text_encoder.text_model.", text)):
        for name, (down, up) in layers.items():
            tensors[f"{prefix}{name}.lora_A.weight"] = down
            tensors[f"{prefix}{name}.lora_B.weight"] = up
    save_file(tensors, path)
    return path


def write_old_diffusers(path: Path, unet: Factors, text: Factors) -> Path:
    tensors = {}
    for name, (down, up) in unet.items():
        block, _, layer = name.replace("to_out.0", "to_out").rpartition(".")
        tensors[f"unet.{block}.processor.{layer}_lora.down.weight"] = down
        tensors[f"unet.{block}.processor.{layer}_lora.up.weight"] = up
    for name, (down, up) in text.items():
        tensors[f"text_encoder.text_model.{name}.lora_linear_layer.down.weight"] = down
        tensors[f"text_encoder.text_model.{name}.lora_linear_layer.up.weight"] = up
    save_file(tensors, path)
    return path


def weights_of(model: LoadedModel) -> dict[str, NDArray[np.float32]]:
    parts = {"unet": model.unet, "text": model.text_encoder, "vae": model.vae}
    return {
        f"{part}.{name.removeprefix('text_model.')}": weight.numpy()
        for part, module in parts.items()
        for name, weight in module.state_dict().items()
    }


def assert_fused(actual: LoadedModel, plain: LoadedModel, changes: list[tuple[Factors, Factors, float]]) -> None:
    """Every weight is the plain one plus factor * B A for each of `changes`, and everything has its plain name."""
    expected = weights_of(plain)
    for unet, text, factor in changes:
        for part, layers in (("unet", unet), ("text", text)):
            for name, (down, up) in layers.items():
                expected[f"{part}.{name}.weight"] = expected[f"{part}.{name}.weight"] + factor * up @ down
    weights = weights_of(actual)
    assert weights.keys() == expected.keys()
    for name, array in weights.items():
        np.testing.assert_allclose(array, expected[name], atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def plain(shared_checkpoint: Path) -> LoadedModel:
    return model_from_checkpoint(open_checkpoint(shared_checkpoint))


def load(path: Path, *loras: Lora) -> LoadedModel:
    return model_from_checkpoint(open_checkpoint(path, loras=loras))


def test_kohya_with_alpha(shared_checkpoint: Path, plain: LoadedModel, tmp_path: Path) -> None:
    unet, text = factors(UNET_LAYERS), factors(TEXT_LAYERS)
    path = write_kohya(tmp_path / "style.safetensors", unet, text, alpha=1.0)
    assert_fused(load(shared_checkpoint, Lora(path, 0.8)), plain, [(unet, text, 0.8 * 1.0 / RANK)])


@pytest.mark.parametrize("write", [write_peft, write_old_diffusers])
def test_formats_of_diffusers(write: Any, shared_checkpoint: Path, plain: LoadedModel, tmp_path: Path) -> None:
    unet, text = factors(UNET_LAYERS), factors(TEXT_LAYERS)
    path = write(tmp_path / "style.safetensors", unet, text)
    assert_fused(load(shared_checkpoint, Lora(path, 0.5)), plain, [(unet, text, 0.5)])


def test_several(shared_checkpoint: Path, plain: LoadedModel, tmp_path: Path) -> None:
    first, second = factors(UNET_LAYERS), factors(UNET_LAYERS, seed=1)
    loras = (
        Lora(write_peft(tmp_path / "a.safetensors", first, {}), 1.0),
        Lora(write_kohya(tmp_path / "b.safetensors", second, {}, alpha=RANK), -0.25),
    )
    assert_fused(load(shared_checkpoint, *loras), plain, [(first, {}, 1.0), (second, {}, -0.25)])
    opened = open_checkpoint(shared_checkpoint, loras=loras)
    assert opened.source == "tiny + a.safetensors:1 + b.safetensors:-0.25"
    assert [(lora.name, lora.scale) for lora in opened.fused_loras] == [("a", 1.0), ("b", -0.25)]
    data = opened.loras[0].path.read_bytes()
    tensors = load_file(opened.loras[0].path)
    weights = data[-sum(tensor.nbytes for tensor in tensors.values()) :]
    [fused, _] = opened.fused_loras
    assert fused.sha256 == hashlib.sha256(data).hexdigest()
    assert fused.weights_sha256 == hashlib.sha256(weights).hexdigest() != fused.sha256


def test_both_text_encoders_of_sdxl(tmp_path: Path) -> None:
    checkpoint = write_sdxl_checkpoint(tmp_path / "xl")
    layers = {f"text_model.encoder.layers.1.self_attn.{part}_proj": (24, 24) for part in ("v", "out")}
    tensors = {}
    for name, (down, up) in factors(layers).items():
        key = "lora_te2_" + name.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = np.array(RANK, np.float32)
    save_file(tensors, tmp_path / "style.safetensors")
    fused, plain = load(checkpoint, Lora(tmp_path / "style.safetensors", 1.0)), load(checkpoint)
    for name, (down, up) in factors(layers).items():
        weight = f"{name}.weight"
        change = fused.text_encoder_2.state_dict()[weight] - plain.text_encoder_2.state_dict()[weight]
        np.testing.assert_allclose(change.numpy(), up @ down, atol=1e-5)


def test_the_hash_follows_file_and_scale(shared_checkpoint: Path, tmp_path: Path) -> None:
    a = write_peft(tmp_path / "a.safetensors", factors(UNET_LAYERS), {})
    b = write_peft(tmp_path / "b.safetensors", factors(UNET_LAYERS, seed=1), {})
    loras: list[tuple[Lora, ...]] = [
        (),
        (Lora(a, 1.0),),
        (Lora(a, 0.5),),
        (Lora(b, 1.0),),
        (Lora(a, 1.0), Lora(b, 1.0)),
    ]
    hashes = {open_checkpoint(shared_checkpoint, loras=some).sha256 for some in loras}
    assert len(hashes) == len(loras)


def rank_mismatch(path: Path) -> Path:
    """Keys of this model, widths of another."""
    return write_kohya(path, factors(dict.fromkeys(UNET_LAYERS, (32, 64))), {}, 1.0)


def other_layers(path: Path) -> Path:
    """A layer that the model has, and one of a deeper model."""
    deeper = "down_blocks.0.attentions.0.transformer_blocks.1.attn1.to_q"
    return write_kohya(path, factors({**UNET_LAYERS, deeper: (32, 32)}), {}, 1.0)


def second_text_encoder(path: Path) -> Path:
    down, up = factors({"x": (32, 32)})["x"]
    key = "lora_te2_text_model_encoder_layers_0_self_attn_v_proj"
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, path)
    return path


@pytest.mark.parametrize("write", [rank_mismatch, other_layers, second_text_encoder])
def test_of_another_base_model(write: Any, shared_checkpoint: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "style.safetensors")
    with pytest.raises(CheckpointError, match=r"style.safetensors does not fit this checkpoint.*text width of 32"):
        bundle_from_checkpoint(open_checkpoint(shared_checkpoint, loras=(Lora(path, 1.0),)), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == [path]


def test_no_lora_at_all(shared_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no LoRA"):
        load(shared_checkpoint, Lora(shared_checkpoint / "vae" / "diffusion_pytorch_model.safetensors", 1.0))


def test_text_form(tmp_path: Path) -> None:
    path = write_peft(tmp_path / "a:b.safetensors", factors(UNET_LAYERS), {})
    plain = write_peft(tmp_path / "plain.safetensors", factors(UNET_LAYERS), {})
    assert lora_from_text(f"{path}:-0.5") == Lora(path, -0.5)
    assert lora_from_text(f"{plain}") == Lora(plain, 1.0)
    (tmp_path / "pickle.pt").write_bytes(b"")
    (tmp_path / "short.safetensors").write_bytes(path.read_bytes()[:-1])
    for text, message in (
        (f"{plain}:strong", "'strong' is no scale"),
        (f"{plain}:nan", "'nan' is no scale"),
        (f"{tmp_path}/missing.safetensors:1", "there is no file"),
        (f"{tmp_path}/pickle.pt:1", "only .safetensors files are read"),
        (f"{tmp_path}/short.safetensors:1", "is damaged or cut short"),
    ):
        with pytest.raises(CheckpointError, match=message):
            lora_from_text(text)


def test_metadata_of_peft_counts(shared_checkpoint: Path, plain: LoadedModel, tmp_path: Path) -> None:
    """diffusers' own training scripts write alpha into the file's header."""
    unet = factors(UNET_LAYERS)
    path = write_peft(tmp_path / "style.safetensors", unet, {})
    config = {
        "unet.r": RANK,
        "unet.lora_alpha": 6,
        "unet.target_modules": [name.split("transformer_blocks.0.")[1] for name in UNET_LAYERS],
    }
    save_file(load_file(path), path, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(config)})
    targets = plain.unet.state_dict()
    assert all(f"{name}.weight" in targets for name in UNET_LAYERS)
    fused = load(shared_checkpoint, Lora(path, 1.0))
    assert_fused(fused, plain, [(unet, {}, 6 / RANK)])
