"""Plans built by TensorRT for RTX, which needs no GPU for it: of the bundled model and of a small one of each family.

`make test-tensorrt` runs this in a virtual environment of its own, in which nothing is installed but what the extra
tensorrt-rtx says. Loading a plan takes a GPU, so what a plan has is read off the network that it is built of. Seconds and
sizes are printed, for docs/engines.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import onnx.parser
import pytest

from diffuserve.bundle.checksums import verify
from diffuserve.bundle.manifest import Component, Manifest
from diffuserve.engines.gpu import gpu_architectures
from diffuserve.engines.tensorrt import Plan
from diffuserve.engines.tensorrt_builder import serialized_plan
from diffuserve.engines.tensorrt_library import TENSORRT_RTX
from diffuserve.engines.tensorrt_profiles import ShapeRange, profiles
from diffuserve.errors import BundleError
from diffuserve.limits import Limits
from diffuserve.tensors import TEXT_ENCODER, TensorSpec
from diffuserve.trials.ahead import build_ahead

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "model_store" / "bundles" / "tiny-emoji"
FAMILIES = ("sd1", "sd2", "sdxl")
# What NVIDIA's plans are for by default.
ARCHITECTURES = ("sm86", "sm89", "sm120")
MIB = 1 << 20

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="make test-tensorrt installs it")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of bundles by family, exported in the virtual environment that has PyTorch."""
    folder = tmp_path_factory.mktemp("bundles")
    exporter = [ROOT / ".venv" / "bin" / "python", "-m", "tests.tensorrt.small_bundles", folder]
    # PyTorch's compiler makes a folder when it is imported.
    subprocess.run(
        exporter, cwd=ROOT, check=True, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    )
    return folder


@pytest.fixture(scope="module")
def heading() -> None:
    print("\n| bundle | component | precision | graph, MiB | plan, MiB | seconds |\n|---|---|---|---|---|---|")


@pytest.fixture(params=["tiny-emoji", *FAMILIES])
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy."""
    name: str = request.param
    source = BUNDLED if name == "tiny-emoji" else request.getfixturevalue("bundles") / name
    return Path(shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("*.onnxruntime")))


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_every_plan_of(bundle: Path, precision: str, rtx: Any, heading: None) -> None:
    """In fp16 a component that overflows in it gets the next precision, as without `--precision`."""
    started: list[float] = []
    built = build_ahead(
        bundle,
        TENSORRT_RTX.engine,
        ARCHITECTURES,
        None if precision == "fp16" else precision,
        progress=lambda name: started.append(time.monotonic()),
    )
    started.append(time.monotonic())
    verify(bundle, built)
    for at, (stage, component) in enumerate(built.components.items()):
        assert component.precision == ("bf16" if component.overflows_in_fp16 and precision == "fp16" else precision)
        plan, graph = (bundle / file.path for file in component.files[:2])
        assert plan.name.endswith(f".sm86-sm89-sm120.rtx{rtx.__version__}.plan")
        # The weights are in it once, in the plan's precision.
        assert plan.stat().st_size > 0.9 * graph.stat().st_size
        check_network(rtx, graph, component, built)
        sizes = f"{graph.stat().st_size / MIB:.1f} | {plan.stat().st_size / MIB:.1f}"
        print(f"| {bundle.name} | {stage} | {component.precision} | {sizes} | {started[at + 1] - started[at]:.1f} |")
    if not gpu_architectures():
        plan = bundle / built.components[TEXT_ENCODER].files[0].path
        with pytest.raises(BundleError, match=r"TensorRT for RTX cannot load .*plan: .*CUDA driver"):
            Plan(TENSORRT_RTX, plan, built.components[TEXT_ENCODER], stream=0)


def check_network(rtx: Any, graph: Path, component: Component, manifest: Manifest) -> None:
    """The names, types and shapes of inputs and outputs, and every profile's shapes."""
    logger = rtx.Logger(rtx.Logger.ERROR)
    builder = rtx.Builder(logger)
    network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = rtx.OnnxParser(network, logger)
    assert parser.parse_from_file(str(graph))
    config = builder.create_builder_config()
    dtypes = {"FP32": rtx.float32, "INT32": rtx.int32, "UINT8": rtx.uint8, "BOOL": rtx.bool}

    def check(tensor: Any, spec: TensorSpec) -> None:
        assert (tensor.name, tensor.dtype) == (spec.name, dtypes[spec.dtype])
        assert list(tensor.shape) == [-1, *(dim if isinstance(dim, int) else -1 for dim in spec.dims)]

    tensors = component.tensors
    assert (network.num_inputs, network.num_outputs) == (len(tensors.inputs), len(tensors.outputs))
    for at, spec in enumerate(tensors.inputs):
        check(network.get_input(at), spec)
    for at, spec in enumerate(tensors.outputs):
        check(network.get_output(at), spec)
    for at, ranges in enumerate(profiles(tensors, manifest.model, Limits.for_model(manifest.model))):
        profile = builder.create_optimization_profile()
        for name, shapes in ranges.items():
            profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
            assert [tuple(shape) for shape in profile.get_shape(name)] == [shapes.min, shapes.opt, shapes.max]
        assert config.add_optimization_profile(profile) == at
    assert builder.is_network_supported(network, config)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def write(graph: Path, body: str, *, shape: str = "B, 4", operators: str = "") -> None:
    """A graph of x and y, which is `body`."""
    declared = f'<ir_version: 10, opset_import: ["": 20{operators}]>'
    onnx.save(onnx.parser.parse_model(f"{declared} g (float[{shape}] x) => (float[{shape}] y) {{ {body} }}"), graph)


