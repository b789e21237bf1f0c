"""Prompt files: one prompt a line."""

from __future__ import annotations

from pathlib import Path

from diffuserve.errors import InvalidRequest


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 file, one a line, stripped; blank lines and lines that start with # are skipped.

    Raises:
        InvalidRequest: the file cannot be read, is not UTF-8 (the line is named) or holds no prompt.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}.") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompt = line.decode().strip()
        except UnicodeDecodeError as error:
            raise InvalidRequest(
                f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start} of the line). "
                "Save the file as UTF-8."
            ) from None
        if prompt and not prompt.startswith("#"):
            prompts.append(prompt)
    if not prompts:
        raise InvalidRequest(f"{path} holds no prompt. Write one prompt a line; lines that start with # do not count.")
    return prompts
