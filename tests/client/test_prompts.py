"""Prompt files."""

from pathlib import Path

import pytest

from diffuserve.errors import InvalidRequest
from diffuserve_client.prompts import read_prompts


def test_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat\r\n\n  # not me\n  a dog  \nStück 🍕".encode())
    assert read_prompts(file) == ["a cat", "a dog", "Stück 🍕"]


def test_bad_encoding_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"a cat\nSt\xfcck\n")
    with pytest.raises(InvalidRequest, match=r"prompts.txt, line 2: not UTF-8 .* at byte 2"):
        read_prompts(file)


@pytest.mark.parametrize("content", ["", "# nothing\n\n"])
def test_empty_file(tmp_path: Path, content: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(content)
    with pytest.raises(InvalidRequest, match=r"prompts.txt holds no prompt"):
        read_prompts(file)
