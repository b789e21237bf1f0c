"""A prompt's tokens in chunks of the text encoder's length, and where a prompt that is too long is cut.

A text encoder takes L tokens at a time (77 in Stable Diffusion), two of which start and end them. So a longer prompt is cut
into chunks, as AUTOMATIC1111's web UI does, and what does not fit into all of them is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import tokenizers

from diffuserve.text.prompting import BREAK, WeightedText


@dataclass
class Chunk:
    """The tokens of a chunk and their weights, without start, end and padding."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


def chunks_from_texts(
    texts: Sequence[WeightedText], bpe: tokenizers.Tokenizer, room: int, max_chunks: int
) -> tuple[list[Chunk], str]:
    """Args:
        texts: each is encoded for itself, so no token reaches over a change of weight.
        bpe: the byte-pair encoding.
        room: tokens of a chunk.
        max_chunks: how many may be used.

    Returns:
        The chunks that are used, at least one, and the text that did not fit into them. Chunks are filled to the last place,
        wherever that cuts the text, or to a BREAK. A BREAK ends an empty chunk too, so several of them make empty ones; after
        the last text it begins none.
    """
    chunks = [Chunk()]
    for index, (text, weight) in enumerate(texts):
        following = texts[index + 1 :]
        if (text, weight) == BREAK:
            if len(chunks) == max_chunks:
                dropped = _joined(following)
                return chunks, dropped if dropped.strip() else ""
            chunks.append(Chunk())
            continue
        encoding = bpe.encode(text, add_special_tokens=False)
        done = 0
        while done < len(encoding.ids):
            if len(chunks[-1].ids) == room:
                if len(chunks) == max_chunks:
                    # Offsets count the characters of the text as it was given, before it was normalised.
                    return chunks, text[encoding.offsets[done][0] :] + _joined(following)
                chunks.append(Chunk())
            part = encoding.ids[done : done + room - len(chunks[-1].ids)]
            chunks[-1].ids += part
            chunks[-1].weights += [weight] * len(part)
            done += len(part)
    if len(chunks) > 1 and not chunks[-1].ids:
        chunks.pop()
    return chunks, ""


def _joined(texts: Sequence[WeightedText]) -> str:
    return "".join(" BREAK " if each == BREAK else each[0] for each in texts)
