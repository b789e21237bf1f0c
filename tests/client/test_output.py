"""Names and files of images."""

import threading
from pathlib import Path

import pytest

from diffuserve.errors import InvalidRequest
from diffuserve_client import output
from diffuserve_client.output import check_writable, format_for, path_for, save, slug


def test_format() -> None:
    assert format_for(None, None) == "png"
    assert format_for(None, "webp") == "webp"
    assert format_for(Path("a.JPG"), None) == "jpeg"
    assert format_for(Path("a.jpeg"), "jpeg") == "jpeg"
    with pytest.raises(InvalidRequest, match=r"'a.bmp' names no image format.*\.png, \.jpg, \.jpeg, \.webp"):
        format_for(Path("a.bmp"), None)
    with pytest.raises(InvalidRequest, match="is a png file, but the format asked for is webp"):
        format_for(Path("a.png"), "webp")


def test_names() -> None:
    def name(path: Path | None, number: int, total: int) -> str:
        return str(path_for(path, "jpeg", prompt="A slice!", seed=7, number=number, total=total))

    assert name(Path("out/pizza.v2.jpg"), 1, 1) == "out/pizza.v2.jpg"
    assert name(Path("out/pizza.v2.jpg"), 3, 4) == "out/pizza.v2-3.jpg"
    assert name(None, 3, 4) == "a-slice-7.jpg"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A slice of pizza, 4k!", "a-slice-of-pizza-4k"),
        ("../../etc/passwd", "etc-passwd"),
        ("Straße 東京", "straße-東京"),
        ("", "image"),
        ("🍕", "image"),
        ("word " * 30, "-".join(["word"] * 9)),
        ("x" * 300, "x" * 48),
    ],
)
def test_slug(prompt: str, expected: str) -> None:
    assert slug(prompt) == expected


def test_slug_fits_a_file_name() -> None:
    assert len((slug("𐎀" * 300) + "-4294967295-999.webp").encode()) < 255


def test_taken_names_get_a_number(tmp_path: Path) -> None:
    path = tmp_path / "pizza.png"
    saved = [save(path, data, overwrite=False) for data in (b"a", b"b", b"c")]
    assert [file.name for file in saved] == ["pizza.png", "pizza-1.png", "pizza-2.png"]
    assert [file.read_bytes() for file in saved] == [b"a", b"b", b"c"]
    assert save(path, b"d", overwrite=True) == path
    assert path.read_bytes() == b"d"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pizza-1.png", "pizza-2.png", "pizza.png"]


def test_new_files_have_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    assert save(tmp_path / "a.png", b"", overwrite=False).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_dangling_links_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.symlink_to(tmp_path / "elsewhere")
    assert save(path, b"x", overwrite=False).name == "a-1.png"
    assert path.is_symlink()


@pytest.mark.parametrize("hard_links", [True, False])
def test_no_file_is_lost_among_many_writers(tmp_path: Path, hard_links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not hard_links:
        monkeypatch.setattr(output.os, "link", no_link)
    threads = [
        threading.Thread(target=save, args=(tmp_path / "a.png", bytes([index])), kwargs={"overwrite": False})
        for index in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    contents = sorted(file.read_bytes() for file in tmp_path.iterdir())
    assert contents == [bytes([index]) for index in range(20)]


def test_nothing_remains_of_a_failed_write(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save(tmp_path / "a.png", "no bytes", overwrite=False)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_check_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_check_names_what_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InvalidRequest, match=r"does not exist. Create it: mkdir -p"):
        check_writable(tmp_path / "missing" / "a.png")
    with pytest.raises(InvalidRequest, match="does not exist"):
        check_writable(tmp_path / "file" / "a.png")
    with pytest.raises(InvalidRequest, match="is a folder"):
        check_writable(tmp_path / "folder.png")
    with pytest.raises(InvalidRequest, match="cannot be the name of a file: File name too long"):
        check_writable(tmp_path / ("x" * 251 + ".png"))


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write to")
def test_check_finds_read_only_folders() -> None:
    with pytest.raises(InvalidRequest, match="Nothing can be written to the folder '/proc'"):
        check_writable(Path("/proc/a.png"))
