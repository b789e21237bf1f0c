"""Prompts to embeddings, against transformers' own text encoders and tokenizers with a few lines of torch around them.

The expected values start from the texts and weights that a prompt should come down to, written out by hand.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffuserve.engines.local_stages import LocalStages
from diffuserve.events import Completed
from diffuserve.pipeline import Pipeline
from diffuserve.request import request_from_fields
from diffuserve.stages import Conditioning, StageCalls
from diffuserve.text.embeddings import TextEmbeddings
from diffuserve.text.prompting import BREAK
from diffuserve.text.tokenizer import Tokenizer
from diffuserve.trials.similarity import psnr_db
from tests.core.fakes import TOKENIZER, FakeStages
from tests.core.webui import chunks_of

LENGTH = 77
APPLES = "a red apple on a blue table, " * 20
PROMPTS: dict[str, list[tuple[str, float]]] = {
    "": [("", 1.0)],
    "a red apple": [("a red apple", 1.0)],
    "a (red) apple, [flat]": [("a ", 1.0), ("red", 1.1), (" apple, ", 1.0), ("flat", 1 / 1.1)],
    "((a (dog:1.4))), cat": [("a ", 1.1 * 1.1), ("dog", 1.1 * 1.1 * 1.4), (", cat", 1.0)],
    "(a dog:0) and (a cat:-0.5)": [("a dog", 0.0), (" and ", 1.0), ("a cat", -0.5)],
    APPLES: [(APPLES, 1.0)],
    f"{APPLES}(a glossy:1.3) dog": [(APPLES, 1.0), ("a glossy", 1.3), (" dog", 1.0)],
    f"({APPLES}:0.8)a dog": [(APPLES, 0.8), ("a dog", 1.0)],
    "a dog BREAK (a cat:1.3) BREAK": [("a dog", 1.0), BREAK, ("a cat", 1.3), BREAK],
    f"BREAK {APPLES}(glossy) BREAK BREAK dog": [BREAK, (APPLES, 1.0), ("glossy", 1.1), BREAK, BREAK, ("dog", 1.0)],
    r"(a\, BREAK dog)": [("a,", 1.1), ("BREAK", -1.1), ("dog", 1.1)],
}

Encode = Callable[[Any], Any]  # (1, L) int64 -> (1, L, D)


class TorchStages(FakeStages):
    """Its text encoder is PyTorch's."""

    def __init__(self, encode: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        super().__init__()
        self._encode = encode

    async def encode_text(self, input_ids: Mapping[str, Any]) -> Conditioning:
        outputs = self._encode({name: torch.tensor(ids, dtype=torch.long) for name, ids in input_ids.items()})
        return {name: tensor.numpy() for name, tensor in outputs.items()}


@pytest.fixture(scope="module", autouse=True)
def without_gradients() -> Any:
    with torch.inference_mode():
        yield


def padding_with(token: str, path: Path) -> Path:
    """Writes a second tokenizer to `path`; Stable Diffusion XL's pads with "!"."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    tokenizer.pad_token = token
    tokenizer.save_pretrained(path)
    return path


def text_encoder(model_class: Any, seed: int, hidden_size: int) -> Any:
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=6,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=20.0,
    )
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        if "layer_norm" in name and name.endswith("bias"):  # otherwise every mean is 0
            torch.nn.init.normal_(parameter, 0.2, 0.3)
    return model


def expected_hidden(encode: Encode, tokenizer: Any, texts: list[tuple[str, float]], length: int = LENGTH) -> Any:
    """What AUTOMATIC1111's web UI computes: chunks of `length` - 2 tokens, each encoded, weighted and brought back to its mean."""
    chunks = []
    for chunk in chunks_of(texts, lambda text: tokenizer(text, add_special_tokens=False).input_ids, length - 2):
        row = [tokenizer.bos_token_id, *(token for token, _ in chunk), tokenizer.eos_token_id]
        row_weights = [1.0, *(weight for _, weight in chunk), 1.0]
        row += [tokenizer.pad_token_id] * (length - len(row))
        row_weights += [1.0] * (length - len(row_weights))
        z = encode(torch.tensor([row]))[0]
        before = z.mean()
        z = z * torch.tensor(row_weights)[:, None]
        chunks.append(z * (before / z.mean()))
    return torch.cat(chunks).numpy()


def get(embeddings: TextEmbeddings, prompt: str) -> Conditioning:
    return asyncio.run(embeddings.get(prompt))


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt[:30])
def test_one_text_encoder(prompt: str) -> None:
    model = text_encoder(CLIPTextModel, 0, 16)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)

    def encode(ids: Any) -> Any:
        return model(ids).last_hidden_state

    stages = TorchStages(lambda ids: {"encoder_hidden_states": encode(ids["input_ids"])})
    embeddings = TextEmbeddings({"input_ids": Tokenizer(TOKENIZER, LENGTH)}, StageCalls(stages), max_chunks=9)
    actual = get(embeddings, prompt)["encoder_hidden_states"]
    expected = expected_hidden(encode, tokenizer, PROMPTS[prompt])
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompt", ["", "a red apple"])
def test_a_plain_prompt_is_what_diffusers_encodes(prompt: str) -> None:
    model = text_encoder(CLIPTextModel, 0, 16)
    ids = CLIPTokenizer.from_pretrained(TOKENIZER)(prompt, padding="max_length", truncation=True, max_length=LENGTH)
    expected = model(torch.tensor([ids.input_ids])).last_hidden_state[0].numpy()
    stages = TorchStages(lambda ids: {"encoder_hidden_states": model(ids["input_ids"]).last_hidden_state})
    embeddings = TextEmbeddings({"input_ids": Tokenizer(TOKENIZER, LENGTH)}, StageCalls(stages), max_chunks=3)
    np.testing.assert_array_equal(get(embeddings, prompt)["encoder_hidden_states"], expected)


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt[:30])
def test_two_text_encoders(prompt: str, tmp_path: Path) -> None:
    """As in Stable Diffusion XL: the penultimate layers of both side by side, and the second's pooled embedding."""
    padding_2 = padding_with("!", tmp_path)
    first, second = text_encoder(CLIPTextModel, 1, 16), text_encoder(CLIPTextModelWithProjection, 2, 12)
    tokenizers = [CLIPTokenizer.from_pretrained(path) for path in (TOKENIZER, padding_2)]

    def encode(input_ids: Mapping[str, Any]) -> dict[str, Any]:
        outputs = [
            model(input_ids[name], output_hidden_states=True)
            for model, name in ((first, "input_ids"), (second, "input_ids_2"))
        ]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return {"encoder_hidden_states": hidden, "text_embeds": outputs[1].text_embeds}

    embeddings = TextEmbeddings(
        {"input_ids": Tokenizer(TOKENIZER, LENGTH), "input_ids_2": Tokenizer(padding_2, LENGTH)},
        StageCalls(TorchStages(encode)),
        max_chunks=9,
    )
    actual = get(embeddings, prompt)

    def encode_both(ids: Any) -> Any:
        """From the first tokenizer's ids: the second's differ only in the padding, all that follows the end token."""
        ids_2 = ids.clone()
        end = ids[0].tolist().index(tokenizers[0].eos_token_id)
        ids_2[0, end + 1 :] = tokenizers[1].pad_token_id
        return encode({"input_ids": ids, "input_ids_2": ids_2})["encoder_hidden_states"]

    expected = expected_hidden(encode_both, tokenizers[0], PROMPTS[prompt])
    np.testing.assert_allclose(actual["encoder_hidden_states"], expected, rtol=1e-4, atol=1e-4)
    tokenizer = tokenizers[1]
    chunk = chunks_of(PROMPTS[prompt], lambda text: tokenizer(text, add_special_tokens=False).input_ids, LENGTH - 2)[0]
    ids_2 = [tokenizer.bos_token_id, *(token for token, _ in chunk), tokenizer.eos_token_id]
    ids_2 += [tokenizer.pad_token_id] * (LENGTH - len(ids_2))
    pooled = second(torch.tensor([ids_2])).text_embeds[0].numpy()
    assert actual["text_embeds"].shape == pooled.shape
    np.testing.assert_allclose(actual["text_embeds"], pooled, rtol=1e-4, atol=1e-4)


