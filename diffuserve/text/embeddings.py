"""Text embeddings, each computed once: a cache over the text encoder.

A prompt becomes what the UNet is conditioned on in four steps: its attention syntax is read (`diffuserve.text.prompting`),
its tokens are cut into chunks (`diffuserve.text.tokenizer`), the text encoder takes all chunks in one call, and the weights
multiply what it returns. docs/prompting.md describes it for users.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from diffuserve.errors import StageFailed
from diffuserve.stages import Conditioning, Float32, StageCalls, finite_rows
from diffuserve.stats import Stats
from diffuserve.tensors import ENCODER_HIDDEN_STATES
from diffuserve.text.prompting import parse_prompt
from diffuserve.text.tokenizer import Encoded, Tokenizer

# Texts whose tokens are kept: those of the requests in flight, a few kilobytes each.
_ENCODED_TEXTS = 256


class TextEmbeddings:
    """Embeddings by text, the least recently used dropped beyond `max_bytes`.

    Requests with the same text that arrive together wait for one call of the encoder. A failed call is not kept, nor what
    is not finite.

    Args:
        tokenizers: by input of the text encoder, as `diffuserve.text.tokenizer.tokenizers_of` gives them. Where two of them
            cut a text differently (Stable Diffusion XL's second takes each "!" as a token of its own), the first one's
            weights hold.
        calls: of the text encoder.
        max_chunks: of a text; what does not fit into them is not used.
        zero_empty_negative: embed an empty negative prompt as zeros.
    """

    def __init__(
        self,
        tokenizers: Mapping[str, Tokenizer],
        calls: StageCalls,
        stats: Stats | None = None,
        max_bytes: int = 64 << 20,
        *,
        max_chunks: int = 1,
        zero_empty_negative: bool = False,
    ) -> None:
        self._tokenizers = tokenizers
        self._calls = calls
        self._max_bytes = max_bytes
        self._max_chunks = max_chunks
        self._zero_empty_negative = zero_empty_negative
        self._bytes = 0
        self._cache: OrderedDict[str, Mapping[str, Float32]] = OrderedDict()
        self._encoding: dict[str, asyncio.Task[Conditioning]] = {}
        self._stats = stats or Stats()
        # A request asks several times: to embed a text, and what of it did not fit.
        self._encode = lru_cache(_ENCODED_TEXTS)(self._encode_anew)

    def dropped_text(self, text: str) -> str:
        """The end of a text that does not fit, without its attention syntax; empty if everything fits."""
        return next(iter(self._encode(text).values())).dropped_text

    def pads(self, prompt: str, negative_prompt: str | None) -> bool:
        """Whether `get_pair` puts chunks of the empty prompt after one of the two."""
        return len(set(self._chunks(prompt, negative_prompt))) > 1

    def chunks(self, prompt: str, negative_prompt: str | None) -> int:
        """How many chunks each of what `get_pair` returns has."""
        return max(self._chunks(prompt, negative_prompt))

    def _chunks(self, prompt: str, negative_prompt: str | None) -> list[int]:
        """Of each text that is embedded."""
        texts = [prompt]
        if negative_prompt is not None and (negative_prompt or not self._zero_empty_negative):
            texts.append(negative_prompt)
        return [len(next(iter(self._encode(text).values())).input_ids) for text in texts]

    async def get_pair(self, prompt: str, negative_prompt: str | None) -> tuple[Conditioning, Conditioning | None]:
        """What guidance leads to and what it leads away from, with the same number of tokens.

        The shorter is followed by chunks of the empty prompt until it has as many tokens, as AUTOMATIC1111's web UI
        does. None for `negative_prompt` means no guidance.

        Raises:
            StageFailed: the encoder failed, or returned values that are not finite.
        """
        if negative_prompt is None:
            return await self.get(prompt), None
        if not negative_prompt and self._zero_empty_negative:
            conditional = await self.get(prompt)
            return conditional, {name: np.zeros_like(array) for name, array in conditional.items()}
        pair = await asyncio.gather(self.get(prompt), self.get(negative_prompt))
        tokens = max(len(conditioning[ENCODER_HIDDEN_STATES]) for conditioning in pair)
        conditional, unconditional = [await self._padded(conditioning, tokens) for conditioning in pair]
        return conditional, unconditional

    async def get(self, text: str) -> Conditioning:
        """The UNet's conditioning for one text: arrays without a batch dimension, by input name.

        `encoder_hidden_states` is (k * L, D), k chunks one after the other; a pooled embedding is the first chunk's.

        Raises:
            StageFailed: the encoder failed, or returned values that are not finite.
        """
        if text in self._cache:
            self._stats.count("text_cache_hits")
            self._cache.move_to_end(text)
            return self._cache[text]
        task = self._encoding.get(text)
        if task is None:
            self._stats.count("text_cache_misses")
            task = asyncio.create_task(self._embed(text))
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

    async def _padded(self, conditioning: Conditioning, tokens: int) -> Conditioning:
        hidden = conditioning[ENCODER_HIDDEN_STATES]
        if len(hidden) == tokens:
            return conditioning
        empty = (await self.get(""))[ENCODER_HIDDEN_STATES]
        chunks = [empty] * ((tokens - len(hidden)) // len(empty))
        return {**conditioning, ENCODER_HIDDEN_STATES: np.concatenate([hidden, *chunks])}

    async def _embed(self, text: str) -> Conditioning:
        encoded = self._encode(text)
        input_ids = {name: each.input_ids for name, each in encoded.items()}
        chunks = await self._calls.encode_text(input_ids)
        hidden = weighted(chunks[ENCODER_HIDDEN_STATES], next(iter(encoded.values())).weights)
        if not finite_rows({**chunks, ENCODER_HIDDEN_STATES: hidden}).all():
            raise StageFailed(
                "The text encoder returned values that are not finite for this text, so nothing can be drawn of it. If it "
                "runs in fp16, select bf16 or fp32 for it: diffuserve engines BUNDLE --select ENGINE --precision PRECISION"
            )
        # Each output's first chunk, and of the hidden states all chunks, joined along the tokens.
        embedding = {name: array[0] for name, array in chunks.items()}
        embedding[ENCODER_HIDDEN_STATES] = hidden.reshape(-1, hidden.shape[-1])
        self._cache[text] = embedding
        self._bytes += _bytes(embedding)
        while self._bytes > self._max_bytes:
            _, dropped = self._cache.popitem(last=False)
            self._bytes -= _bytes(dropped)
        return embedding

    def _encode_anew(self, text: str) -> dict[str, Encoded]:
        """The text by input of the encoder, in the same number of chunks for all."""
        texts = parse_prompt(text)

        encoded = {name: tokenizer.encode(texts, self._max_chunks) for name, tokenizer in self._tokenizers.items()}
        chunks = max(len(each.input_ids) for each in encoded.values())
        return {
            name: each if len(each.input_ids) == chunks else self._tokenizers[name].encode(texts, chunks, chunks)
            for name, each in encoded.items()
        }


def weighted(hidden: Float32, weights: Float32) -> Float32:
    """Multiplies each token's hidden state by its weight, then each chunk by what restores its mean.

    As AUTOMATIC1111's web UI does by default (`EmphasisOriginal`): the mean is over a chunk's tokens and features, start,
    end and padding included. A chunk whose weights are all 1 comes back as it was, to the bit. One whose mean the weights
    have made 0 keeps the weighted states.

    Args:
        hidden: (k, L, D) float32.
        weights: (k, L) float32.

    Returns:
        (k, L, D) float32.
    """
    if (weights == 1).all():
        return hidden
    product = hidden * weights[..., np.newaxis]
    before, after = (array.mean(axis=(1, 2), keepdims=True) for array in (hidden, product))
    restored: Float32 = product * np.divide(before, after, out=np.ones_like(before), where=after != 0)
    return restored


def _bytes(embedding: Conditioning) -> int:
    return sum(array.nbytes for array in embedding.values())
