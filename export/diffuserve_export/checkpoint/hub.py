"""Checkpoints on the Hugging Face hub: the files that an export needs, and no others, in the hub's own cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

from diffuserve.errors import CheckpointError
from diffuserve_export.checkpoint.weights import STEMS, choose_weights, is_shard_of
from diffuserve_export.quiet import quiet

_ID = re.compile(r"[\w.-]+/[\w.-]+")
_INDEX = "model_index.json"
_FILES_BESIDE = (_INDEX, "diffuserve.json")
_CONFIG_FOLDERS = ("scheduler", "tokenizer", "tokenizer_2", "feature_extractor", *STEMS)
_CONFIG_SUFFIXES = (".json", ".txt")


class Hub(Protocol):
    """What is asked of the hub. Whatever goes wrong is an exception, of any kind."""

    def files(self, repo_id: str) -> list[str]:
        """Paths of a repository's files."""
        ...

    def download(self, repo_id: str, files: Sequence[str]) -> Path:
        """Downloads these files, unless they are there already; returns the folder that they are in."""
        ...

    def cached(self, repo_id: str) -> Path:
        """The folder that an earlier download went to."""
        ...


class HuggingFaceHub:
    """huggingface.co, or $HF_ENDPOINT, with the token that `hf auth login` stored."""

    def files(self, repo_id: str) -> list[str]:
        from huggingface_hub import HfApi

        return HfApi().list_repo_files(repo_id)

    def download(self, repo_id: str, files: Sequence[str]) -> Path:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repo_id, allow_patterns=list(files)))

    def cached(self, repo_id: str) -> Path:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repo_id, allow_patterns=[_INDEX], local_files_only=True))


def is_hub_id(text: str) -> bool:
    """Whether it looks like OWNER/NAME."""
    return _ID.fullmatch(text) is not None


def folder_from_hub(repo_id: str, *, weights: bool = True, hub: Hub | None = None) -> Path:
    """Downloads a checkpoint in diffusers' format. Without a connection, what was downloaded before is taken.

    Args:
        repo_id: OWNER/NAME.
        weights: the weights too; else configs and tokenizers only.
        hub: where from.

    Raises:
        CheckpointError: there is no such checkpoint, or it can neither be reached nor is it in the cache.
    """
    hub = hub or HuggingFaceHub()
    with quiet():
        try:
            files = needed_files(hub.files(repo_id), weights=weights)
            if _INDEX in files:
                return hub.download(repo_id, files)
        except Exception as error:  # the hub's client and its HTTP library have errors of their own, many kinds of them
            try:
                return hub.cached(repo_id)
            except Exception:
                reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
                raise CheckpointError(
                    f"There is no folder {repo_id}, and it could not be downloaded from the Hugging Face hub: {reason} "
                    f"Check the name and the connection; for a model that asks you to accept its terms, accept them on "
                    f"its page and run `hf auth login`. Or download it elsewhere, hf download {repo_id} --local-dir "
                    f"{PurePosixPath(repo_id).name}, and give that folder."
                ) from error
    raise CheckpointError(
        f"{repo_id} on the Hugging Face hub has no {_INDEX}, so it is not in diffusers' format. If it holds a single "
        f".safetensors file, download that: hf download {repo_id} FILE --local-dir . Then export it."
    )


def needed_files(files: Sequence[str], *, weights: bool) -> list[str]:
    """Those of a repository's files that an export reads: configs, tokenizers and one set of weights each."""
    needed = [file for file in _FILES_BESIDE if file in files]
    for folder in _CONFIG_FOLDERS:
        names = [file.removeprefix(f"{folder}/") for file in files if file.startswith(f"{folder}/")]
        names = [name for name in names if "/" not in name]
        chosen = [name for name in names if name.endswith(_CONFIG_SUFFIXES) and ".index." not in name]
        chosen += _chosen_weights(names, STEMS[folder]) if weights and folder in STEMS else []
        needed += [f"{folder}/{name}" for name in chosen]
    return needed


def _chosen_weights(names: Sequence[str], stem: str) -> list[str]:
    chosen = choose_weights(names, stem)
    if chosen is None:
        return []
    name, variant = chosen
    shards = [name for name in names if is_shard_of(name, stem, variant)] if name.endswith(".json") else []
    return [name, *shards]
