"""The text that images carry, as other programs read it."""

from __future__ import annotations

import io
import random
import re
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image
from sd_parsers import ParserManager
from sd_parsers.parsers import AUTOMATIC1111Parser

from diffuserve import __version__
from diffuserve.bundle.manifest import FusedLora, Manifest
from diffuserve.images.encoding import encode_image
from diffuserve.images.infotext import infotext
from diffuserve.limits import Limits
from diffuserve.request import EmbeddedGuidanceRequest, TextToImageRequest, request_from_fields
from diffuserve.samplers import SAMPLERS, NoiseSchedule, trajectory
from tests.core.fakes import MODEL, make_bundle
from tests.core.test_images import PIXELS, text_of
from tests.core.webui import read_infotext

# The web UI's names for the samplers; PNDM without Runge-Kutta steps is PLMS.
NAMES = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_a": "Euler a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_karras": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2m_sde_karras": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "heun": "Heun",
    "pndm": "PLMS",
    "lcm": "LCM",
}
# Pieces of prompts and names that readers have stumbled on.
PIECES = [
    "a cat", "blue, flat", "\n", " ", "\n\n", "\t", "\r", "\r\n", "\u2028", "\x85", "\x0b", "\x1c", "\u3000", "\0", "é", "日本", "😀",
    '"', "'", "\\", '\\"', ",", ":", ", ", ": ", "{", "}", "<lora:x:1>", "(red:1.3)", "[a|b]", "BREAK", "x", "16:9",
    "Negative prompt:", "Negative prompt: ", "\nNegative prompt: a dog", "negative prompt:", "Steps: 20", "\nSteps: 20",
    "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 8x8", "Prompt: ", ', Prompt: "no"', "Model: ", "\nTemplate: ",
    ', Hashes: {"model": "0"}', ", CFG scale: 99", "CFG scale: 98, ",
]  # fmt: skip


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    made = make_bundle(tmp_path_factory.mktemp("bundle"))
    return msgspec.structs.replace(made, scheduler={"skip_prk_steps": True})


def text_from(rng: random.Random, pieces: int) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(0, pieces)))


def guidance_from(rng: random.Random) -> float:
    """As JSON has it, as float32 has it that came over the wire, and any number at all."""
    tenths = rng.randint(0, 500) / 10
    return rng.choice([tenths, float(np.float32(tenths)), rng.uniform(0, 50), float(np.float32(rng.uniform(0, 50)))])


def request_from(rng: random.Random) -> TextToImageRequest:
    return rng.choice([TextToImageRequest, TextToImageRequest, EmbeddedGuidanceRequest])(
        prompt=text_from(rng, 6),
        negative_prompt=text_from(rng, 3),
        steps=rng.randint(1, 150),
        guidance_scale=guidance_from(rng),
        seed=rng.randrange(2**32),
        width=8 * rng.randint(1, 256),
        height=8 * rng.randint(1, 256),
        sampler=rng.choice(sorted(SAMPLERS)),
    )


def manifest_from(rng: random.Random, manifest: Manifest, names: list[str]) -> Manifest:
    def name() -> str:
        return "".join(rng.choice(names) for _ in range(rng.randint(1, 4)))

    loras = tuple(
        FusedLora(name(), rng.choice([1.0, -0.25, rng.uniform(-2, 2)]), "ab" * 32, f"{rng.randrange(16**64):064x}")
        for _ in range(rng.choice([0, 0, 1, 2]))
    )
    model = msgspec.structs.replace(
        manifest.model,
        name=name(),
        clip_skip=rng.randint(0, 3),
        family=rng.choice(["stable-diffusion", "stable-diffusion-xl"]),
    )
    checkpoint = rng.choice(["", f"{rng.randrange(16**64):064x}"])
    return msgspec.structs.replace(manifest, model=model, loras=loras, checkpoint_sha256=checkpoint)


def is_size(text: str) -> bool:
    return re.fullmatch(r"\d+x\d+", text) is not None


