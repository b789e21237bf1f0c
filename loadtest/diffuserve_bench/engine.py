"""What a call of each engine costs by its batch size, and whether padding batches to a few sizes would pay."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from numpy.typing import NDArray

from diffuserve.bundle.manifest import MANIFEST_NAME, read_manifest, write_manifest
from diffuserve.engines import load_engine
from diffuserve.engines.example_inputs import example_inputs
from diffuserve.stages import Engine
from diffuserve.tensors import UNET
from diffuserve_loadtest.report.report import Plot, Report, Table
from diffuserve_loadtest.stage_seconds import StageSeconds, call_seconds, measure_stages, random_sizes

PADDED_TO = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Padding:
    """Seconds of UNet calls of random sizes; each list belongs to `rows`, element by element.

    `changed_s`: each call differs in size from the one before; `steady_s`: the same size again and again; `padded_s`: the
    next of `PADDED_TO`, again and again, which is what padding would make of it.
    """

    rows: list[int]
    changed_s: list[float]
    steady_s: list[float]
    padded_s: list[float]

    @property
    def pays(self) -> bool:
        return sum(self.padded_s) < sum(self.changed_s)


def measure_engine(bundle: Path, *, rounds: int, padding_calls: int, save: bool) -> Report:
    """Times the engines, and writes the UNet's figures into the bundle's manifest if `save` is set."""
    seconds = measure_stages(bundle, rounds=rounds)
    padding = _measure_padding(bundle, padding_calls, rounds)
    remarks = [_padding_remark(padding)]
    if save:
        save_unet_seconds(bundle, seconds.unet)
        remarks.append(f"Saved in {bundle / MANIFEST_NAME}. A repository has it when it is assembled again.")
    return Report(
        "engine",
        {"bundle": str(bundle), "rounds": rounds, "padding_calls": padding_calls},
        {"seconds": seconds.to_json(), "padding": msgspec.to_builtins(padding), "padding_pays": padding.pays},
        _tables(seconds),
        remarks,
        {"gain": _plot(seconds)},
    )


def save_unet_seconds(bundle: Path, unet_seconds: dict[int, float]) -> None:
    """Replaces the manifest's figures."""
    write_manifest(bundle, msgspec.structs.replace(read_manifest(bundle), unet_seconds=unet_seconds))


def _measure_padding(bundle: Path, calls: int, repeats: int) -> Padding:
    manifest = read_manifest(bundle)
    component = manifest.components[UNET]
    engine = load_engine(bundle / component.files[0].path, component, threads=0)
    rows = random_sizes(calls, max(PADDED_TO), seed=0)
    inputs = {size: example_inputs(component.tensors, manifest.model, size) for size in {*rows, *PADDED_TO}}
    steady_s = {size: _steady_s(engine, arrays, repeats) for size, arrays in inputs.items()}
    return Padding(
        rows,
        [call_seconds(engine, inputs[size]) for size in rows],
        [steady_s[size] for size in rows],
        [steady_s[min(padded for padded in PADDED_TO if padded >= size)] for size in rows],
    )


def _steady_s(engine: Engine, inputs: dict[str, NDArray[Any]], repeats: int) -> float:
    engine(inputs)
    return statistics.median(call_seconds(engine, inputs) for _ in range(repeats))


def _padding_remark(padding: Padding) -> str:
    def median_ms(times_s: Sequence[float]) -> str:
        return f"{1000 * statistics.median(times_s):.1f} ms"

    verdict = "padding pays" if padding.pays else "padding does not pay"
    return (
        f"A call of another size than the one before, median: {median_ms(padding.changed_s)}; the same sizes in steady "
        f"state: {median_ms(padding.steady_s)}; padded to one of {', '.join(map(str, PADDED_TO))}: "
        f"{median_ms(padding.padded_s)}; so {verdict}."
    )


def _plot(seconds: StageSeconds) -> Plot:
    named = {"UNet": seconds.unet, "text encoder": seconds.text_encoder, "VAE decoder": seconds.vae_decoder}
    lines = {
        name: [(size, size / call_s * costs[1]) for size, call_s in costs.items()] for name, costs in named.items()
    }
    return Plot(lines, "rows of a call", "rows per second, against calls of one row")


def _tables(seconds: StageSeconds) -> list[Table]:
    named = (("UNet", "rows", seconds.unet), ("Text encoder", "texts", seconds.text_encoder))
    return [
        Table(
            name,
            (unit, "ms", f"{unit}/s", "against 1"),
            [
                (str(size), f"{1000 * call_s:.1f}", f"{size / call_s:.1f}", f"{size / call_s * costs[1]:.2f}")
                for size, call_s in costs.items()
            ],
        )
        for name, unit, costs in (*named, ("VAE decoder", "images", seconds.vae_decoder))
    ]
