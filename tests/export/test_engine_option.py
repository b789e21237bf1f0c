"""`export --engine`: the same choice as `diffuserve engines`, on a bundle that has just been written or is up to date."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from diffuserve.bundle.manifest import read_manifest
from diffuserve.engines.example_inputs import example_inputs
from diffuserve.engines.onnxruntime import OnnxRuntimeEngine
from diffuserve.errors import BundleError
from diffuserve.graphs.sixteen_bit import PRECISIONS, sixteen_bit_from_onnx
from diffuserve.tensors import STAGES
from diffuserve.trials.tolerance import tolerance_of
from diffuserve_export.export_command import command
from tests.graphs import run_rounded


def test_an_unknown_engine_is_refused_before_anything_is_exported(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="There is no engine abacus"):
        CliRunner().invoke(
            command, ["no-checkpoint", "--output", str(tmp_path / "out"), "--engine", "abacus"], catch_exceptions=False
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_exported_graphs_in_16_bits(bundle: Path, tmp_path: Path, stage: str, precision: str) -> None:
    manifest = read_manifest(bundle)
    component, path = manifest.components[stage], bundle / stage / "model.onnx"
    narrow = tmp_path / "narrow.onnx"
    sixteen_bit_from_onnx(path, narrow, precision)
    inputs = example_inputs(component.tensors, manifest.model, 2, {})
    expected = OnnxRuntimeEngine(path)(inputs)
    exact = next(iter(expected.values()))
    actual = run_rounded(narrow, inputs) if precision == "bf16" else [*OnnxRuntimeEngine(narrow)(inputs).values()]
    error = np.abs(actual[0].astype(np.float64) - exact).max()
    print(f"{stage} in {precision}: {error:.3g} of {tolerance_of(component.tensors, precision, expected):.3g}")
    assert 0 < error <= tolerance_of(component.tensors, precision, expected)


def test_a_bundle_that_is_up_to_date_changes_its_engine_only(
    tiny_bundle: Path, shared_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    arguments = [str(shared_checkpoint), "--output", str(bundle)]
    result = CliRunner().invoke(command, [*arguments, "--engine", "openvino"], catch_exceptions=False)
    assert "is up to date" in result.output
    assert "unet runs on openvino in fp32" in result.output
    selected = read_manifest(bundle)
    assert {component.engine for component in selected.components.values()} == {"openvino"}
    assert {trial.component for trial in selected.trials} == set(STAGES)
    assert selected.bundle_sha256 == read_manifest(tiny_bundle).bundle_sha256
    CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert read_manifest(bundle) == selected  # an export without --engine keeps it
