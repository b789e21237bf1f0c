"""Configurations for the backends of NVIDIA's container. No server here can load them; Triton's own parser reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from diffuserve.bundle.checksums import describe_file
from diffuserve.bundle.manifest import Manifest, read_manifest, write_manifest
from diffuserve.engines.example_inputs import native_sizes
from diffuserve.engines.tensorrt_profiles import profiles_of
from diffuserve.errors import BundleError
from diffuserve.serving_options import Serving
from diffuserve.tensors import SAFETY_CHECKER, STABLE_DIFFUSION, TEXT_ENCODER, UNET, VAE_DECODER, VAE_ENCODER
from diffuserve.triton.placement import read_placement
from diffuserve_export.repository.assemble import repository_from_bundle
from diffuserve_export.repository.assemble_command import command
from diffuserve_export.repository.triton_backends import BACKENDS
from tests.core.fakes import make_bundle
from tests.core.tiny_graphs import STAGES


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    make_bundle(tmp_path / "bundle", safety_checker=True)
    return tmp_path / "bundle"


def with_precision(bundle: Path, engine: str, precision: str) -> Manifest:
    manifest = read_manifest(bundle)
    components = {
        name: msgspec.structs.replace(component, engine=engine, precision=precision)
        for name, component in manifest.components.items()
    }
    manifest = msgspec.structs.replace(manifest, components=components)
    write_manifest(bundle, manifest)
    return manifest


def with_plans(bundle: Path) -> None:
    """Components as a selection of TensorRT leaves them, but for the plans' content."""
    manifest = with_precision(bundle, "tensorrt", "fp16")
    components = {}
    for name, component in manifest.components.items():
        plan = bundle / name / "model.fp16.32x128x3.sm90.trt11.4.1.plan"
        plan.write_bytes(b"no real plan")
        components[name] = msgspec.structs.replace(component, files=(describe_file(bundle, plan), *component.files))
    write_manifest(bundle, msgspec.structs.replace(manifest, components=components))


def parse(repository: Path) -> dict[str, Any]:
    return {
        folder.name: text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())
        for folder in repository.iterdir()
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_repository(bundle: Path, tmp_path: Path, backend: str) -> None:
    if backend == "tensorrt":
        with_plans(bundle)
    manifest = repository_from_bundle(
        bundle, tmp_path / "repository", serving=Serving(unet_instances=2), backend=backend
    )
    configs = parse(tmp_path / "repository")
    assert set(configs) == {*STAGES, STABLE_DIFFUSION}
    assert configs[STABLE_DIFFUSION].backend == "python"
    for stage in STAGES:
        config, folder = configs[stage], tmp_path / "repository" / stage / "1"
        assert config.backend == backend
        assert (folder / "model.py").exists() == (backend == "python")
        assert read_placement(folder).component == manifest.components[stage]
        inputs = [(tensor.name, list(tensor.dims)) for tensor in config.input]
        assert inputs == [(spec.name, list(spec.triton_dims)) for spec in manifest.components[stage].tensors.inputs]
        if backend != "python":
            assert (folder / config.default_model_filename).is_file()
            assert "threads" not in config.parameters  # the Python backend's own


