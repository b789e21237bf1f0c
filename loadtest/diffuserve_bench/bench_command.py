"""`diffuserve bench`: a table on the terminal, JSON and plots on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from diffuserve.batching.policies import POLICIES
from diffuserve.defaults import BENCH_RESULTS, REPOSITORY, TINY_ARCHIVE, TINY_BUNDLE, TINY_CHECKPOINT

if TYPE_CHECKING:
    from collections.abc import Callable

_PATH = click.Path(path_type=Path)
_bundle = click.option("--bundle", type=_PATH, default=TINY_BUNDLE, show_default=True)
_repository = click.option("--repository", type=_PATH, default=REPOSITORY, show_default=True)
_output = click.option("--output", type=_PATH, default=BENCH_RESULTS, show_default=True, help="Folder for the results.")
_policies = click.option(
    "--policies",
    default=",".join(POLICIES),
    show_default=True,
    callback=lambda context, option, value: _known_policies(value),
    help="Of in-flight batching, with commas between.",
)


def _count(name: str, default: int, text: str, least: int = 1) -> Callable[[click.decorators.FC], click.decorators.FC]:
    return click.option(name, type=click.IntRange(least), default=default, show_default=True, help=text)


def _known_policies(value: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    unknown = [name for name in names if name not in POLICIES]
    if unknown or not names:
        raise click.BadParameter(f"{value!r}; it must name some of {', '.join(POLICIES)}.")
    return names


def _loads(default: str, text: str) -> Callable[[click.decorators.FC], click.decorators.FC]:
    return click.option(
        "--loads",
        default=default,
        show_default=True,
        callback=lambda context, option, value: _numbers(value),
        help=text,
    )


def _numbers(value: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in value.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) <= 0:
        raise click.BadParameter(f"{value!r}; it must be positive numbers with commas between, such as 0.5,0.8.")
    return numbers


def _size(value: str) -> tuple[int, int]:
    width, _, height = value.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise click.BadParameter(f"{value!r}; it must be width and height in pixels, such as 512x512.")
    return int(width), int(height)


@click.group("bench", short_help="Measure, two things against each other in one run.")
def command() -> None:
    """Benchmarks. Each compares two things in one run and says on what machine."""


@command.command("overhead")
@_bundle
@_repository
@_output
@_count("--steps", 20, "Denoising steps.")
@click.option("--guidance-scale", type=click.FloatRange(0), default=5.0, show_default=True)
@_count("--runs", 30, "Of each kind.")
def overhead(bundle: Path, repository: Path, output: Path, steps: int, guidance_scale: float, runs: int) -> None:
    """One request alone: served by Triton, against the same stages in this process."""
    from diffuserve_bench.overhead import measure_overhead
    from diffuserve_loadtest.report.report import publish

    publish(measure_overhead(bundle, repository, steps=steps, guidance_scale=guidance_scale, runs=runs), output)


@command.command("engine")
@click.argument("bundle", type=_PATH, default=TINY_BUNDLE)
@_output
@_count("--rounds", 7, "Times that each batch size is timed.")
@_count("--padding-calls", 60, "Calls of random sizes.", least=2)
@click.option("--save", is_flag=True, help="Write the UNet's figures into the bundle's manifest.")
def engine(bundle: Path, output: Path, rounds: int, padding_calls: int, save: bool) -> None:
    """Seconds of a call by batch size, and whether padding pays."""
    from diffuserve_bench.engine import measure_engine
    from diffuserve_loadtest.report.report import publish

    publish(measure_engine(bundle, rounds=rounds, padding_calls=padding_calls, save=save), output)


@command.command("unet")
@click.argument("bundle", type=_PATH, default=TINY_BUNDLE)
@_output
@click.option("--checkpoint", type=_PATH, help="Folder in diffusers' format: measure PyTorch on its UNet too.")
@click.option(
    "--size",
    metavar="WxH",
    callback=lambda context, option, value: None if value is None else _size(value),
    help="Of the images, in pixels [default: the native one]",
)
@_count("--rows", 2, "Of a call; 2 are a guided image.")
@_count("--rounds", 5, "Timed calls of each engine.")
def unet(
    bundle: Path, output: Path, checkpoint: Path | None, size: tuple[int, int] | None, rows: int, rounds: int
) -> None:
    """One UNet call on each of the CPU's engines, against ONNX Runtime: time, arithmetic, operators."""
    from diffuserve_bench.unet import measure_unet
    from diffuserve_loadtest.report.report import publish

    publish(measure_unet(bundle, checkpoint=checkpoint, size=size, rows=rows, rounds=rounds), output)


@command.command("efficiency")
@_bundle
@_repository
@_output
@_count("--steps", 20, "Denoising steps.")
@click.option("--in-flight", type=click.IntRange(1), help="Requests in flight [default: max_rows]")
@_count("--rounds", 3, "Times that the server, and then the engines, are measured.")
def efficiency(bundle: Path, repository: Path, output: Path, steps: int, in_flight: int | None, rounds: int) -> None:
    """Images a second of a full server, against the best its engines do in this process."""
    from diffuserve_bench.efficiency import measure_efficiency
    from diffuserve_loadtest.report.report import publish

    publish(measure_efficiency(bundle, repository, steps=steps, in_flight=in_flight, rounds=rounds), output)


