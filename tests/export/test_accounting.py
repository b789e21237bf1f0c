"""Random edits of valid checkpoints: each is exported with exactly what its files hold, or refused by name.

What the files hold is read here by NumPy from their bytes, and where it belongs told by tests/export/original_layout.py: by
none of what the exporter reads and loads with.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from diffuserve.errors import CheckpointError
from diffuserve.samplers.noise_schedule import NoiseSchedule
from diffuserve_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from diffuserve_export.checkpoint.load import model_from_checkpoint
from diffuserve_export.checkpoint.loaded_model import LoadedModel
from tests.export.original_layout import original_tensors
from tests.export.single_files import Tensors, make_distinct, make_single_file
from tests.export.tiny import WRITERS, add_safety_checker

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "safety_checker")
# Beside the weights in the files before they are edited; what they hold is of no consequence.
BESIDE_IN_FILE = {
    "betas": np.linspace(0, 1, 10),
    "model_ema.decay": np.ones(1),
    "first_stage_model.loss.logvar": np.zeros(1),
}
BESIDE_IN_FOLDER = {"embeddings.position_ids": np.arange(77)[None], "logit_scale": np.ones(1)}


def read_safetensors(path: Path) -> Tensors:
    """By the format's description: the header's length in 8 bytes, the header in JSON, the numbers (NaN where unknown)."""
    dtypes = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1"}
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = (start + offset for offset in entry["data_offsets"])
            tensors[name] = np.frombuffer(data[begin:end], dtypes[entry["dtype"]]).reshape(entry["shape"])
    return tensors


@dataclass(frozen=True)
class Kind:
    """A valid checkpoint: a folder, and the file with its weights if they are not in the folder."""

    folder: Path
    file: Path | None = None

    def copy(self, root: Path) -> Kind:
        folder = Path(shutil.copytree(self.folder, root / "folder"))
        return Kind(folder, Path(shutil.copy(self.file, root / self.file.name)) if self.file else None)

    @property
    def weights(self) -> list[Path]:
        return [self.file] if self.file else sorted(self.folder.glob("*/*.safetensors"))

    def load(self) -> tuple[Checkpoint, LoadedModel]:
        opened = open_checkpoint(self.file, config=self.folder) if self.file else open_checkpoint(self.folder)
        return opened, model_from_checkpoint(opened)

    def assert_holds(self, model: LoadedModel) -> None:
        """Every tensor of the model is one of the files', with the same values; and the other way round."""
        if self.file:
            compare(original_tensors(model), read_safetensors(self.file), {*BESIDE_IN_FILE}, ".attn_1.")
        else:
            for file in self.weights:
                part = file.parent.name
                state = getattr(model, part).state_dict()
                compare(plain(part, state), plain(part, read_safetensors(file)), {*BESIDE_IN_FOLDER})


def plain(part: str, tensors: Tensors) -> Tensors:
    """Without the level that some versions of transformers have in their names and others do not."""
    if part == "safety_checker":
        return {name.replace("vision_model.vision_model.", "vision_model."): array for name, array in tensors.items()}
    renamed = {name.removeprefix("text_model."): array for name, array in tensors.items()}
    assert len(renamed) == len(tensors)
    return renamed


def compare(held: Tensors, tensors: Tensors, beside: set[str], convolution: str = "-") -> None:
    """`convolution`: in the names of weights that may have axes of one more."""
    left_out = {name for name in tensors.keys() - held.keys() if "layers." in name or "resblocks." in name}
    numbers = {int(part) for name in left_out for part in name.split(".") if part.isdecimal()}
    assert not left_out or min(numbers) > max(layer_numbers(held))  # they are the last
    assert held.keys() == tensors.keys() - beside - left_out - {"cond_stage_model.model.text_projection"}
    for name, tensor in held.items():
        expected, actual = tensors[name].astype(np.float32), tensor.numpy()
        assert expected.shape == actual.shape or (convolution in name and expected.size == actual.size), name
        np.testing.assert_array_equal(actual.ravel(), expected.ravel(), err_msg=name)
        assert np.isfinite(actual).all()


