"""Checkpoints by their id on the Hugging Face hub, with a hub that is a folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from diffuserve.errors import CheckpointError
from diffuserve_export.checkpoint.checkpoint import open_checkpoint
from diffuserve_export.checkpoint.hub import folder_from_hub, needed_files


@dataclass
class FakeHub:
    """Implements `diffuserve_export.checkpoint.hub.Hub`."""

    repository: Path
    cache: Path
    offline: bool = False
    downloaded: list[str] = field(default_factory=list)

    def files(self, repo_id: str) -> list[str]:
        if self.offline:
            raise ConnectionError("no route to host\nat all")
        return sorted(
            path.relative_to(self.repository).as_posix() for path in self.repository.rglob("*") if path.is_file()
        )

    def download(self, repo_id: str, files: Sequence[str]) -> Path:
        for file in files:
            target = self.cache / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.repository / file, target)
        self.downloaded += files
        return self.cache

    def cached(self, repo_id: str) -> Path:
        if not self.cache.is_dir():
            raise FileNotFoundError("not in the cache")
        return self.cache


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path) -> FakeHub:
    """The tiny checkpoint with everything beside it that repositories have."""
    for extra in (
        "README.md",
        "v1-5-pruned.ckpt",
        "v1-5-pruned.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "safety_checker/model.safetensors",
        "safety_checker/config.json",
        "feature_extractor/preprocessor_config.json",
        "text_encoder/flax_model.msgpack",
        "text_encoder/model.onnx",
    ):
        path = checkpoint / extra
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"large")
    return FakeHub(checkpoint, tmp_path / "cache")


def test_only_what_is_needed_is_downloaded(hub: FakeHub, shared_checkpoint: Path) -> None:
    folder = folder_from_hub("owner/tiny", hub=hub)
    assert open_checkpoint(folder).sha256 == open_checkpoint(shared_checkpoint).sha256
    plain = {path.relative_to(shared_checkpoint).as_posix() for path in shared_checkpoint.rglob("*") if path.is_file()}
    # Whether there is a safety checker, the index says, which has not been read yet.
    safety = {
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
        "feature_extractor/preprocessor_config.json",
    }
    assert set(hub.downloaded) <= plain | safety
    assert "unet/diffusion_pytorch_model.safetensors" in hub.downloaded


def test_configs_alone(hub: FakeHub) -> None:
    folder_from_hub("owner/tiny", weights=False, hub=hub)
    assert "unet/config.json" in hub.downloaded
    assert "tokenizer/merges.txt" in hub.downloaded
    assert not any(file.endswith(".safetensors") for file in hub.downloaded)


def test_shards_and_variants() -> None:
    files = [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae_1_0/diffusion_pytorch_model.safetensors",
        "unet/onnx/config.json",
    ]
    assert set(needed_files(files, weights=True)) == {*files[:5], *files[7:9]}


@pytest.mark.parametrize(
    ("index", "shard", "other"),
    [
        (".safetensors.index.json", "-{}-of-00002.safetensors", ".fp16-{}-of-00002.safetensors"),
        (".safetensors.index.fp16.json", ".fp16-{}-of-00002.safetensors", ".bf16-{}-of-00002.safetensors"),
        (".safetensors.index.fp16.json", "-{}-of-00002.fp16.safetensors", "-{}-of-00002.safetensors"),
        (".safetensors.fp16.index.json", "-{}-of-00002.fp16.safetensors", "-{}-of-00002.bf16.safetensors"),
    ],
)
def test_shards_by_all_the_names_they_have_had(index: str, shard: str, other: str) -> None:
    """`other`: those of another precision, whose index is not there."""
    for stem in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        needed = ["model_index.json", f"{stem}{index}", *(f"{stem}{shard.format(part)}" for part in ("00001", "00002"))]
        others = [f"{stem}{other.format('00001')}", f"{stem}.bin.index.json", f"{stem}-00001-of-00002.bin"]
        others += [stem.replace("/", "/ema_") + shard.format("00001")]
        assert set(needed_files([*needed, *others], weights=True)) == {*needed}
        assert needed_files([*needed, *others], weights=False) == ["model_index.json"]


def test_offline_the_cache_is_taken(hub: FakeHub) -> None:
    folder_from_hub("owner/tiny", hub=hub)
    hub.offline, hub.downloaded = True, []
    assert folder_from_hub("owner/tiny", hub=hub) == hub.cache
    assert hub.downloaded == []


def test_neither_reachable_nor_cached(hub: FakeHub) -> None:
    hub.offline = True
    with pytest.raises(CheckpointError, match=r"could not be downloaded .*: no route to host Check .*hf auth login"):
        folder_from_hub("owner/tiny", hub=hub)


def test_not_in_the_format_of_diffusers(hub: FakeHub) -> None:
    (hub.repository / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no model_index.json.* hf download owner/tiny FILE"):
        folder_from_hub("owner/tiny", hub=hub)
    assert hub.downloaded == []