def test_images_of_a_long_weighted_prompt_are_those_of_diffusers(bundle: Path, reference_pipeline: Any) -> None:
    """The bundled model's, where diffusers is given the embeddings and the bundle's pipeline the prompt."""
    from diffusers import DDIMScheduler

    pipe = reference_pipeline
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    on_table = " on a blue background, " + "with a glossy table, " * 8
    texts = [("a slice of ", 1.0), ("pizza", 1.4), (",", 1.0), (on_table, 0.8), ("flat", 1.0)]
    prompt = f"a slice of (pizza:1.4),({on_table}:0.8)flat"

    def encode(ids: Any) -> Any:
        return pipe.text_encoder(ids).last_hidden_state

    length = pipe.tokenizer.model_max_length
    hidden = torch.tensor(expected_hidden(encode, pipe.tokenizer, texts, length))[None]
    empty = torch.tensor(expected_hidden(encode, pipe.tokenizer, [("", 1.0)], length))[None]
    chunks = hidden.shape[1] // length
    assert chunks > 1
    [expected] = pipe(
        prompt_embeds=hidden,
        negative_prompt_embeds=empty.repeat(1, chunks, 1),
        guidance_scale=5.0,
        num_inference_steps=4,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(7),
    ).images

    async def main() -> Any:
        pipeline = Pipeline(bundle, stages)
        fields = {
            "prompt": prompt,
            "guidance_scale": 5.0,
            "steps": 4,
            "seed": 7,
            "sampler": "ddim",
            "width": 64,
            "height": 64,
        }
        request = request_from_fields(fields, pipeline.manifest.model, pipeline.limits)
        try:
            *_, last = [event async for event in pipeline.generate(request)]
        finally:
            await pipeline.close()
        assert isinstance(last, Completed)
        assert last.warnings == ()
        return last.pixels[0]

    stages = LocalStages(bundle)
    try:
        image = asyncio.run(main())
    finally:
        stages.close()
    assert psnr_db(image, expected) >= 38


def test_tokenizers_that_need_different_numbers_of_chunks(tmp_path: Path) -> None:
    shapes: list[Any] = []

    def encode(input_ids: Mapping[str, Any]) -> dict[str, Any]:
        shapes.append([tuple(ids.shape) for ids in input_ids.values()])
        return {"encoder_hidden_states": input_ids["input_ids"][..., None].float()}

    tokenizers = {"input_ids": Tokenizer(TOKENIZER, 12), "input_ids_2": Tokenizer(padding_with("d", tmp_path), 12)}
    prompt = "red dog " * 5
    needed = [len(tokenizer.encode([(prompt, 1.0)], max_chunks=9).input_ids) for tokenizer in tokenizers.values()]
    assert needed[0] < needed[1]  # where "d" pads it is a token of its own, as is the "!" of Stable Diffusion XL's
    embedding = get(TextEmbeddings(tokenizers, StageCalls(TorchStages(encode)), max_chunks=9), prompt)
    assert shapes == [[(needed[1], 12)] * 2]
    assert embedding["encoder_hidden_states"].shape == (needed[1] * 12, 1)