def test_the_web_ui_reads_every_setting_back(manifest: Manifest) -> None:
    rng = random.Random(1)  # noqa: S311
    repeated = 0
    for _ in range(10_000):
        request, bundle = request_from(rng), manifest_from(rng, manifest, PIECES)
        text = infotext(request, bundle, request.seed)
        read = read_infotext(text)
        negative_prompt = request.negative_prompt if request.guided else ""
        assert (read["Prompt"], read["Negative prompt"]) == (request.prompt, negative_prompt), text
        assert int(read["Steps"]) == request.steps
        assert read["Sampler"] == NAMES.get(request.sampler, SAMPLERS[request.sampler].infotext)
        assert (read["Schedule type"] == "Karras") == request.sampler.endswith("_karras")
        assert np.float32(read["CFG scale"]) == np.float32(request.guidance_scale)
        assert len(read["CFG scale"]) <= len(repr(request.guidance_scale))
        assert int(read["Seed"]) == request.seed
        assert (int(read["Size-1"]), int(read["Size-2"])) == (request.width, request.height)
        assert read["RNG"] == "CPU"
        assert read.get("Model hash", "") == bundle.checkpoint_sha256[:10]
        assert is_size(bundle.model.name) or read["Model"] == bundle.model.name
        last_but = bundle.model.clip_skip + (bundle.model.clip_skip and bundle.model.family.endswith("xl"))
        assert int(read["Clip skip"]) == 1 + last_but
        for lora in bundle.loras:
            assert f"{lora.name}: " in read["Fused LoRAs"]
            assert lora.weights_sha256[:12] in read["Lora hashes"]
        assert read["Version"] == f"diffuserve {__version__}"
        assert "\n" not in text.split("Steps: ")[-1]
        assert len(text.split("\n")[-1].splitlines()) == 1  # for readers that end lines at more than \n
        repeated += ", Prompt: " in text.split("\n")[-1]
    assert 1000 < repeated < 9000  # both ways of telling a prompt were tried


def test_sd_parsers_reads_every_setting_back(manifest: Manifest) -> None:
    """It knows no quotes, so that a name with commas and colons is beyond it; it takes any "Negative prompt:" for one."""
    rng = random.Random(2)  # noqa: S311
    parser = AUTOMATIC1111Parser()
    plain = [piece for piece in PIECES if not {",", ":", "{"} & {*piece}]
    prompts = 0
    for _ in range(10_000):
        request, bundle = request_from(rng), manifest_from(rng, manifest, plain)
        bundle = msgspec.structs.replace(bundle, loras=())
        negative_prompt = request.negative_prompt if request.guided else ""
        text = infotext(request, bundle, request.seed)
        if "Negative prompt:" in request.prompt + negative_prompt:
            # It fails on a second one, and takes the last line for the settings in any case.
            text = text.split("\n")[-1]
        info = parser.parse({"parameters": text})
        [sampler] = info.samplers
        assert sampler.name == NAMES.get(request.sampler, SAMPLERS[request.sampler].infotext)
        assert int(sampler.parameters["steps"]) == request.steps
        assert np.float32(sampler.parameters["cfg_scale"]) == np.float32(request.guidance_scale)
        assert int(sampler.parameters["seed"]) == request.seed
        assert (sampler.parameters.get("scheduler") == "Karras") == request.sampler.endswith("_karras")
        assert sampler.model is not None
        assert (sampler.model.hash or "") == bundle.checkpoint_sha256[:10]
        assert info.metadata["Size"] == f"{request.width}x{request.height}"
        if text.count("\n"):
            expected = [each.replace("\0", " ").strip() for each in (request.prompt, negative_prompt)]
            assert [info.full_prompt, info.full_negative_prompt] == expected
            prompts += 1
    assert prompts > 2000


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_files_carry_it_whole(manifest: Manifest, format: str) -> None:
    rng = random.Random(3)  # noqa: S311
    for _ in range(40):
        request, bundle = request_from(rng), manifest_from(rng, manifest, PIECES)
        text = infotext(request, bundle, request.seed)
        with Image.open(io.BytesIO(encode_image(PIXELS, format, text))) as image:
            assert text_of(image, format) == text
            if format == "png":
                assert read_infotext(str(image.text["parameters"]))["Prompt"] == request.prompt  # type: ignore[attr-defined]


