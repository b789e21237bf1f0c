from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from diffuserve.errors import StageFailed
from diffuserve.stages import StageCalls
from diffuserve.text.embeddings import TextEmbeddings, weighted
from diffuserve.text.tokenizer import Tokenizer
from tests.core.fakes import MODEL, TOKENIZER, FakeStages
from tests.core.tidy import run

TOKENIZE = Tokenizer(TOKENIZER, MODEL.max_tokens)
EMBEDDING_BYTES = MODEL.max_tokens * MODEL.hidden_size * 4
HIDDEN = "encoder_hidden_states"
LONG = "dog " * 25  # three chunks of ten tokens


def counts(embeddings: TextEmbeddings) -> tuple[int, int]:
    """Hits and misses."""
    stats = embeddings._stats
    return stats.total("text_cache_hits"), stats.total("text_cache_misses")


def failing(stage: str, array: Any) -> None:
    raise StageFailed("no encoder")


def test_each_text_is_encoded_once() -> None:
    async def main() -> None:
        stages = FakeStages()
        embeddings = TextEmbeddings({"input_ids": TOKENIZE}, StageCalls(stages))
        first, other, again = [await embeddings.get(text) for text in ("a cat", "a dog", "a cat")]
        assert stages.calls == [("encode_text", (1, MODEL.max_tokens))] * 2
        assert counts(embeddings) == (1, 2)
        assert again["encoder_hidden_states"] is first["encoder_hidden_states"]
        expected = await FakeStages().encode_text({"input_ids": TOKENIZE.encode([("a cat", 1.0)]).input_ids})
        np.testing.assert_array_equal(first["encoder_hidden_states"], expected["encoder_hidden_states"][0])
        assert not np.array_equal(first["encoder_hidden_states"], other["encoder_hidden_states"])

    run(main)


def test_concurrent_requests_share_a_call() -> None:
    async def main() -> None:
        stages = FakeStages(held="encode_text")
        embeddings = TextEmbeddings({"input_ids": TOKENIZE}, StageCalls(stages))
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
        embeddings = TextEmbeddings({"input_ids": TOKENIZE}, StageCalls(stages))
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
        embeddings = TextEmbeddings({"input_ids": TOKENIZE}, StageCalls(stages))
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
        embeddings = TextEmbeddings({"input_ids": TOKENIZE}, StageCalls(stages))
        waiters = [asyncio.create_task(embeddings.get("a cat")) for _ in range(2)]
        await stages.entered.wait()
        for waiter in waiters:
            waiter.cancel()
        await asyncio.gather(*waiters, return_exceptions=True)
        calls = asyncio.all_tasks() - {asyncio.current_task()}
        assert calls
        stages.release.set()
        await asyncio.wait(calls)

    run(main)


def test_a_pair_has_the_same_number_of_tokens() -> None:
    async def main() -> None:
        stages = FakeStages()
        embeddings = TextEmbeddings({"input_ids": TOKENIZE}, StageCalls(stages), max_chunks=3)
        short, long, empty = [(await embeddings.get(text))[HIDDEN] for text in ("a cat", LONG, "")]
        assert [len(hidden) for hidden in (short, long, empty)] == [12, 36, 12]
        padded = np.concatenate([short, empty, empty])
        for prompt, negative_prompt, expected in (
            ("a cat", LONG, (padded, long)),
            (LONG, "a cat", (long, padded)),
            (LONG, "", (long, np.concatenate([empty] * 3))),
            ("a cat", "", (short, empty)),
        ):
            conditional, unconditional = await embeddings.get_pair(prompt, negative_prompt)
            assert unconditional is not None
            for actual, hidden in zip((conditional, unconditional), expected, strict=True):
                np.testing.assert_array_equal(actual[HIDDEN], hidden)
                assert len(hidden) == embeddings.chunks(prompt, negative_prompt) * MODEL.max_tokens
        assert await embeddings.get_pair(LONG, None) == (await embeddings.get(LONG), None)
        assert [embeddings.chunks(text, None) for text in ("a cat", LONG)] == [1, 3]
        assert stages.rows("encode_text") == [1, 3, 1]  # a call for each text, whatever its chunks

    run(main)


def test_an_empty_negative_prompt_may_be_zeros() -> None:
    async def main() -> None:
        stages = FakeStages()
        embeddings = TextEmbeddings({"input_ids": TOKENIZE}, StageCalls(stages), max_chunks=3, zero_empty_negative=True)
        conditional, unconditional = await embeddings.get_pair(LONG, "")
        assert unconditional is not None
        np.testing.assert_array_equal(unconditional[HIDDEN], np.zeros_like(conditional[HIDDEN]))
        assert stages.rows("encode_text") == [3]
        assert embeddings.chunks(LONG, "") == 3
        _, unconditional = await embeddings.get_pair("", " ")  # an empty prompt is none, and a blank one is not empty
        assert unconditional is not None
        assert unconditional[HIDDEN].any()
        conditional, _ = await embeddings.get_pair("", "")
        assert conditional[HIDDEN].any()

    run(main)


def test_what_does_not_fit_is_told_without_its_brackets() -> None:
    embeddings = TextEmbeddings({"input_ids": TOKENIZE}, StageCalls(FakeStages()), max_chunks=2)
    for text in ("", "(a cat:1.3)", "a (red) dog " * 5):
        assert embeddings.dropped_text(text) == ""
    assert embeddings.dropped_text("dog " * 20 + "[a (red:1.3)] cat") == "a red cat"


def test_weights_of_one_leave_every_bit() -> None:
    hidden = np.random.default_rng(0).standard_normal((2, 5, 7), np.float32)
    weights = np.ones((2, 5), np.float32)
    assert weighted(hidden, weights) is hidden
    weights[1, 2] = 1.3
    np.testing.assert_array_equal(weighted(hidden, weights)[0], hidden[0])


def test_a_mean_that_cannot_be_restored_is_left() -> None:
    hidden = np.ones((1, 2, 3), np.float32)
    for weights in ([0, 0], [1, -1]):
        actual = weighted(hidden, np.array([weights], np.float32))
        np.testing.assert_array_equal(actual[0, :, 0], weights)


def test_the_least_recently_used_is_dropped() -> None:
    async def main() -> None:
        stages = FakeStages()
        embeddings = TextEmbeddings({"input_ids": TOKENIZE}, StageCalls(stages), max_bytes=2 * EMBEDDING_BYTES + 1)

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
        embeddings = TextEmbeddings({"input_ids": TOKENIZE}, StageCalls(stages), max_bytes=EMBEDDING_BYTES - 1)
        for _ in range(2):
            assert await embeddings.get("a cat")
        assert len(stages.calls) == 2

    run(main)
