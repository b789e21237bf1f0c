"""A field of a request is declared once, in diffuserve/request.py: what cannot follow from there by itself says the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_type_hints

import click
import pytest

from diffuserve.request import FIELDS, RequestFields, TextToImageRequest
from diffuserve.wire import REQUEST
from diffuserve_client.generate_command import command
from diffuserve_loadtest.workload.workload import Requests

DOCS = (Path(__file__).parents[1] / "docs" / "http.md").read_text()
PYTHON = {"BYTES": str, "INT64": int, "FP64": float, "BOOL": bool}
JSON = {"BYTES": "text", "INT64": "whole number", "FP64": "number", "BOOL": "true or false"}
PARAMETER = {"BYTES": "string_param", "INT64": "int64_param", "FP64": "double_param", "BOOL": "bool_param"}
SETTINGS = [name for name, field in FIELDS.items() if field.setting]


def test_types_are_those_of_the_kinds() -> None:
    hints = get_type_hints(TextToImageRequest)
    assert {name: hints[name] for name in FIELDS} == {name: PYTHON[field.dtype] for name, field in FIELDS.items()}
    assert list(FIELDS) == [field.name for field in dataclasses.fields(TextToImageRequest)]


def test_callers_have_a_keyword_for_every_setting() -> None:
    expected = {name: PYTHON[FIELDS[name].dtype] | None for name in SETTINGS if name not in ("prompt", "timeout_ms")}
    assert get_type_hints(RequestFields) == {**expected, "timeout_s": float | None}


def test_the_command_line_has_an_option_for_every_setting() -> None:
    options = {parameter.name: parameter for parameter in command.params if isinstance(parameter, click.Option)}
    own = {"prompt", "seed", "num_images", "timeout_ms", "format"}
    assert {"seeds", "num_images", "timeout_s", "format"} <= options.keys()
    for name in set(SETTINGS) - own:
        assert options[name].opts == [f"--{name.replace('_', '-')}"]
        assert (options[name].help or "").startswith(FIELDS[name].help)


def test_workloads_choose_every_setting_but_the_seed() -> None:
    assert {"prompt", "steps", "client_id"} <= set(SETTINGS) - {"seed"} <= set(Requests.__struct_fields__)


@pytest.mark.parametrize("name", REQUEST)
def test_the_documented_field(name: str) -> None:
    field = REQUEST[name]
    grpc = f"tensor {field.dtype} [1]" if field.tensor else PARAMETER[field.dtype]
    assert f"| `{name}` | {JSON[field.dtype]} | {grpc} | {field.help} |" in DOCS.splitlines()