def test_onnxruntime_has_an_instance_on_each_gpu(bundle: Path, tmp_path: Path) -> None:
    repository_from_bundle(bundle, tmp_path / "repository", serving=Serving(unet_instances=3), backend="onnxruntime")
    for name, config in parse(tmp_path / "repository").items():
        [group] = config.instance_group
        if name == STABLE_DIFFUSION:
            assert (group.kind, group.count) == (ModelInstanceGroup.KIND_CPU, 1)
        else:
            assert (group.kind, group.count) == (ModelInstanceGroup.KIND_GPU, 1)
            assert list(group.gpus) == ([0, 1, 2] if name == UNET else [0])


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", "0"), ("fp16", "1")])
def test_onnxruntime_computes_as_in_this_process(bundle: Path, tmp_path: Path, precision: str, tf32: str) -> None:
    with_precision(bundle, "onnxruntime-cuda", precision)
    repository_from_bundle(bundle, tmp_path / "repository", backend="onnxruntime")
    configs = parse(tmp_path / "repository")
    for stage in STAGES:
        (accelerator,) = configs[stage].optimization.execution_accelerators.gpu_execution_accelerator
        assert accelerator.name == "cuda"
        assert dict(accelerator.parameters) == {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": tf32}


def test_tensorrt_has_a_cuda_graph_for_each_small_batch(bundle: Path, tmp_path: Path) -> None:
    with_plans(bundle)
    manifest = repository_from_bundle(
        bundle, tmp_path / "repository", serving=Serving(unet_instances=2), backend="tensorrt"
    )
    for stage, config in parse(tmp_path / "repository").items():
        if stage == STABLE_DIFFUSION:
            continue
        [group] = config.instance_group
        assert (group.kind, list(group.gpus)) == (ModelInstanceGroup.KIND_GPU, [0, 1] if stage == UNET else [0])
        assert config.default_model_filename == "model.fp16.32x128x3.sm90.trt11.4.1.plan"
        ranges = profiles_of(manifest.components[stage], manifest.model)
        assert list(group.profile) == [str(number) for number in range(len(ranges))]
        assert config.optimization.cuda.graphs
        specs = config.optimization.cuda.graph_spec
        assert [spec.batch_size for spec in specs] == list(range(1, 9))
        for spec in specs:
            assert spec.batch_size <= config.max_batch_size
            shapes = {name: tuple(shape.dim) for name, shape in spec.input.items()}
            assert shapes == {
                tensor.name: tensor.shape(1, native_sizes(manifest.model))[1:]
                for tensor in manifest.components[stage].tensors.inputs
            }
        # Where a profile allows fewer rows than Triton's batches may have, Triton makes none.
        has_few = any(each.max[0] < config.max_batch_size for each in ranges[-1].values())
        assert config.HasField("dynamic_batching") != has_few == (stage in (UNET, VAE_DECODER, VAE_ENCODER))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_openvino_runs_on_the_cpu_in_the_components_precision(bundle: Path, tmp_path: Path, precision: str) -> None:
    with_precision(bundle, "openvino", precision)
    repository_from_bundle(bundle, tmp_path / "repository", serving=Serving(unet_instances=2), backend="openvino")
    configs = parse(tmp_path / "repository")
    for stage in STAGES:
        [group] = configs[stage].instance_group
        assert (group.kind, group.count) == (ModelInstanceGroup.KIND_CPU, 2 if stage == UNET else 1)
        assert ("HINT_BF16" in configs[stage].parameters) == (precision == "bf16")
        assert configs[stage].parameters["SKIP_OV_DYNAMIC_BATCHSIZE"].string_value == "YES"


def test_warm_up_calls_have_the_native_size(bundle: Path, tmp_path: Path) -> None:
    repository_from_bundle(bundle, tmp_path / "repository", backend="onnxruntime")
    configs = parse(tmp_path / "repository")
    expected = {
        TEXT_ENCODER: {"input_ids": [12]},
        UNET: {"sample": [4, 6, 8], "timestep": [1], "encoder_hidden_states": [12, 5]},
        VAE_DECODER: {"latent_sample": [4, 6, 8]},
        VAE_ENCODER: {"image": [48, 64, 3]},
        SAFETY_CHECKER: {"clip_input": [3, 16, 16]},
    }
    for stage, dims in expected.items():
        config = configs[stage]
        assert [warmup.batch_size for warmup in config.model_warmup] == [1, 2]
        dtypes = {tensor.name: tensor.data_type for tensor in config.input}
        for warmup in config.model_warmup:
            assert {name: list(example.dims) for name, example in warmup.inputs.items()} == dims
            assert {name: example.data_type for name, example in warmup.inputs.items()} == dtypes


def test_changing_the_backend_leaves_nothing_of_the_other(bundle: Path, tmp_path: Path) -> None:
    fresh, changed = tmp_path / "fresh", tmp_path / "changed"
    repository_from_bundle(bundle, fresh)
    for backend in ("python", "onnxruntime", "python"):
        repository_from_bundle(bundle, changed, backend=backend)

    def files(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert files(changed) == files(fresh)


def test_an_engine_that_the_backend_does_not_run_is_refused(bundle: Path, tmp_path: Path) -> None:
    with_precision(bundle, "abacus", "fp32")
    with pytest.raises(
        BundleError, match="runs on abacus, and Triton's backend onnxruntime runs onnxruntime and onnxruntime-cuda and"
    ):
        repository_from_bundle(bundle, tmp_path / "repository", backend="onnxruntime")
    assert not (tmp_path / "repository").exists()


def test_the_option(bundle: Path, tmp_path: Path) -> None:
    arguments = [str(bundle), "--output", str(tmp_path / "repository"), "--backend", "openvino"]
    assert CliRunner().invoke(command, arguments, catch_exceptions=False).exit_code == 0
    assert parse(tmp_path / "repository")[UNET].backend == "openvino"
