"""CLIP's byte-pair encoding: a prompt to the token ids that the text encoder takes.

Equal to transformers' CLIPTokenizer with padding="max_length" and truncation=True, without transformers. Which tokens
start, end and pad a prompt is the tokenizer's own business (Stable Diffusion 1 pads with the end token, 2 with "!"), so
it is read from the files that transformers saves: tokenizer.json and tokenizer_config.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from diffuserve.errors import BundleError


@dataclass(frozen=True)
class Encoded:
    """A prompt as the text encoder sees it.

    Attributes:
        input_ids: (max_tokens,) int32: start token, text, end token, padding. Read-only.
        dropped_text: the end of the prompt that did not fit, as it was written; empty if everything fitted.
    """

    input_ids: NDArray[np.int32]
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

    def encode(self, text: str) -> Encoded:
        """Encodes any text, also an empty one; what exceeds `max_tokens` is cut off and returned."""
        encoding = self._bpe.encode(text, add_special_tokens=False)
        room = self.max_tokens - 2
        ids = encoding.ids[:room]
        input_ids = np.full(self.max_tokens, self._pad_id, np.int32)
        input_ids[0] = self._bos_id
        input_ids[1 : len(ids) + 1] = ids
        input_ids[len(ids) + 1] = self._eos_id
        input_ids.flags.writeable = False
        # Offsets count the characters of the text as it was given, before it was normalised.
        dropped_text = text[encoding.offsets[room][0] :] if len(encoding.ids) > room else ""
        return Encoded(input_ids, dropped_text)

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
