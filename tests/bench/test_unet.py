from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from diffuserve.bundle.manifest import read_manifest
from diffuserve.engines import processor
from diffuserve.engines.example_inputs import example_inputs
from diffuserve.errors import BundleError
from diffuserve.tensors import UNET
from diffuserve_bench import arithmetic
from diffuserve_bench.arithmetic import flops_of_onnx
from diffuserve_bench.bench_command import command
from diffuserve_bench.unet import measure_unet
from tests.conftest import CHECKPOINT
from tests.core.tiny_graphs import make_real_bundle


def test_operations_are_counted_for_the_shapes_of_the_call(tmp_path: Path) -> None:
    text = """all (float[B, 4, h, w] x, float[B, r, c] y) => (float[B, 8, p, q] out, float[B, r, 5] product, float[s, 7] gemm) {
        out = Conv <group = 2, kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x, filters)
        product = MatMul (y, matrix)
        flat = Reshape (y, shape)
        gemm = Gemm <transB = 1> (flat, other)
    }"""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {text}')
    for name, shape in (("filters", (8, 2, 3, 3)), ("matrix", (3, 5)), ("other", (7, 3))):
        model.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 3]), "shape"))
    onnx.save(model, tmp_path / "model.onnx")
    inputs = {"x": np.ones((2, 4, 6, 8), np.float32), "y": np.ones((2, 10, 3), np.float32)}
    convolution = 2 * 8 * (3 * 4) * (2 * 3 * 3)
    products = 2 * 10 * 3 * 5 + 20 * 3 * 7
    assert flops_of_onnx(tmp_path / "model.onnx", inputs) == 2 * (convolution + products)


def test_the_bundled_unet_has_the_operations_that_pytorch_counts(bundle: Path, reference_pipeline: Any) -> None:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    manifest = read_manifest(bundle)
    inputs = example_inputs(manifest.components[UNET].tensors, manifest.model, 2)
    sample, timestep, hidden = (torch.from_numpy(array) for array in inputs.values())
    # The counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.inference_mode():
        reference_pipeline.unet(sample, timestep.squeeze(1), hidden)
    assert flops_of_onnx(bundle / UNET / "model.onnx", inputs) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_each_way_is_measured_or_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "none")
    monkeypatch.setattr(arithmetic, "_SIDE", 128)  # a machine's peak takes seconds
    make_real_bundle(tmp_path / "bundle")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "bundle").rglob("*")}
    arguments = [
        "unet",
        str(tmp_path / "bundle"),
        "--output",
        str(tmp_path / "results"),
        "--rounds",
        "2",
        "--size",
        "64x96",
    ]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "bundle").rglob("*")} == before
    written = json.loads((tmp_path / "results" / "unet.json").read_text())
    found = {(way["engine"], way["precision"], way["shapes"]): way for way in written["ways"]}
    assert list(found) == [("onnxruntime", "fp32", "any"), ("openvino", "fp32", "any"), ("openvino", "fp32", "fixed")]
    assert set(written["cannot_run_here"]) == {"openvino bf16", "openvino bf16, fixed shapes"}
    assert "openvino bf16 cannot run here: this processor" in result.output
    # One convolution of 3 x 3 from 4 channels to 4, on 2 rows of 12 x 8 latents.
    assert written["flops"] == 2 * (2 * 4 * 12 * 8) * (4 * 3 * 3)
    for way in found.values():
        assert len(way["call_s"]) == len(way["reference_s"]) == 2
        assert way["ratio"] == pytest.approx(np.median(way["call_s"]) / np.median(way["reference_s"]))
        assert way["flops_per_s"] == pytest.approx(written["flops"] / np.median(way["call_s"]))
        assert way["of_peak"] == pytest.approx(way["flops_per_s"] / written["matrix_product_flops_per_s"]["fp32"])
        assert any("Conv" in operator for operator in way["operator_s"])
    assert "openvino fp32, fixed shapes: where the time goes" in result.output


def test_a_size_that_does_not_fit(tmp_path: Path) -> None:
    make_real_bundle(tmp_path)
    with pytest.raises(BundleError, match=r"size 60x64 does not fit fake: both must be multiples of 16 pixels"):
        measure_unet(tmp_path, checkpoint=None, size=(60, 64), rows=1, rounds=1)
    result = CliRunner().invoke(command, ["unet", str(tmp_path), "--size", "64"])
    assert result.exit_code == 2
    assert "it must be width and height in pixels, such as 512x512" in result.output


@pytest.mark.slow
def test_pytorch_is_measured_with_a_checkpoint(bundle: Path) -> None:
    report = measure_unet(bundle, checkpoint=CHECKPOINT, size=(64, 64), rows=1, rounds=1)
    (pytorch,) = (way for way in report.measured["ways"] if (way["engine"], way["precision"]) == ("pytorch", "fp32"))
    assert pytorch["ratio"] > 0
    assert any("conv" in operator for operator in pytorch["operator_s"])
