"""CLIP's byte-pair encoding: a prompt to the token ids that the text encoder takes.

A longer prompt is cut into chunks (`diffuserve.text.chunks`), each with start, end and padding of its own. One chunk of one
text is equal to transformers' CLIPTokenizer with padding="max_length" and truncation=True, without transformers. Which
tokens start, end and pad a prompt is the tokenizer's own business (Stable Diffusion 1 pads with the end token, 2 with "!"),
so it is read from the files that transformers saves: tokenizer.json and tokenizer_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from diffuserve.bundle.manifest import Manifest
from diffuserve.errors import BundleError
from diffuserve.tensors import TEXT_ENCODER
from diffuserve.text.chunks import Chunk, chunks_from_texts
from diffuserve.text.prompting import WeightedText


@dataclass(frozen=True)
class Encoded:
    """A prompt as the text encoder sees it.

    Attributes:
        input_ids: (k, L) int32, k chunks of start token, text, end token and padding. Read-only.
        weights: (k, L) float32, each token's; 1 for start, end and padding. Read-only.
        dropped_text: the end of the text that did not fit; empty if everything fitted.
    """

    input_ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    dropped_text: str


class Tokenizer:
    """Encodes prompts. Safe to call from several threads: nothing changes after it is built.

    Args:
        path: a folder with tokenizer.json and tokenizer_config.json.
        max_tokens: L, the text encoder's length, start and end tokens included (77 in Stable Diffusion).

    Raises:
        BundleError: a file is missing or damaged, or does not name the start, end and padding tokens.
    """

    def __init__(self, path: Path, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        config = _read_config(path / "tokenizer_config.json")
        self._bpe = _read_bpe(path / "tokenizer.json")
        self._bos_id, self._eos_id, self._pad_id = (
            self._token_id(path, config, name) for name in ("bos_token", "eos_token", "pad_token")
        )

    def encode(self, texts: Sequence[WeightedText], max_chunks: int = 1, min_chunks: int = 1) -> Encoded:
        """Encodes texts with their weights, one after the other, in as many chunks as they need within the bounds
        (`chunks_from_texts`); those that `min_chunks` asks for beyond are empty."""
        chunks, dropped_text = chunks_from_texts(texts, self._bpe, self.max_tokens - 2, max_chunks)
        shape = (max(min_chunks, len(chunks)), self.max_tokens)
        encoded = Encoded(np.full(shape, self._pad_id, np.int32), np.ones(shape, np.float32), dropped_text)
        chunks += [Chunk() for _ in range(shape[0] - len(chunks))]
        for row, chunk in enumerate(chunks):
            end = len(chunk.ids) + 1
            encoded.input_ids[row, 0] = self._bos_id
            encoded.input_ids[row, 1:end] = chunk.ids
            encoded.input_ids[row, end] = self._eos_id
            encoded.weights[row, 1:end] = chunk.weights
        for array in (encoded.input_ids, encoded.weights):
            array.flags.writeable = False
        return encoded

    def _token_id(self, path: Path, config: dict[str, Any], name: str) -> int:
        token = config.get(name)
        if isinstance(token, dict):  # a token with settings of its own, {"content": "<|endoftext|>", "lstrip": ...}
            token = token.get("content")
        token_id = self._bpe.token_to_id(token) if isinstance(token, str) else None
        if token_id is None:
            raise BundleError(
                f"{path / 'tokenizer_config.json'} has {name}={token!r}, which is not a token of its tokenizer.json. "
                "Export the checkpoint again."
            )
        # As transformers does: a special token is taken as such wherever it stands in a prompt. It shows where "!" pads.
        if token_id not in self._bpe.get_added_tokens_decoder():
            self._bpe.add_special_tokens([token])
        return token_id


def tokenizers_of(bundle: Path, manifest: Manifest) -> dict[str, Tokenizer]:
    """The tokenizer of each input of the bundle's text encoder: tokenizer/ gives `input_ids`, and where there is a
    second, tokenizer_2/ gives `input_ids_2`.

    Raises:
        BundleError: as `Tokenizer`.
    """
    inputs = [spec.name for spec in manifest.components[TEXT_ENCODER].tensors.inputs]
    return {
        name: Tokenizer(bundle / name.replace("input_ids", "tokenizer"), manifest.model.max_tokens) for name in inputs
    }


def _read_bpe(path: Path) -> tokenizers.Tokenizer:
    _require(path)
    try:
        bpe = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise BundleError(f"{path} is damaged: {error}. Export the checkpoint again.") from error
    # Both would be carried out before the text that they cut off could be told.
    bpe.no_truncation()
    bpe.no_padding()
    return bpe


def _read_config(path: Path) -> dict[str, Any]:
    _require(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path} is damaged: {error}. Export the checkpoint again.") from error
    if not isinstance(config, dict):
        raise BundleError(f"{path} is damaged: it holds no JSON object. Export the checkpoint again.")
    return config


def _require(path: Path) -> None:
    if not path.is_file():
        raise BundleError(f"{path} is missing. Export the checkpoint again.")