def layer_numbers(tensors: Tensors) -> Iterator[int]:
    for name in tensors:
        _, found, rest = name.partition("layers." if "layers." in name else "resblocks.")
        if found:
            yield int(rest.split(".")[0])


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    made = {}
    for family in WRITERS:
        root = tmp_path_factory.mktemp(family)
        files = make_single_file(family, root)
        save_file({**files.tensors, **BESIDE_IN_FILE}, files.path)
        made[f"{family} file"] = Kind(files.configs, files.path)
        if family == "sd1":
            add_safety_checker(files.folder, [np.full((40, 40, 3), 60 * i, np.uint8) for i in range(4)])
        text_encoder = next(files.folder.glob("text_encoder/*.safetensors"))
        save_file({**read_safetensors(text_encoder), **BESIDE_IN_FOLDER}, text_encoder)
        made[f"{family} folder"] = Kind(make_distinct(files.folder))
    return made


# Each edit changes tensors, and returns words of which one has to be in a refusal.
Edit = Callable[[Tensors, str, np.random.Generator], set[str]]


def remove(tensors: Tensors, name: str, random: np.random.Generator) -> set[str]:
    del tensors[name]
    return {name}


def add(tensors: Tensors, name: str, random: np.random.Generator) -> set[str]:
    added = f"{name.rpartition('.')[0]}.{random.choice(['extra', 'lora_A.weight', '7.bias', 'scale_weight'])}"
    tensors[added] = np.ones(3, np.float32)
    return {added}


def rename(tensors: Tensors, name: str, random: np.random.Generator) -> set[str]:
    renamed = str(random.choice([name[:-1], f"module.{name}", name.replace(".", "_"), name.upper()]))
    tensors[renamed] = tensors.pop(name)
    return {name, renamed}


def reshape(tensors: Tensors, name: str, random: np.random.Generator) -> set[str]:
    array = tensors[name]
    tensors[name] = array.reshape(1, -1) if array.ndim == 1 else array.reshape(-1)
    return {name}


def cut(tensors: Tensors, name: str, random: np.random.Generator) -> set[str]:
    array = tensors[name]
    tensors[name] = array[1:] if len(array) > 1 else np.concatenate([array, array])
    return {name}


def spoil(tensors: Tensors, name: str, random: np.random.Generator) -> set[str]:
    array = tensors[name].astype(np.float32)
    array.flat[random.integers(array.size)] = random.choice([np.nan, np.inf, -np.inf])
    tensors[name] = array
    return {name}


def cast(tensors: Tensors, name: str, random: np.random.Generator) -> set[str]:
    tensors[name] = tensors[name].astype(random.choice(["<f2", "<f8", "<i4", "<i8", "u1"]))
    return {name}


def swap(tensors: Tensors, name: str, random: np.random.Generator) -> set[str]:
    others = [other for other in tensors if tensors[other].shape == tensors[name].shape]
    other = str(random.choice(others))
    tensors[name], tensors[other] = tensors[other], tensors[name]
    return {name, other}


EDITS: tuple[Edit, ...] = (remove, add, rename, reshape, cut, spoil, cast, swap)


Judge = Callable[[Checkpoint, LoadedModel], bool]
# Of a component's config a setting and another value; and what that means, or words of which one is in the refusal.
SETTINGS: tuple[tuple[str, str, Any, Judge | str], ...] = (
    ("unet", "layers_per_block", 2, "blocks"),
    ("unet", "block_out_channels", [32, 96], "shape"),
    ("unet", "cross_attention_dim", 40, "cross_attention_dim"),
    ("unet", "in_channels", 9, "in_channels"),
    ("unet", "num_class_embeds", 3, "num_class_embeds"),
    ("unet", "time_embedding_dim", 64, "emb"),
    ("unet", "octaves", 2, "octaves"),
    ("unet", "norm_num_groups", 4, lambda _, model: 4 in groups(model.unet)),
    ("unet", "act_fn", "gelu", lambda _, model: "GELU" in str(model.unet.conv_act)),
    ("unet", "flip_sin_to_cos", False, lambda _, model: not model.unet.time_proj.flip_sin_to_cos),
    ("unet", "sample_size", 16, lambda opened, _: opened.spec.width == 16 * opened.spec.vae_scale_factor),
    ("vae", "latent_channels", 5, "latent_channels"),
    ("vae", "mid_block_add_attention", False, "att"),
    ("vae", "latents_mean", [0.0], "latents_mean"),
    ("vae", "norm_num_groups", 2, lambda _, model: groups(model.vae) == {2}),
    ("vae", "scaling_factor", 0.3, lambda _, model: model.vae.config["scaling_factor"] == 0.3),
    ("text_encoder", "num_hidden_layers", 4, "layers|resblocks"),
    ("text_encoder", "intermediate_size", 50, "mlp"),
    ("text_encoder", "hidden_size", 34, "hidden_size"),
    ("text_encoder", "use_attention_mask", True, "use_attention_mask"),
    ("text_encoder", "layer_norm_eps", 0.01, lambda _, model: final_norm(model).eps == 0.01),
    ("scheduler", "thresholding", True, "thresholding"),
    ("scheduler", "shift", 3.0, "shift"),
    ("scheduler", "prediction_type", "flow_prediction", "prediction_type"),
    ("scheduler", "prediction_type", "sample", lambda opened, _: schedule(opened).prediction_type == "sample"),
    ("scheduler", "variance_type", "fixed_small", lambda opened, _: True),
    ("scheduler", "beta_end", 0.03, lambda opened, _: math.isclose(schedule(opened).betas[-1], 0.03, rel_tol=1e-6)),
    ("scheduler", "num_train_timesteps", 500, lambda opened, _: len(schedule(opened).betas) == 500),
)


