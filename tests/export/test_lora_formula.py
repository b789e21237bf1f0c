"""Random LoRA files: every weight is what numpy makes of the file by the formula, or the file is refused with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffuserve.errors import CheckpointError
from diffuserve_export.checkpoint.checkpoint import open_checkpoint
from diffuserve_export.checkpoint.load import model_from_checkpoint
from diffuserve_export.checkpoint.loaded_model import LoadedModel
from diffuserve_export.lora import Lora, fuse_loras
from tests.export.lora_files import NAMINGS, File, assert_weights, changeable, weights_of
from tests.export.tiny import write_sdxl_checkpoint

FILES = 200
BY_DEFAULT = 25
SEEDS = [seed if seed < BY_DEFAULT else pytest.param(seed, marks=pytest.mark.slow) for seed in range(FILES)]


@pytest.fixture(scope="module")
def models(shared_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    xl = write_sdxl_checkpoint(tmp_path_factory.mktemp("xl") / "xl")
    return {
        "sd1": model_from_checkpoint(open_checkpoint(shared_checkpoint)),
        "sdxl": model_from_checkpoint(open_checkpoint(xl)),
    }


LEFT_OUT = "unet.time_embedding.linear_2.weight"


def random_file(model: Any, rng: np.random.Generator) -> File:
    """Some layers of any kind, each with a rank and an alpha of its own; the text encoders' in every second file."""
    file = File(model, str(rng.choice(NAMINGS)))
    names = [name for name in changeable(model) if name != LEFT_OUT]
    if rng.random() < 0.5:
        names = [name for name in names if name.startswith("unet.")]
    for name in rng.choice(names, rng.integers(1, 25), replace=False):
        shape = weights_of(model)[name].shape
        rank = int(rng.choice([1, 2, 3, 4, 8, 16, 64]))
        file.add(
            name,
            rng,
            rank=rank,
            alpha=rng.choice([None, 0.0, 1.0, rank / 2, rank, 2.5]),
            dtype=rng.choice([np.float16, np.float32]),
            tucker=len(shape) == 4 and shape[2] > 1 and rng.random() < 0.3 and file.naming != "diffusers",
        )
    return file


@pytest.mark.parametrize("seed", SEEDS)
def test_every_weight_is_as_numpy_says(seed: int, models: dict[str, LoadedModel], tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    plain = models[str(rng.choice(list(models)))]
    loras, changes = [], []
    for number in range(rng.choice([1, 1, 2, 3])):
        file = random_file(plain, rng)
        scale = float(rng.choice([1.0, 0.0, -2.0, 2.0, rng.uniform(-2, 2)]))
        loras.append(Lora(file.save(tmp_path / f"{number}.safetensors"), scale))
        changes.append((scale, file.products))
    fused = copy.deepcopy(plain)
    fuse_loras(fused, loras)
    assert_weights(fused, plain, changes)


def remove_a_half(file: File, key: str) -> str:
    half = next(name for name in file.tensors if name.startswith(f"{key}.") and "alpha" not in name)
    other = next(name for name in file.tensors if name.startswith(f"{key}.") and "alpha" not in name and name != half)
    del file.tensors[half]
    return f"{other}, and its other half is missing"


def widen(file: File, key: str) -> str:
    name = next(name for name in file.tensors if name.startswith(f"{key}.") and ("down" in name or "lora_A" in name))
    file.tensors[name] = np.concatenate([file.tensors[name]] * 2, axis=1)
    return "does not fit this checkpoint: at .*, its layer leads from"


def rename(file: File, key: str) -> str:
    for name in [name for name in file.tensors if name.startswith(f"{key}.")]:
        file.tensors[name.replace(key, f"{key}_of_another")] = file.tensors.pop(name)
    return f"1 of its [0-9]+ layers are not this model's: {key}_of_another"


def spoil(file: File, key: str) -> str:
    name = next(name for name in file.tensors if name.startswith(f"{key}."))
    file.tensors[name] = np.full_like(file.tensors[name], np.nan)
    return f"{name} is not finite"


def cut_rank(file: File, key: str) -> str:
    name = next(name for name in file.tensors if name.startswith(f"{key}.") and ("down" in name or "lora_A" in name))
    file.tensors[name] = np.concatenate([file.tensors[name]] * 3)
    return "lora_up is for a rank of [0-9]+, and lora_down of [0-9]+"


def empty_rank(file: File, key: str) -> str:
    for name in [name for name in file.tensors if name.startswith(f"{key}.") and "alpha" not in name]:
        array = file.tensors[name]
        file.tensors[name] = array[:0] if "down" in name or "lora_A" in name else array[:, :0]
    return r"where matrices of a rank of 1 or more were expected"


def add_loha(file: File, key: str) -> str:
    file.tensors[f"{key}.hada_w1_a"] = np.ones((4, 4), np.float32)
    return f"holds LoHa besides: {key}.hada_w1_a"


def add_unknown(file: File, key: str) -> str:
    file.tensors[f"{key}.lora_side.weight"] = np.ones((4, 4), np.float32)
    return f"tensors of an unknown kind: {key}.lora_side.weight"


def add_middle(file: File, key: str) -> str:
    file.tensors[f"{key}.lora_mid.weight"] = np.ones((4, 4), np.float32)
    return "it has lora_mid, and the model's layer is linear"


def count(file: File, key: str) -> str:
    name = next(name for name in file.tensors if name.startswith(f"{key}.") and "alpha" not in name)
    file.tensors[name] = np.ones_like(file.tensors[name], np.int32)
    return f"{name} is of the type int32, where floating-point"


def leave_magnitudes_only(file: File, key: str) -> str:
    for name in [name for name in file.tensors if name.startswith(f"{key}.") and "alpha" not in name]:
        del file.tensors[name]
    file.tensors[f"{key}.dora_scale"] = np.ones((4, 1), np.float32)
    return f"{key}.dora_scale belongs to no lora_down and lora_up"


def shorten_magnitudes(file: File, key: str) -> str:
    file.tensors[f"{key}.dora_scale"] = np.ones((4, 1), np.float32)
    return "it has 4 DoRA magnitudes, where [0-9]+ were expected"


def add_vector_as_alpha(file: File, key: str) -> str:
    file.tensors[f"{key}.alpha"] = np.ones(3, np.float32)
    return rf"{key}.alpha is of the shape \(3,\), where one number"


SPOILT: tuple[Callable[[File, str], str], ...] = (
    remove_a_half,
    widen,
    rename,
    spoil,
    cut_rank,
    empty_rank,
    add_loha,
    add_unknown,
    add_middle,
    count,
    leave_magnitudes_only,
    shorten_magnitudes,
    add_vector_as_alpha,
)


@pytest.mark.parametrize("damage", SPOILT)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_true_reason_is_said_and_nothing_is_changed(
    family: str, damage: Callable[[File, str], str], models: dict[str, LoadedModel], tmp_path: Path
) -> None:
    rng = np.random.default_rng(SPOILT.index(damage))
    plain = models[family]
    file = random_file(plain, rng)
    reason = damage(file, file.add(LEFT_OUT, rng, rank=4, alpha=2.0))
    good = random_file(plain, rng).save(tmp_path / "good.safetensors")
    fused = copy.deepcopy(plain)
    with pytest.raises(CheckpointError, match=reason):
        fuse_loras(fused, [Lora(good, 1.0), Lora(file.save(tmp_path / "style.safetensors"), 1.0)])
    assert_weights(fused, plain, [])