@command.command("mixed")
@_bundle
@_repository
@_output
@_policies
@_loads("0.5,0.8,0.95", "Arrival rates as shares of what batches of whole requests reach at saturation.")
@_count("--requests", 60, "Of each point.")
@_count("--saturation-requests", 100, "Sent all at once, to measure the saturation.")
def mixed(
    bundle: Path,
    repository: Path,
    output: Path,
    policies: tuple[str, ...],
    loads: tuple[float, ...],
    requests: int,
    saturation_requests: int,
) -> None:
    """A mixture under Poisson arrivals: in-flight batching against whole requests and none."""
    from diffuserve_bench.mixed import measure_mixed
    from diffuserve_loadtest.report.report import publish

    report = measure_mixed(
        bundle,
        repository,
        policies=policies,
        loads=loads,
        requests=requests,
        saturation_requests=saturation_requests,
    )
    publish(report, output)


@command.command("short")
@_bundle
@_repository
@_output
@_count("--requests", 60, "Short ones.")
@_count("--steps", 8, "Of a short one.")
@_count("--long-steps", 50, "Of a long one.")
@click.option("--in-flight", type=click.IntRange(1), help="Long requests in flight [default: max_rows]")
def short(
    bundle: Path, repository: Path, output: Path, requests: int, steps: int, long_steps: int, in_flight: int | None
) -> None:
    """Short requests amid long ones, against the steps they need."""
    from diffuserve_bench.short import measure_short
    from diffuserve_loadtest.report.report import publish

    report = measure_short(
        bundle, repository, requests=requests, steps=steps, long_steps=long_steps, in_flight=in_flight
    )
    publish(report, output)


@command.command("cancel")
@_bundle
@_repository
@_output
@_count("--cancels", 100, "Requests cancelled midway.")
@_count("--requests", 2000, "Short ones, over which memory is watched.")
@click.option("--in-flight", type=click.IntRange(1), help="Requests that fill the server [default: max_rows / 2]")
def cancel(bundle: Path, repository: Path, output: Path, cancels: int, requests: int, in_flight: int | None) -> None:
    """Cancelling under load: rows freed, tasks left, memory."""
    from diffuserve_bench.cancel import measure_cancel
    from diffuserve_loadtest.report.report import publish

    publish(measure_cancel(bundle, repository, cancels=cancels, requests=requests, in_flight=in_flight), output)


@command.command("same")
@_bundle
@_repository
@_output
@_count("--requests", 200, "Random ones.")
@_count("--in-flight", 32, "Requests in a batch.", least=2)
def same(bundle: Path, repository: Path, output: Path, requests: int, in_flight: int) -> None:
    """Images drawn in a batch, against the same drawn alone."""
    from diffuserve_bench.same import measure_same
    from diffuserve_loadtest.report.report import publish

    publish(measure_same(bundle, repository, requests=requests, in_flight=in_flight), output)


@command.command("gpu", add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def gpu(arguments: tuple[str, ...]) -> None:
    """Everything on a GPU, in phases; its own --help says more."""
    from diffuserve_bench.gpu.__main__ import main

    raise SystemExit(main(arguments, "diffuserve bench gpu"))


@command.command("policies")
@click.argument("bundle", type=_PATH, default=TINY_BUNDLE)
@_output
@_policies
@_loads("0.5,0.7,0.8,0.9,1.0,1.1", "Arrival rates as shares of the capacity.")
@_count("--requests", 300, "Of each load and seed.")
@_count("--seeds", 3, "Loads of each rate.")
def policies(
    bundle: Path, output: Path, policies: tuple[str, ...], loads: tuple[float, ...], requests: int, seeds: int
) -> None:
    """Latency under each policy, in virtual time."""
    from diffuserve_bench.policies import measure_policies
    from diffuserve_loadtest.report.report import publish

    publish(measure_policies(bundle, policies=policies, utilisations=loads, requests=requests, seeds=seeds), output)


@command.command("generator")
@_output
@click.option(
    "--rate", "rate_per_s", type=click.FloatRange(1), default=200.0, show_default=True, help="Requests a second."
)
@click.option("--seconds", type=click.FloatRange(1), default=30.0, show_default=True, help="Of each protocol.")
@_count("--workers", 1, "Processes that send.")
def generator(output: Path, rate_per_s: float, seconds: float, workers: int) -> None:
    """The load generator alone, against a stub: what it can send."""
    from diffuserve_bench.generator_alone import measure_generator
    from diffuserve_loadtest.report.report import publish

    publish(measure_generator(rate_per_s=rate_per_s, seconds=seconds, workers=workers), output)


@command.command("torchserve")
@click.option("--archive", type=_PATH, default=TINY_ARCHIVE, show_default=True)
@click.option("--checkpoint", type=_PATH, default=TINY_CHECKPOINT, show_default=True)
@click.option(
    "--handler",
    type=_PATH,
    default=Path("loadtest/peers/torchserve_diffusers/handler.py"),
    show_default=True,
    help="The opponent.",
)
@_repository
@_output
@_count("--steps", 20, "Denoising steps.")
@_count("--in-flight", 8, "Requests at once.")
@_count("--rounds", 5, "Times that each is measured.")
def torchserve(
    archive: Path,
    checkpoint: Path,
    handler: Path,
    repository: Path,
    output: Path,
    steps: int,
    in_flight: int,
    rounds: int,
) -> None:
    """Our handler on TorchServe, against one that calls diffusers for the whole batch."""
    from diffuserve_bench.torchserve import measure_torchserve
    from diffuserve_loadtest.report.report import publish

    report = measure_torchserve(
        archive, checkpoint, handler, repository, steps=steps, in_flight=in_flight, rounds=rounds
    )
    publish(report, output)