def test_sd_parsers_reads_a_file(manifest: Manifest) -> None:
    request = request_from_fields({"prompt": "a cat,\nflat", "seed": 3}, MODEL, Limits.for_model(MODEL))
    image = encode_image(PIXELS, "png", infotext(request, manifest, 3))
    info = ParserManager().parse(io.BytesIO(image))
    assert info is not None
    assert (info.full_prompt, info.samplers[0].name) == ("a cat,\nflat", "Euler")


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_the_longest_prompts_of_the_default_limits_fit(manifest: Manifest, format: str) -> None:
    for prompt in ("a" * 8192, "\1" * 8192, "é\n" * 2730, "😀" * 2048, 'a:,"' * 2048, " a" * 4096):
        fields = {"prompt": prompt, "negative_prompt": prompt, "guidance_scale": 4.5}
        request = request_from_fields(fields, MODEL, Limits.for_model(MODEL))
        text = infotext(request, manifest, 1)
        with Image.open(io.BytesIO(encode_image(PIXELS, format, text))) as image:
            assert text_of(image, format) == text
        assert read_infotext(text)["CFG scale"] == "4.5"


def settings_of(manifest: Manifest, **fields: Any) -> str:
    """The last line, without the end that is the same for all."""
    fields = {"prompt": "a cat", "seed": 41, "guidance_scale": 4.5, "steps": 9, "width": 32, **fields}
    request = request_from_fields(fields, MODEL, Limits.for_model(MODEL))
    settings, _, end = infotext(request, manifest, 41).split("\n")[-1].partition(", Engine: ")
    assert end == (
        f"onnxruntime fp32, Source hash: 0123456789, Bundle hash: {manifest.bundle_sha256[:10]}, "
        f"Version: diffuserve {__version__}"
    )
    return settings


def test_all_of_it(manifest: Manifest) -> None:
    fields = {"prompt": "a cat,\nblue", "negative_prompt": "a dog", "steps": 9, "guidance_scale": 4.5, "width": 32}
    request = request_from_fields(fields, MODEL, Limits.for_model(MODEL))
    assert infotext(request, manifest, 41).split(", Engine: ")[0] == (
        "a cat,\nblue\n"
        "Negative prompt: a dog\n"
        "Steps: 9, Sampler: Euler, Schedule type: Uniform, CFG scale: 4.5, Seed: 41, Size: 32x48, Model: fake, RNG: CPU"
    )


def test_without_prompts(manifest: Manifest) -> None:
    for fields in ({"prompt": ""}, {"prompt": "", "negative_prompt": "a dog", "guidance_scale": 1.0}):
        request = request_from_fields({"seed": 1, **fields}, MODEL, Limits.for_model(MODEL))
        text = infotext(request, manifest, 1)
        assert text.startswith("Steps: 7, Sampler: Euler, ")
        assert "Negative" not in text


@pytest.mark.parametrize(
    ("sampler", "scheduler", "expected"),
    [
        ("ddim", {}, "DDIM"),
        ("unipc", {}, "UniPC"),
        ("lcm", {}, "LCM"),
        ("pndm", {"skip_prk_steps": True}, "PLMS"),
        ("pndm", {}, "PNDM"),
        ("euler", {}, "Euler, Schedule type: Uniform"),
        ("euler_a", {"timestep_spacing": "leading"}, "Euler a, Schedule type: DDIM"),
        ("heun", {"timestep_spacing": "trailing"}, "Heun, Schedule type: SGM Uniform"),
        ("dpmpp_2m", {"timestep_spacing": "linspace"}, "DPM++ 2M, Schedule type: SGM Uniform"),
        ("dpmpp_2m_sde", {}, "DPM++ 2M SDE, Schedule type: SGM Uniform"),
        ("dpmpp_2m_karras", {"timestep_spacing": "leading"}, "DPM++ 2M, Schedule type: Karras"),
        ("dpmpp_2m_sde_karras", {}, "DPM++ 2M SDE, Schedule type: Karras"),
    ],
)
def test_samplers_and_schedules(manifest: Manifest, sampler: str, scheduler: dict[str, Any], expected: str) -> None:
    manifest = msgspec.structs.replace(manifest, scheduler=scheduler)
    assert settings_of(manifest, sampler=sampler).startswith(f"Steps: 9, Sampler: {expected}, CFG scale: 4.5, ")


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_a_schedule_type_is_the_nearest_to_the_timesteps(manifest: Manifest, spacing: str, sampler: str) -> None:
    """The web UI's own, by their definitions, for 20 of 1000 steps: none of its others is nearer."""
    types = {
        "Uniform": np.linspace(999, 0, 20),
        "SGM Uniform": np.linspace(999, 0, 21)[:-1],
        "DDIM": np.arange(1, 1000, 50)[::-1],
    }
    scheduler = {"timestep_spacing": spacing, "steps_offset": 1, "beta_schedule": "scaled_linear"}
    steps = trajectory(NoiseSchedule.from_config(scheduler), sampler, 20).timesteps
    distances = {name: float(np.abs(timesteps - steps).mean()) for name, timesteps in types.items()}
    nearest = min(distances, key=lambda name: distances[name])
    settings = settings_of(msgspec.structs.replace(manifest, scheduler=scheduler), sampler=sampler)
    assert f", Schedule type: {nearest}, " in settings


