"""Plans as they are loaded, on a library and a card that are none."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from diffuserve.bundle.manifest import Component, Manifest
from diffuserve.engines.tensorrt import Plan
from diffuserve.engines.tensorrt_library import LIBRARIES, TENSORRT, TENSORRT_RTX, Library
from diffuserve.engines.tensorrt_profiles import profiles
from diffuserve.errors import BundleError
from diffuserve.limits import Limits
from diffuserve.tensors import UNET
from tests.core.fake_tensorrt import fake_tensorrt
from tests.core.fakes import MODEL, make_bundle

STREAM = 7

all_libraries = pytest.mark.parametrize("library", LIBRARIES.values(), ids=lambda library: library.engine)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_bundle(tmp_path)


@pytest.fixture
def component(manifest: Manifest, library: Library) -> Component:
    return msgspec.structs.replace(manifest.components[UNET], engine=library.engine)


@pytest.fixture
def ranges(component: Component) -> list[dict[str, Any]]:
    return profiles(component.tensors, MODEL, Limits.for_model(MODEL))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, library: Library) -> Any:
    module = fake_tensorrt(library.module, "4.2", portable=library is TENSORRT_RTX)
    monkeypatch.setitem(sys.modules, library.module, module)
    return module


@pytest.fixture
def path(tmp_path: Path, component: Component, ranges: list[dict[str, Any]], library: Library) -> Path:
    specs = (*component.tensors.inputs, *component.tensors.outputs)
    shapes = [{name: (each.min, each.opt, each.max) for name, each in profile.items()} for profile in ranges]
    file = tmp_path / UNET / f"model.fp16.32x128x3.sm89.{library.tag}4.2.plan"
    file.write_text(json.dumps({"tensors": [spec.name for spec in specs], "profiles": shapes}))
    return file


@all_libraries
def test_a_plans_profiles_are_its_own(
    library: Library, fake: Any, path: Path, component: Component, ranges: list[dict[str, Any]]
) -> None:
    assert Plan(library, path, component, STREAM).profiles == ranges


@all_libraries
def test_what_cannot_be_loaded_says_why(library: Library, fake: Any, path: Path, component: Component) -> None:
    fake.refuses = "plan"
    with pytest.raises(BundleError, match=rf"{library.title} cannot load .*plan: the plan is damaged"):
        Plan(library, path, component, STREAM)
    fake.refuses = ""
    plan = Plan(library, path, component, STREAM)
    with pytest.raises(BundleError, match=rf"{library.title} cannot load .*plan: it does not say why"):
        plan.make_context(-1)
    path.write_text('{"tensors": ["abacus"], "profiles": []}')
    with pytest.raises(BundleError, match=rf"has the tensors \['abacus'\]; expected: .*--select {library.engine}"):
        Plan(library, path, component, STREAM)


@pytest.mark.parametrize("library", [TENSORRT])
def test_tensorrts_contexts_get_no_memory(fake: Any, path: Path, component: Component, library: Library) -> None:
    plan = Plan(library, path, component, STREAM)
    plan.make_context(0)
    plan.keep_kernels()
    assert fake.engines[-1].contexts == [fake.ExecutionContextAllocationStrategy.USER_MANAGED]
    assert not [entry for entry in path.parent.iterdir() if entry.is_dir()]


def load(path: Path, component: Component) -> Plan:
    """As the engine does it."""
    plan = Plan(TENSORRT_RTX, path, component, STREAM)
    for number in range(len(plan.profiles)):
        plan.make_context(number)
    plan.keep_kernels()
    return plan


def kept(path: Path) -> list[Any]:
    """The card that kernels were compiled on, and how many."""
    (entry,) = (each for each in path.parent.iterdir() if each.is_dir())
    content: list[Any] = json.loads((entry / "kernels").read_bytes())
    return content


@pytest.mark.parametrize("library", [TENSORRT_RTX])
def test_rtxs_kernels_are_compiled_once(
    fake: Any, path: Path, component: Component, library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    load(path, component)
    engine = fake.engines[-1]
    (settings,) = set(engine.contexts)
    assert len(engine.contexts) == engine.num_optimization_profiles
    assert settings.strategy == fake.ExecutionContextAllocationStrategy.USER_MANAGED
    assert settings.cuda_graph_strategy == fake.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    first = kept(path)
    assert first == ["RTX 4090", engine.num_optimization_profiles]
    load(path, component)
    # Those that were read come first; the fake compiles as many again, which are not written at every start.
    (settings,) = set(fake.engines[-1].contexts)
    assert json.loads(settings.cache.serialize()) == ["RTX 4090", 2 * engine.num_optimization_profiles]
    assert kept(path) == first
    assert not caplog.records
    fake.card = "RTX 5090"
    with caplog.at_level(logging.WARNING):
        load(path, component)
    assert "another card, driver or version" in caplog.text
    assert kept(path) == ["RTX 5090", engine.num_optimization_profiles]
