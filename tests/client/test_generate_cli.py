"""`diffuserve generate`."""

import json
import os
import signal
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from diffuserve_client.generate_command import command
from diffuserve_client.retries import DEFAULT_RETRIES
from tests.client.fake_triton import DESCRIPTION, SIDE_PX, FakeTriton
from tests.waiting import LONG_S, wait_until


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*args: str | Path) -> Result:
    return CliRunner().invoke(command, [str(arg) for arg in args])


def draw(triton: FakeTriton, *args: str | Path) -> Result:
    return invoke(*args, "--url", triton.address)


def opened(path: Path) -> Image.Image:
    return Image.open(BytesIO(path.read_bytes()))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Nothing to draw"),
        (["a", "-o", "a.bmp"], "names no image format"),
        (["a", "-o", "missing/a.png"], "mkdir -p missing"),
        (["a", "-o", "a.png", "--format", "webp"], "format asked for is webp"),
        (["a", "--prompts", "missing.txt"], "missing.txt"),
        (["a", "--bundle", "."], "--bundle is for --local"),
        (["a", "--local", "--url", "localhost:8001"], "--local needs no server"),
        (["a", "--local", "--model", "photos"], "--local needs no server"),
        (["a", "--local"], "holds no bundle"),
        (["a", "-n", "0"], "num-images"),
        (["a", "--describe"], "--describe draws nothing"),
    ],
)
def test_usage_errors(args: list[str], message: str) -> None:
    result = invoke(*args)
    assert result.exit_code == 2
    assert message in result.stderr


def test_nothing_is_sent_if_the_output_cannot_be_written(triton: FakeTriton) -> None:
    assert draw(triton, "a cat", "-o", "missing/a.png").exit_code == 2
    assert triton.requests == []


def test_no_server_is_said_once() -> None:
    result = invoke("a", "b", "--url", "127.0.0.1:1")
    assert result.exit_code == 1
    assert result.stderr.count("No server answers at 127.0.0.1:1") == 1
    assert "diffuserve serve" in result.stderr


def test_the_model_is_asked_for_by_its_name(triton: FakeTriton) -> None:
    result = draw(triton, "a", "b", "--model", "photos")
    assert result.exit_code == 1
    assert result.stderr.count("does not serve the model 'photos'. It serves: stable_diffusion.") == 1


def test_one_image(triton: FakeTriton, folder: Path) -> None:
    result = draw(triton, "A cat, 4k", "--steps", "2", "--guidance-scale", "1", "--timeout", "9", "--priority", "0")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "a-cat-4k-100.png  seed 100  0.75 s\n"
    assert triton.requests == [
        {
            "prompt": "A cat, 4k",
            "steps": 2,
            "guidance_scale": 1.0,
            "timeout_ms": 9000,
            "priority": 0,
            "num_images": 1,
            "format": "png",
            "encoding": "binary",
            "progress": True,
        }
    ]
    assert opened(folder / "a-cat-4k-100.png").info["parameters"] == "A cat, 4k\nSeed: 100"


def test_describe(triton: FakeTriton, folder: Path) -> None:
    result = draw(triton, "--describe")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout)["fields"]["sampler"] == DESCRIPTION["fields"]["sampler"]
    assert names(folder) == []
    failed = invoke("--describe", "--url", "127.0.0.1:1", "--retries", "0")
    assert failed.exit_code == 1
    assert "No server answers at 127.0.0.1:1" in failed.stderr


def test_names_follow_the_order_of_prompts_and_seeds(triton: FakeTriton, folder: Path) -> None:
    (folder / "prompts.txt").write_text("# pets\na dog\n")
    result = draw(triton, "a cat", "--prompts", "prompts.txt", "--seed", "1", "--seed", "5", "-n", "2", "-o", "pet.jpg")
    assert result.exit_code == 0
    seeds = {path.name: opened(path).getpixel((0, 0)) for path in sorted(folder.glob("*.jpg"))}
    assert list(seeds) == [f"pet-{number}.jpg" for number in range(1, 9)]
    assert [red for red, _, _ in seeds.values()] == [1, 2, 5, 6] * 2  # type: ignore[misc]
    prompts = sorted((fields["prompt"], fields["seed"]) for fields in triton.requests)
    assert prompts == [("a cat", 1), ("a cat", 5), ("a dog", 1), ("a dog", 5)]


def test_existing_files_are_kept_unless_forced(triton: FakeTriton, folder: Path) -> None:
    (folder / "a.png").write_text("mine")
    assert draw(triton, "a cat", "-o", "a.png", "--quiet").stdout == "a-1.png\n"
    assert (folder / "a.png").read_text() == "mine"
    assert draw(triton, "a cat", "-o", "a.png", "--quiet", "--force").stdout == "a.png\n"
    assert names(folder) == ["a-1.png", "a.png"]
    assert (folder / "a.png").read_bytes() == (folder / "a-1.png").read_bytes()


def test_one_failure_leaves_the_other_images(triton: FakeTriton, folder: Path) -> None:
    result = draw(triton, "a cat", "error [stage_failed] the unet broke", "warn", "-o", "a.webp")
    assert result.exit_code == 1
    assert names(folder) == ["a-1.webp", "a-3.webp"]
    assert "Error: 'error [stage_failed] the unet broke': the unet broke\n" in result.stderr
    assert "Warning: 'warn': too long\n" in result.stderr


def test_grid(triton: FakeTriton, folder: Path) -> None:
    result = draw(triton, "a cat", "a dog", "--seed", "1", "-n", "3", "--grid", "-o", "pets.png")
    assert result.exit_code == 0
    assert names(folder) == ["pets.png"]
    sheet = opened(folder / "pets.png")
    assert sheet.size == (3 * SIDE_PX, 2 * SIDE_PX)
    assert [sheet.getpixel((column * SIDE_PX, SIDE_PX)) for column in range(3)] == [(1, 1, 1), (2, 2, 2), (3, 3, 3)]
    assert sheet.info["parameters"].count("Seed:") == 6


def test_a_sheet_too_large_for_its_format_becomes_png(triton: FakeTriton, folder: Path) -> None:
    # 2050 columns of 8 px are 16400 px; WebP ends at 16383.
    result = draw(triton, "a cat", "a dog", "-n", "2050", "--grid", "-o", "wide.webp")
    assert "16400x16 px are too large for webp" in result.stderr
    assert names(folder) == ["wide.png"]


def test_interrupt_cancels_the_request(triton: FakeTriton) -> None:
    code = "from diffuserve_client.generate_command import command; command()"
    args = [sys.executable, "-c", code, "a cat", "endless", "--url", triton.address]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("a-cat-100.png")  # saved before the other one has ended
        wait_until(lambda: len(triton.requests) == 2)  # the other one may not have been sent yet
        os.kill(process.pid, signal.SIGINT)
        assert triton.cancelled.wait(LONG_S)
        assert process.wait(LONG_S) == 130
        assert process.stderr.read() == "Cancelled.\n"


def test_retries(triton: FakeTriton) -> None:
    assert draw(triton, "error [draining] stopping", "--retries", "1").exit_code == 1
    assert len(triton.requests) == 2
    default = next(parameter.default for parameter in command.params if parameter.name == "retries")
    assert default == DEFAULT_RETRIES
