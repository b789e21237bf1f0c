from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from diffuserve.bundle.checksums import sha256_of, sha256_of_files, verify
from diffuserve.bundle.manifest import FORMAT_VERSION, File, Manifest, read_manifest, write_manifest
from diffuserve.errors import BundleError
from tests.core.fakes import make_bundle


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_bundle(tmp_path)


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((bundle / "manifest.json").read_text())
    change(content)
    (bundle / "manifest.json").write_text(json.dumps(content))


def test_round_trip(manifest: Manifest, tmp_path: Path) -> None:
    assert read_manifest(tmp_path) == manifest
    text = (tmp_path / "manifest.json").read_text()
    assert list(json.loads(text)) == [field.name for field in msgspec.structs.fields(Manifest)]
    assert text.startswith('{\n  "format_version": 4')
    assert text.endswith("}\n")
    write_manifest(tmp_path, read_manifest(tmp_path))
    assert (tmp_path / "manifest.json").read_text() == text


@pytest.mark.parametrize(
    "data", [b"", b"{", b"null", b"[]", b"{}", b"\xff", b'{"format_version": "1"}', b'{"format_version": 4}']
)
def test_damaged_json(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(BundleError, match=r"manifest.json is damaged: .*Export the checkpoint again"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda content: content.update(extra=1), "extra"),
        (lambda content: content["model"].update(colour="red"), "colour"),
        (lambda content: content["components"]["unet"].update(speed=1), "speed"),
        (lambda content: content["model"].pop("size_multiple"), "size_multiple"),
        (lambda content: content["model"].update(width="64"), r"\$.model.width"),
        (lambda content: content["preview"]["matrix"].append([1, 2]), r"\$.preview.matrix"),
        (lambda content: content.update(source="\ud800"), "damaged"),
    ],
)
def test_damaged_fields_are_named(
    manifest: Manifest, tmp_path: Path, change: Callable[[dict[str, Any]], object], named: str
) -> None:
    edit(tmp_path, change)
    with pytest.raises(BundleError, match=named):
        read_manifest(tmp_path)


def test_a_manifest_from_before_a_field_with_a_default(manifest: Manifest, tmp_path: Path) -> None:
    edit(tmp_path, lambda content: content["model"].pop("zero_empty_negative"))
    assert read_manifest(tmp_path).model.zero_empty_negative is False


def test_newer_format(manifest: Manifest, tmp_path: Path) -> None:
    edit(tmp_path, lambda content: content.update(format_version=FORMAT_VERSION + 1, new_field=1))
    with pytest.raises(BundleError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'manifest.json'} has format version {FORMAT_VERSION + 1}, and this diffuserve reads version "
        f"{FORMAT_VERSION}. Upgrade diffuserve, or "
        "export fake again from where its files lie, then assemble or archive it: diffuserve export CHECKPOINT"
    )


def test_older_format(manifest: Manifest, tmp_path: Path) -> None:
    given = ["my checkpoint.safetensors", "--lora", "style.safetensors:0.8", "--clip-skip", "1"]
    edit(
        tmp_path,
        lambda content: content.update(
            format_version=FORMAT_VERSION - 1, exported_with=given, source="mine + style:0.8"
        ),
    )
    edit(tmp_path, lambda content: content.pop("reference"))
    with pytest.raises(BundleError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'manifest.json'} has format version {FORMAT_VERSION - 1}, and this diffuserve reads version "
        f"{FORMAT_VERSION}. Export mine + style:0.8 "
        "again from where its files lie, then assemble or archive it: "
        "diffuserve export 'my checkpoint.safetensors' --lora style.safetensors:0.8 --clip-skip 1"
    )


def test_another_format_that_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format_version": 1, "source": ["elsewhere"]}')
    with pytest.raises(BundleError, match=r"Export the checkpoint again .*: diffuserve export CHECKPOINT$"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", [".", "no-such-folder", "tokenizer/tokenizer.json"])
def test_no_bundle(manifest: Manifest, tmp_path: Path, name: str) -> None:
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(BundleError, match=r"is not a bundle: it has no manifest.json. Make one: diffuserve export"):
        read_manifest(tmp_path / name)


def test_verify_reads_every_file(manifest: Manifest, tmp_path: Path) -> None:
    verify(tmp_path, manifest)
    files = manifest.all_files()
    assert {file.path for file in files} == {
        path.relative_to(tmp_path).as_posix()
        for path in tmp_path.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    for file in files:
        path = tmp_path / file.path
        data = path.read_bytes()
        for altered in (data[:-1], data + b" ", data[:-1] + bytes([data[-1] ^ 1])):
            path.write_bytes(altered)
            with pytest.raises(BundleError, match=f"{path} is damaged"):
                verify(tmp_path, manifest)
        path.unlink()
        with pytest.raises(BundleError, match=f"{path} is missing"):
            verify(tmp_path, manifest)
        path.mkdir()
        with pytest.raises(BundleError, match=f"{path} is missing"):
            verify(tmp_path, manifest)
        path.rmdir()
        path.write_bytes(data)
    verify(tmp_path, manifest)


@pytest.mark.parametrize("path", ["../outside", "{tmp_path}/outside", "unet/../../outside", "link"])
def test_verify_stays_inside(tmp_path: Path, path: str) -> None:
    bundle, outside = tmp_path / "bundle", tmp_path / "outside"
    outside.write_text("secret")
    manifest = make_bundle(bundle)
    (bundle / "link").symlink_to(outside)
    path = path.format(tmp_path=tmp_path)
    file = File(path, outside.stat().st_size, sha256_of(outside))
    with pytest.raises(BundleError, match="lies outside the bundle"):
        verify(bundle, msgspec.structs.replace(manifest, files=(file,)))


def test_verify_follows_a_link_to_the_bundle(tmp_path: Path) -> None:
    manifest = make_bundle(tmp_path / "bundle")
    (tmp_path / "link").symlink_to("bundle")
    verify(tmp_path / "link", manifest)


def test_hash_of_files_depends_on_names_and_contents_only() -> None:
    files = [File("a", 1, "0" * 64), File("b", 1, "1" * 64)]
    assert sha256_of_files(files) == sha256_of_files(reversed(files))
    others = [files[:1], [File("a", 1, "1" * 64), File("b", 1, "0" * 64)], [files[0], File("c", 1, "1" * 64)]]
    assert len({sha256_of_files(group) for group in (files, *others)}) == 4