def groups(module: Any) -> set[int]:
    return {part.num_groups for part in module.modules() if hasattr(part, "num_groups")}


def final_norm(model: LoadedModel) -> Any:
    return getattr(model.text_encoder, "text_model", model.text_encoder).final_layer_norm


def schedule(opened: Checkpoint) -> NoiseSchedule:
    """As whoever serves the bundle reads it from the manifest."""
    return NoiseSchedule.from_config(opened.configs["scheduler"])


def change_setting(kind: Kind, part: str, key: str, value: Any) -> None:
    path = kind.folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


def edit_tensor(kind: Kind, number: int, random: np.random.Generator) -> set[str]:
    """Returns words of which one has to be in a refusal."""
    path = kind.weights[random.integers(len(kind.weights))]
    tensors = read_safetensors(path)
    words = EDITS[number](tensors, str(random.choice(sorted(tensors))), random)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path)
    return words


def attempt(kind: Kind, words: set[str], what: str) -> tuple[Checkpoint, LoadedModel] | None:
    """The edited checkpoint, if it is accepted; fails where it should not be, or is refused for another reason."""
    try:
        loaded = kind.load()
    except CheckpointError as error:
        assert any(word in str(error) for word in words), f"{what}: {error}"
        return None
    kind.assert_holds(loaded[1])
    return loaded


KINDS = [f"{family} {form}" for form in ("folder", "file") for family in WRITERS]
QUICK = {"sd1 folder": 9, "sdxl file": 9}
MANY = 50


@pytest.mark.parametrize(
    ("name", "seeds"),
    [
        *((name, range(QUICK.get(name, 2))) for name in KINDS),
        *(pytest.param(name, range(MANY), marks=pytest.mark.slow) for name in KINDS),
    ],
)
def test_edits(name: str, seeds: range, kinds: dict[str, Kind], tmp_path: Path) -> None:
    """An edit of each sort in turn, and of the rest what chance decides."""
    _, model = kinds[name].load()
    kinds[name].assert_holds(model)
    accepted = []
    for seed in seeds:
        random = np.random.default_rng([KINDS.index(name), seed])
        (tmp_path / str(seed)).mkdir()
        kind, sort = kinds[name].copy(tmp_path / str(seed)), seed % (len(EDITS) + 1)
        if sort < len(EDITS):
            words = edit_tensor(kind, sort, random)
            loaded = attempt(kind, words, f"seed {seed}: {EDITS[sort].__name__} {words}")
        else:
            part, key, value, meaning = SETTINGS[random.integers(len(SETTINGS))]
            change_setting(kind, part, key, value)
            what = f"seed {seed}: {key}={value} in the {part}"
            if isinstance(meaning, str):
                loaded = attempt(kind, {*meaning.split("|")}, what)
                assert loaded is None, what
            else:
                loaded = attempt(kind, set(), what)
                assert loaded and meaning(*loaded), what
        accepted.append(loaded is not None)
        shutil.rmtree(tmp_path / str(seed))
    if len(seeds) == MANY:
        assert 0.1 < np.mean(accepted) < 0.6  # neither is everything refused nor everything accepted