@pytest.mark.parametrize(
    ("scale", "written"),
    [
        (7.0, "7"),
        (7.3, "7.3"),
        (7.300000190734863, "7.3"),
        (0.0, "0"),
        (1.0000001192092896, "1.0000001"),
        (12.345678901234, "12.345678901234"),
        (1e-5, "0.00001"),
    ],
)
def test_the_scale_is_not_rounded(manifest: Manifest, scale: float, written: str) -> None:
    assert f", CFG scale: {written}, Seed" in settings_of(manifest, guidance_scale=scale)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("plain name (v1)", "plain name (v1)"),
        ('of "quotes" inside', 'of "quotes" inside'),
        ("Größe", "Größe"),
        ("v1, pruned", '"v1, pruned"'),
        ("anime: ü", '"anime: ü"'),
        ("a\nb", r'"a\nb"'),
        ("a\u2028b", r'"a\u2028b"'),
        (" blanks ", '" blanks "'),
        ('"quoted"', r'"\"quoted\""'),
        ("", '""'),
    ],
)
def test_names_are_quoted_where_they_have_to_be(manifest: Manifest, name: str, written: str) -> None:
    named = msgspec.structs.replace(manifest, model=msgspec.structs.replace(manifest.model, name=name))
    assert settings_of(named).endswith(f", Model: {written}, RNG: CPU")


def test_what_else_changes_the_picture(manifest: Manifest) -> None:
    changed = msgspec.structs.replace(
        manifest, scheduler={"rescale_betas_zero_snr": True}, checkpoint_sha256="fedcba9876543210" * 4
    )
    assert settings_of(changed).endswith(
        ", Model hash: fedcba9876, Model: fake, RNG: CPU, Noise Schedule: Zero Terminal SNR"
    )
    request = request_from_fields({"prompt": "a"}, MODEL, Limits.for_model(MODEL))
    assert ", RNG: CPU, Pad conds: True, Engine: " in infotext(request, manifest, 1, padded=True)


def test_the_loras_in_the_weights(manifest: Manifest) -> None:
    loras = (
        FusedLora("style", float(np.float32(0.8)), "ab" * 32, "12" * 32),
        FusedLora('de"tail, fine: v2', -1.0, "cd" * 32, "34" * 32),
    )
    named = msgspec.structs.replace(manifest, loras=loras)
    assert settings_of(named).endswith(
        r', RNG: CPU, Fused LoRAs: "style: 0.8, de\"tail, fine: v2: -1", '
        r'Lora hashes: "style: 121212121212, de\"tail fine v2: 343434343434"'
    )
    # A bundle of an earlier version.
    named = msgspec.structs.replace(manifest, loras=(FusedLora("style", 1.0, "ab" * 32),))
    assert settings_of(named).endswith(', RNG: CPU, Fused LoRAs: "style: 1"')


def test_prompts_are_repeated_where_lines_do_not_carry_them(manifest: Manifest) -> None:
    def end(prompt: str, negative_prompt: str = "") -> str:
        fields = {"prompt": prompt, "negative_prompt": negative_prompt}
        request = request_from_fields(fields, MODEL, Limits.for_model(MODEL))
        return infotext(request, manifest, 1).split(f"Version: diffuserve {__version__}")[-1]

    assert end("a\n\nSteps: 20, Sampler: Euler, CFG scale: 1\rb", 'a "dog"\n') == ""
    assert end("a ") == ', Prompt: "a ", Negative prompt: ""'
    assert end("a", ' "b", c:d ') == r', Prompt: "a", Negative prompt: " \u0022b\u0022\u002c c\u003ad "'
    assert end("Negative prompt: a", "b") == r', Prompt: "Negative prompt\u003a a", Negative prompt: "b"'
    assert end(" " * 7000) != ""
    assert end(" " * 7999) == ""
