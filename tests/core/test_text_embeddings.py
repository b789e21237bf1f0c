from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from diffuserve.errors import StageFailed
from diffuserve.text_embeddings import TextEmbeddings
from diffuserve.tokenizer import Tokenizer
from tests.core.fakes import MODEL, TOKENIZER, FakeStages

TOKENIZE = Tokenizer(TOKENIZER, MODEL.max_tokens)
EMBEDDING_BYTES = MODEL.max_tokens * MODEL.hidden_size * 4


def counts(embeddings: TextEmbeddings) -> tuple[int, int]:
    """Hits and misses."""
    stats = embeddings._stats
    return stats.total("text_cache_hits"), stats.total("text_cache_misses")


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Like asyncio.run; fails if an exception was never retrieved or a task was left behind."""
    noise: list[dict[str, Any]] = []

    async def quiet() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: noise.append(context))
        await main()
        gc.collect()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(quiet())
    gc.collect()
    assert noise == []


def failing(stage: str, array: Any) -> None:
    raise StageFailed("no encoder")


def test_each_text_is_encoded_once() -> None:
    async def main() -> None:
        stages = FakeStages()
        embeddings = TextEmbeddings(TOKENIZE, stages)
        first, other, again = [await embeddings.get(text) for text in ("a cat", "a dog", "a cat")]
        assert stages.calls == [("encode_text", (1, MODEL.max_tokens))] * 2
        assert counts(embeddings) == (1, 2)
        assert again["encoder_hidden_states"] is first["encoder_hidden_states"]
        expected = await FakeStages().encode_text(TOKENIZE.encode("a cat").input_ids[np.newaxis])
        np.testing.assert_array_equal(first["encoder_hidden_states"], expected["encoder_hidden_states"][0])
        assert not np.array_equal(first["encoder_hidden_states"], other["encoder_hidden_states"])

    run(main)


def test_concurrent_requests_share_a_call() -> None:
    async def main() -> None:
        stages = FakeStages(held="encode_text")
        embeddings = TextEmbeddings(TOKENIZE, stages)
        waiters = [asyncio.create_task(embeddings.get(text)) for text in ("a cat", "a cat", "", "a cat")]
        await stages.entered.wait()
        stages.release.set()
        results = await asyncio.gather(*waiters)
        assert len(stages.calls) == 2
        assert counts(embeddings) == (2, 2)
        assert results[0] is results[1] is results[3]

    run(main)


@pytest.mark.parametrize("cancelled", [0, 1])  # the one that began the call, and one that joined
def test_cancelling_one_waiter_leaves_the_others(cancelled: int) -> None:
    async def main() -> None:
        stages = FakeStages(held="encode_text")
        embeddings = TextEmbeddings(TOKENIZE, stages)
        waiters = [asyncio.create_task(embeddings.get("a cat")) for _ in range(3)]
        await stages.entered.wait()
        waiters[cancelled].cancel()
        await asyncio.wait([waiters[cancelled]])
        stages.release.set()
        results = await asyncio.gather(*waiters, return_exceptions=True)
        assert [isinstance(result, asyncio.CancelledError) for result in results] == [
            index == cancelled for index in range(3)
        ]
        await embeddings.get("a cat")
        assert len(stages.calls) == 1

    run(main)


def test_a_failure_reaches_all_waiters_and_is_not_kept() -> None:
    async def main() -> None:
        stages = FakeStages(on_call=failing)
        embeddings = TextEmbeddings(TOKENIZE, stages)
        results = await asyncio.gather(*(embeddings.get("a cat") for _ in range(3)), return_exceptions=True)
        assert [str(result) for result in results] == ["no encoder"] * 3
        assert len(stages.calls) == 1
        stages.on_call = lambda stage, array: None
        assert await embeddings.get("a cat")
        assert len(stages.calls) == 2

    run(main)


@pytest.mark.parametrize("on_call", [failing, lambda stage, array: None])
def test_a_call_that_nobody_waits_for_any_more_ends_quietly(on_call: Callable[[str, Any], None]) -> None:
    async def main() -> None:
        stages = FakeStages(on_call=on_call, held="encode_text")
        embeddings = TextEmbeddings(TOKENIZE, stages)
        waiters = [asyncio.create_task(embeddings.get("a cat")) for _ in range(2)]
        await stages.entered.wait()
        for waiter in waiters:
            waiter.cancel()
        await asyncio.gather(*waiters, return_exceptions=True)
        [call] = asyncio.all_tasks() - {asyncio.current_task()}
        stages.release.set()
        await asyncio.wait([call])

    run(main)


def test_the_least_recently_used_is_dropped() -> None:
    async def main() -> None:
        stages = FakeStages()
        embeddings = TextEmbeddings(TOKENIZE, stages, max_bytes=2 * EMBEDDING_BYTES + 1)

        async def encodes(text: str) -> bool:
            before = len(stages.calls)
            await embeddings.get(text)
            return len(stages.calls) > before

        for text, encoded in (("a", True), ("b", True), ("a", False), ("c", True), ("a", False), ("b", True)):
            assert await encodes(text) is encoded, text
        assert await encodes("c")  # went when b came back

    run(main)


def test_an_embedding_over_the_bound_is_returned_but_not_kept() -> None:
    async def main() -> None:
        stages = FakeStages()
        embeddings = TextEmbeddings(TOKENIZE, stages, max_bytes=EMBEDDING_BYTES - 1)
        for _ in range(2):
            assert await embeddings.get("a cat")
        assert len(stages.calls) == 2

    run(main)