def ranges(*rows: int, width: int = 4) -> list[dict[str, ShapeRange]]:
    least, best, most = ((each, width) for each in rows)
    return [{"x": ShapeRange(least, best, most)}]


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("architecture", TENSORRT_RTX.architectures)
def test_every_architecture(graph: Path, architecture: str) -> None:
    write(graph, "y = Neg (x)")
    assert bytes(serialized_plan(TENSORRT_RTX, graph, ranges(1, 2, 8), [architecture]))


def test_the_architectures_are_the_librarys(rtx: Any) -> None:
    assert {name.lower() for name in rtx.ComputeCapability.__members__} - {"none", "current"} == {
        *TENSORRT_RTX.architectures
    }
    assert TENSORRT_RTX.version() == f"rtx{rtx.__version__}"


@pytest.mark.usefixtures("rtx")
def test_an_operator_that_it_does_not_have(graph: Path) -> None:
    write(graph, "y = abacus.Reckon (x)", operators=', "abacus": 1')
    with pytest.raises(BundleError, match=r"TensorRT for RTX cannot read .*model\.onnx: .*Reckon"):
        serialized_plan(TENSORRT_RTX, graph, ranges(1, 2, 8), ["sm89"])


@pytest.mark.usefixtures("rtx")
def test_a_file_that_is_no_graph(graph: Path) -> None:
    graph.write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"TensorRT for RTX cannot read .*model\.onnx: ."):
        serialized_plan(TENSORRT_RTX, graph, ranges(1, 2, 8), ["sm89"])


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(
    ("profile", "shape"),
    [
        pytest.param(ranges(8, 2, 1), "B, 4", id="least above most"),
        pytest.param(ranges(1, 2, 8, width=5), "B, 4", id="another width"),
        pytest.param(ranges(1, 2, 8), "2, 4", id="fixed rows"),
        pytest.param(ranges(1, 2, 8), "B, 4, 4", id="another rank"),
        pytest.param([{"z": ShapeRange((1, 4), (2, 4), (8, 4))}], "B, 4", id="another name"),
        pytest.param([], "B, 4", id="none"),
    ],
)
def test_shapes_that_the_graph_does_not_have(graph: Path, profile: list[dict[str, ShapeRange]], shape: str) -> None:
    write(graph, "y = Neg (x)", shape=shape)
    with pytest.raises(BundleError, match=r"TensorRT for RTX (refuses the shapes|cannot build) .*model\.onnx: ."):
        serialized_plan(TENSORRT_RTX, graph, profile, ["sm89"])


@pytest.mark.usefixtures("rtx")
def test_turing_has_no_bf16(graph: Path) -> None:
    write(graph, "n = Cast <to = 16> (x) m = Neg (n) y = Cast <to = 1> (m)")
    with pytest.raises(BundleError, match=r"TensorRT for RTX cannot build .*model\.onnx: .*sm75"):
        serialized_plan(TENSORRT_RTX, graph, ranges(1, 2, 8), ["sm75"])
    assert serialized_plan(TENSORRT_RTX, graph, ranges(1, 2, 8), ["sm80"])
