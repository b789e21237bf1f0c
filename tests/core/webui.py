"""What AUTOMATIC1111's web UI makes of a text in an image and of a prompt, by its published rules and without its code."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_DEFAULTS = {"Clip skip": "1", "RNG": "GPU", "Schedule type": "Automatic"}
_BRACKETS = {")": "(", "]": "["}


def read_infotext(text: str) -> dict[str, str]:
    """The settings by name, and `Prompt` and `Negative prompt`.

    The last line holds the settings, if at least three are found in it. The lines before are the prompt, up to one that
    begins with "Negative prompt:". Blanks around lines do not count, nor do empty lines before either prompt's first.
    """
    *lines, last = text.strip().split("\n")
    settings = list(_settings(last))
    if len(settings) < 3:
        lines, settings = [*lines, last], []
    prompts: dict[str, list[str]] = {"Prompt": [], "Negative prompt": []}
    name = "Prompt"
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            name, line = "Negative prompt", line.removeprefix("Negative prompt:").strip()  # noqa: PLW2901
        if line or prompts[name]:
            prompts[name].append(line)
    read = {**_DEFAULTS, **{name: "\n".join(lines) for name, lines in prompts.items()}}
    for name, value in settings:
        if not value:
            continue  # an empty value is an error there, and what was read before stays
        if value.startswith('"') and value.endswith('"'):
            with contextlib.suppress(ValueError):
                value = json.loads(value)  # noqa: PLW2901
        width, by, height = value.partition("x")
        if by and width.isdecimal() and height.isdecimal():
            read[f"{name}-1"], read[f"{name}-2"] = width, height
        else:
            read[name] = value
    return read


def _settings(line: str) -> Iterator[tuple[str, str]]:
    """Names and values: a name of two characters at least, a colon, and a string in quotes that ends the setting, or all
    up to the next comma. What is not a setting is passed over, a character at a time."""
    position = 0
    while position < len(line):
        start = position
        while start < len(line) and line[start].isspace():
            start += 1
        colon = start
        while colon < len(line) and (_of_word(line[colon]) or line[colon] in " -/"):
            colon += 1
        if colon - start < 2 or line[colon : colon + 1] != ":" or not _of_word(line[start]):
            position += 1
            continue
        value = colon + 1
        while value < len(line) and line[value].isspace():
            value += 1
        end = _end_of_string(line, value)
        if end is None or line[end : end + 1] not in ("", ","):
            comma = line.find(",", value)
            end = len(line) if comma < 0 else comma
        yield line[start:colon], line[value:end]
        position = end + 1


def _of_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _end_of_string(line: str, start: int) -> int | None:
    if line[start : start + 1] != '"':
        return None
    end = start + 1
    while end < len(line) and line[end] != '"':
        end += 2 if line[end] == "\\" else 1
    return end + 1 if end < len(line) and end > start + 1 else None


def read_prompt(prompt: str) -> list[tuple[str, float]]:
    """Texts with their weights, and ("BREAK", -1) where a chunk ends.

    Every bracket that closes multiplies what has come since the one that it closes; those left open multiply at the end.
    A backslash goes, and leaves the bracket or backslash after it as text. Pieces of one weight are joined.
    """
    pieces: list[list[Any]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        for piece in pieces[opened[bracket].pop() :]:
            piece[1] *= factor

    position = 0
    while position < len(prompt):
        character = prompt[position]
        number = re.compile(r":\s*([+-]?[.0-9]+)\s*\)").match(prompt, position)
        if character == "\\":
            escaped = prompt[position + 1 : position + 2]
            escaped = escaped if escaped and escaped in "\\()[]" else ""
            pieces.append([escaped, 1.0])
            position += 1 + len(escaped)
        elif character in opened:
            opened[character].append(len(pieces))
            position += 1
        elif number and opened["("]:
            close("(", float(number[1]))
            position = number.end()
        elif character in _BRACKETS and opened[_BRACKETS[character]]:
            close(_BRACKETS[character], 1.1 if character == ")" else 1 / 1.1)
            position += 1
        elif number or character in ")]:":
            text = number[0] if number else character
            pieces.append([text, 1.0])
            position += len(text)
        else:
            end = next((i for i in range(position, len(prompt)) if prompt[i] in "\\()[]:"), len(prompt))
            for index, part in enumerate(re.split(r"\s*\bBREAK\b\s*", prompt[position:end])):
                pieces += [["BREAK", -1.0], [part, 1.0]] if index else [[part, 1.0]]
            position = end
    while opened["("]:
        close("(", 1.1)
    while opened["["]:
        close("[", 1 / 1.1)
    joined: list[tuple[str, float]] = []
    for text, weight in pieces:
        before = joined.pop()[0] if joined and joined[-1][1] == weight else ""
        joined.append((before + text, weight))
    return joined or [("", 1.0)]


def chunks_of(
    texts: Sequence[tuple[str, float]], tokenize: Callable[[str], list[int]], room: int
) -> list[list[tuple[int, float]]]:
    """Each chunk's tokens and weights, without start, end and padding.

    Each text is tokenised for itself. A chunk ends when another token does not fit, at a BREAK, and at the end of the
    prompt unless it is empty and not the first. (Its habit of moving what follows a late comma on is left out.)
    """
    chunks: list[list[tuple[int, float]]] = []
    chunk: list[tuple[int, float]] = []
    for text, weight in texts:
        if text == "BREAK" and weight == -1:
            chunks.append(chunk)
            chunk = []
            continue
        for token in tokenize(text):
            if len(chunk) == room:
                chunks.append(chunk)
                chunk = []
            chunk.append((token, weight))
    return [*chunks, chunk] if chunk or not chunks else chunks
