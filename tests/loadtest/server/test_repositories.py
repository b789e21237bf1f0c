from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from diffuserve.errors import BundleError, ConfigurationError
from diffuserve.triton.configuration import read_options
from diffuserve.triton.placement import read_placement
from diffuserve_bench.contenders import REQUEST
from diffuserve_export.repository.assemble import repository_from_bundle
from diffuserve_loadtest.server.repositories import repository_with
from tests.core.fakes import make_bundle


@pytest.fixture
def assembled(tmp_path: Path) -> Path:
    make_bundle(tmp_path / "bundle")
    repository_from_bundle(tmp_path / "bundle", tmp_path / "repository")
    return tmp_path / "repository"


def test_a_copy_differs_in_its_parameters_only(assembled: Path, tmp_path: Path) -> None:
    limits, serving = read_options(assembled)
    copy = repository_with(assembled, tmp_path / "copy", {**REQUEST.parameters, "max_rows": "8"})
    assert read_options(copy) == (replace(limits, max_rows=8), replace(serving, batching="request"))
    assert read_options(assembled) == (limits, serving)
    assert (copy / "stable_diffusion" / "config.pbtxt").read_text().count("max_batch_size: 0") == 1
    for model in assembled.iterdir():
        assert read_placement(copy / model.name / "1") == read_placement(model / "1")
    engine = Path("unet", "1", "model.onnx")
    assert (copy / engine).samefile(assembled / engine)


def test_an_unknown_parameter_is_named(assembled: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no parameter 'bathcing'\. There are: .*, batching, "):
        repository_with(assembled, tmp_path / "copy", {"bathcing": "none"})
    with pytest.raises(ConfigurationError, match="batching is 'nome'; it must be one of inflight, request, none"):
        repository_with(assembled, tmp_path / "copy", {"batching": "nome"})
    assert not (tmp_path / "copy").exists()


def test_no_repository(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="diffuserve assemble"):
        repository_with(tmp_path / "nowhere", tmp_path / "copy", {})
