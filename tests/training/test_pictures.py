"""Folders of pictures and captions as people have them."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffuserve_training.config import ConfigError, Lora, read_config
from diffuserve_training.pictures import load_square, read_pictures, summary
from tests.core import picture_files as files

WALL = Image.new("RGB", (15, 10), "red")


def _folder(folder: Path, *names: str) -> Path:
    for name in names:
        WALL.save(folder / name)
    return folder


def _captions(folder: Path, prompt: str | None = None) -> dict[str, str]:
    return {picture.path.name: picture.caption for picture in read_pictures(folder, prompt)}


def _line(name: str, text: str) -> str:
    return json.dumps({"file_name": name, "text": text}, ensure_ascii=False)


def test_captions_come_from_texts_metadata_and_the_prompt(tmp_path: Path) -> None:
    folder = _folder(tmp_path, "a.png", "b.jpg", "c.webp", "d.bmp", "e.gif")
    (folder / "a.txt").write_text("a red wall\n")
    (folder / "d.caption").write_text("a caption")
    (folder / "e.txt").write_text("a text")
    (folder / "e.caption").write_text("a caption")
    (folder / "metadata.jsonl").write_text(_line("b.jpg", "a lawn") + "\n" + _line("./a.png", "unused") + "\n\n")
    expected = {"a.png": "a red wall", "b.jpg": "a lawn", "c.webp": "a wall", "d.bmp": "a caption", "e.gif": "a text"}
    assert _captions(folder, "a wall") == expected
    with pytest.raises(ConfigError, match=r"c\.webp has no caption: write c\.txt"):
        read_pictures(folder, None)


def test_a_folder_without_pictures_and_one_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no pictures"):
        read_pictures(tmp_path, "x")
    with pytest.raises(ConfigError, match="not a folder of pictures"):
        read_pictures(tmp_path / "nowhere", "x")


def test_what_else_lies_in_such_folders(tmp_path: Path) -> None:
    """Capitals, two pictures of one name, what macOS and caches leave, folders, links."""
    folder = _folder(tmp_path, "A.JPG", "a.png", "a.jpeg", "b.c.PNG")
    for name, text in (("A.TXT", "capital"), ("a.txt", "both"), ("b.c.txt", "dotted")):
        (folder / name).write_text(text)
    for name in ("._a.png", ".DS_Store", "a.npz", "Thumbs.db"):
        (folder / name).write_bytes(b"none")
    (folder / "x.png").mkdir()
    (folder / "linked.png").symlink_to(folder / "a.png")
    expected = {"A.JPG": "capital", "a.jpeg": "both", "a.png": "both", "b.c.PNG": "dotted", "linked.png": "other"}
    assert _captions(folder, "other") == expected


@pytest.mark.parametrize("name", ["8.png.txt", "9.txt", "B.caption", "README.TXT"])
def test_a_caption_of_no_picture_is_named(tmp_path: Path, name: str) -> None:
    folder = _folder(tmp_path, "8.png", "b.jpg")
    (folder / name).write_text("a wall")
    for prompt in ("x", None):
        with pytest.raises(ConfigError, match=f"{name} is the caption of no picture"):
            read_pictures(folder, prompt)


def test_a_summary_counts_captions_by_where_they_are_from(tmp_path: Path) -> None:
    folder = _folder(tmp_path, "a.png", "b.png", "c.png", "d.jpg", "e.png", "f.png", "g.png")
    for name, text in (("a.TXT", "one"), ("b.txt", " \n"), ("c.txt", "three"), ("d.caption", "four")):
        (folder / name).write_text(text)
    (folder / "metadata.jsonl").write_text(_line("e.png", "  five\n") + "\n" + _line("f.png", "\t") + "\n")
    pictures = read_pictures(folder, " seven ")
    assert [picture.caption for picture in pictures] == ["one", "", "three", "four", "five", "", "seven"]
    expected = "7 pictures; captions: 3 of .txt, 1 of .caption, 2 of metadata.jsonl, 1 the prompt, 2 empty"
    assert summary(pictures) == expected
    assert summary(pictures[:1]) == "1 picture; captions: 1 of .txt"


@pytest.mark.parametrize("name", ["scan.TIF", "phone.heic", "new.avif"])
def test_a_picture_that_is_not_read_is_not_left_out_silently(tmp_path: Path, name: str) -> None:
    _folder(tmp_path, "a.png")
    (tmp_path / name).write_bytes(b"any")
    with pytest.raises(ConfigError, match=f"{name} is of a format that is not read: save it as PNG"):
        read_pictures(tmp_path, "x")


def test_captions_in_a_table_are_not_passed_over(tmp_path: Path) -> None:
    _folder(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a cat\n")
    with pytest.raises(ConfigError, match=r"metadata\.csv is not read: write its captions to metadata\.jsonl"):
        read_pictures(tmp_path, "x")


def test_a_name_whose_accents_are_written_apart(tmp_path: Path) -> None:
    """As macOS does, while the texts beside it say it in one."""
    names = [unicodedata.normalize("NFD", name) for name in ("caf\u00e9.png", "m\u00fcsli.png")]
    folder = _folder(tmp_path, *names)
    (folder / "caf\u00e9.txt").write_text("a cup")
    (folder / "metadata.jsonl").write_text(_line("m\u00fcsli.png", "a bowl"), encoding="utf-8")
    assert _captions(folder) == dict(zip(names, ("a cup", "a bowl"), strict=True))


@pytest.mark.parametrize("text", ["a dog", "ein H\u00fcndchen \U0001f600", "two\nlines\u2028\x0b and \x85 more"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_encodings(tmp_path: Path, encoding: str, text: str) -> None:
    mark = "\ufeff" if encoding.endswith("be") else ""  # the others' codecs write one, but for plain UTF-8's
    folder = _folder(tmp_path, "a.png", "b.png")
    (folder / "a.txt").write_bytes(f"{mark}{text}\r\n".encode(encoding))
    (folder / "metadata.jsonl").write_bytes((mark + _line("b.png", text)).encode(encoding))
    assert _captions(folder) == {"a.png": text, "b.png": text}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("une fa\u00e7ade bleue".encode("latin-1"), r"invalid continuation byte at byte 6"),
        ("a dog".encode("utf-16-le"), "null characters, as UTF-16 without a byte order mark has"),
        (b"\xff\xfea\0 ", "truncated data at byte 4"),
        ("\u732b\u3068\u72ac".encode("shift-jis"), "at byte 0"),
    ],
    ids=["latin-1", "utf-16 without a mark", "half a character", "shift-jis"],
)
@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl"])
def test_other_encodings_are_refused(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    _folder(tmp_path, "a.png")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=rf"{name} is not text in UTF-8, .*{reason}\)\. Convert it.* iconv -f LATIN1"):
        read_pictures(tmp_path, None)


def test_metadata_ends_its_lines_at_line_feeds_only(tmp_path: Path) -> None:
    texts = ["one\u2028two", "one\u2029two\x85three", "tab\there", "one\x0b\x0c\x1ctwo"]
    names = [f"{number}.png" for number in range(len(texts))]
    _folder(tmp_path, *names)
    lines = [_line(name, text) for name, text in zip(names, texts, strict=True)]
    lines[3] = lines[3].replace("\\u000b", "\x0b")  # as it is, which some writers leave
    (tmp_path / "metadata.jsonl").write_bytes("\r\n".join(lines).encode())
    assert list(_captions(tmp_path).values()) == texts


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[]", "Expected `object`, got `array`"),
        ("3", "Expected `object`, got `int`"),
        ('{"file_name": "a.png"}', "missing required field `text`"),
        ('{"text": "a dog"}', "missing required field `file_name`"),
        ('{"file_name": "a.png", "text": null}', "Expected `str`, got `null`"),
        ('{"file_name": "a.png", "text": ["a", "dog"]}', "Expected `str`, got `array`"),
        ('{"file_name": "a.png", "text": "\\ud83d"}', "surrogates not allowed"),
        ('{"file_name": "a.png", "text": "a dog"', "Expecting"),
        ('{"file_name": "a.png", "text": "a dog"} {}', "Extra data"),
        ("a.png,a dog", "Expecting value"),
        ("[" * 100_000, "recursion"),
        (_line("b.png", "a dog"), "'b.png' is not a picture in"),
        (_line("a.txt", "a dog"), "'a.txt' is not a picture in"),
        (_line("other/a.png", "a dog"), "'other/a.png' is not a picture in"),
        (_line("c.png", "a dog"), "'c.png' has a caption in an earlier line"),
    ],
    ids=lambda text: text[:40],
)
def test_a_wrong_line_of_metadata_is_named(tmp_path: Path, line: str, reason: str) -> None:
    _folder(tmp_path, "a.png", "c.png")
    (tmp_path / "a.txt").write_text("not read")
    (tmp_path / "metadata.jsonl").write_text(_line("c.png", "a cat") + "\n\n" + line + "\n")
    with pytest.raises(ConfigError, match=f"metadata.jsonl, line 3: .*{reason}"):
        read_pictures(tmp_path, "x")


def test_load_square(tmp_path: Path) -> None:
    """The middle, after it was turned upright and laid on white."""
    scene = np.zeros((40, 100, 4), np.uint8) + np.array([0, 255, 0, 0], np.uint8)
    scene[:20, 30:70] = (255, 0, 0, 255)
    scene[20:, 30:70] = (0, 0, 255, 255)
    stored = np.rot90(scene, 1)  # to be turned by a quarter, clockwise
    (tmp_path / "a.png").write_bytes(files.png(stored, 8, files.RGBA, (b"eXIf", files.exif(6))))
    square = load_square(tmp_path / "a.png", 40)
    assert (square.shape, square.dtype) == ((40, 40, 3), np.uint8)
    assert (square[:20] == (255, 0, 0)).all() and (square[20:] == (0, 0, 255)).all()
    assert load_square(tmp_path / "a.png", 16).shape == (16, 16, 3)
    (tmp_path / "b.png").write_bytes(files.png(scene[:, :30], 8, files.RGBA))
    assert (load_square(tmp_path / "b.png", 8) == 255).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"none", "none of PNG, JPEG, WebP, GIF, BMP"),
        (b"", "The file is empty"),
        (
            files.png_header(20_000, 20_000, 1, files.GREY) + files.png_chunk(b"IDAT", b""),
            "20000 x 20000 px; at most 100000000 pixels",
        ),
        (files.encoded(np.zeros((9, 9, 3), np.uint8), "jpeg")[:-2], "JPEG file is damaged, incomplete"),
    ],
)
def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ConfigError, match=rf"a\.png is not a picture that can be read\. .*{reason}"):
        load_square(tmp_path / "a.png", 64)
    with pytest.raises(ConfigError, match=r"gone\.png is not a picture that can be read\. .*No such file"):
        load_square(tmp_path / "gone.png", 64)


def test_a_configuration_with_a_byte_order_mark(tmp_path: Path) -> None:
    optimisation = "{steps: 1, batch_size: 1, learning_rate: 1.0}"
    text = f"checkpoint: c\nimages: b\u00e4r\noptimisation: {optimisation}\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "lora.yaml").write_bytes(text.encode(encoding))
        assert read_config(tmp_path / "lora.yaml", Lora).images == "b\u00e4r"
    (tmp_path / "lora.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="is not a training's configuration"):
        read_config(tmp_path / "lora.yaml", Lora)
