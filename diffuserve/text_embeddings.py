"""Text embeddings, each computed once: a cache over the text encoder."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping

import numpy as np

from diffuserve.stages import CALL_TIMEOUT_S, Conditioning, Float32, Stages, checked
from diffuserve.stats import Stats
from diffuserve.tensors import TEXT_ENCODER
from diffuserve.tokenizer import Tokenizer


class TextEmbeddings:
    """Embeddings by text, the least recently used dropped beyond `max_bytes`.

    Requests with the same text that arrive together wait for one call of the encoder. A failed call is not kept.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stages: Stages,
        stats: Stats | None = None,
        max_bytes: int = 64 << 20,
        call_timeout_s: float = CALL_TIMEOUT_S,
    ) -> None:
        self._tokenizer = tokenizer
        self._stages = stages
        self._max_bytes = max_bytes
        self._call_timeout_s = call_timeout_s
        self._bytes = 0
        self._cache: OrderedDict[str, Mapping[str, Float32]] = OrderedDict()
        self._encoding: dict[str, asyncio.Task[Conditioning]] = {}
        self._stats = stats or Stats()

    async def get(self, text: str) -> Conditioning:
        """The UNet's conditioning for one text: arrays without a batch dimension, by input name.

        Raises:
            StageFailed: the encoder failed.
        """
        if text in self._cache:
            self._stats.count("text_cache_hits")
            self._cache.move_to_end(text)
            return self._cache[text]
        task = self._encoding.get(text)
        if task is None:
            self._stats.count("text_cache_misses")
            task = asyncio.create_task(self._encode(text))
            self._encoding[text] = task
            task.add_done_callback(lambda done: self._forget(text, done))
        else:
            self._stats.count("text_cache_hits")
        # Shielded, since other requests may wait for the same text when this one is cancelled.
        return await asyncio.shield(task)

    def _forget(self, text: str, task: asyncio.Task[Conditioning]) -> None:
        del self._encoding[text]
        if not task.cancelled():
            task.exception()  # so that asyncio does not complain of it where all who waited have been cancelled

    async def _encode(self, text: str) -> Conditioning:
        input_ids = self._tokenizer.encode(text).input_ids[np.newaxis]
        batch = await checked(TEXT_ENCODER, self._stages.encode_text(input_ids), self._call_timeout_s)
        embedding = {name: array[0] for name, array in batch.items()}
        self._cache[text] = embedding
        self._bytes += _bytes(embedding)
        while self._bytes > self._max_bytes:
            _, dropped = self._cache.popitem(last=False)
            self._bytes -= _bytes(dropped)
        return embedding


def _bytes(embedding: Conditioning) -> int:
    return sum(array.nbytes for array in embedding.values())
