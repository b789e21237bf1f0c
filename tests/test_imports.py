"""Which package may import which, and what the command line loads."""

from __future__ import annotations

import ast
import json
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from diffuserve import defaults
from diffuserve.cli import _VERBS

ROOT = Path(__file__).parents[1]
# The folder of each package, and which of ours it may import besides itself.
MAY_IMPORT = {
    "diffuserve": ("diffuserve", set()),
    "diffuserve_export": ("export/diffuserve_export", {"diffuserve"}),
    "diffuserve_handlers": ("handlers/diffuserve_handlers", {"diffuserve"}),
    "diffuserve_client": ("client/diffuserve_client", {"diffuserve"}),
    "diffuserve_loadtest": ("loadtest/diffuserve_loadtest", {"diffuserve", "diffuserve_client"}),
    "diffuserve_bench": ("loadtest/diffuserve_bench", {"diffuserve", "diffuserve_client", "diffuserve_loadtest"}),
    "diffuserve_faults": ("loadtest/diffuserve_faults", {"diffuserve", "diffuserve_client", "diffuserve_loadtest"}),
    "diffuserve_peers": ("loadtest/diffuserve_peers", {"diffuserve", "diffuserve_loadtest"}),
    "diffuserve_training": ("training/diffuserve_training", {"diffuserve"}),
    "triton_repo": ("triton_repo", {"diffuserve"}),
}
# The rooms of `diffuserve/`, the lowest first, and which others each imports.
ROOMS = {
    "errors": set(),
    "stats": set(),
    "files": set(),
    "tensors": set(),
    "defaults": set(),
    "cli": {"errors"},
    "graphs": {"errors"},
    "options": {"errors"},
    "samplers": {"errors"},
    "bundle": {"errors", "files", "tensors"},
    "response_tensors": {"tensors"},
    "torch_copies": set(),
    "stages": {"defaults", "errors", "tensors"},
    "limits": {"bundle", "errors", "options", "tensors"},
    "batching": {"errors", "samplers", "stages", "stats", "tensors", "torch_copies"},
    "text": {"bundle", "errors", "stages", "stats", "tensors"},
    "torch_graphs": {"errors", "graphs"},
    "engines": {"bundle", "errors", "files", "graphs", "limits", "stages", "tensors", "torch_copies", "torch_graphs"},
    "limit_argument": {"errors", "limits", "options"},
    "request_fields": {"bundle", "errors", "limits"},
    "serving": {"bundle", "errors", "limits"},
    "serving_options": {"batching", "bundle", "defaults", "limits", "options"},
    "request": {"bundle", "errors", "limits", "request_fields", "samplers"},
    "torchserve": {"bundle", "defaults", "errors", "limits", "serving", "serving_options", "tensors"},
    "conditioning": {"request", "stages", "tensors"},
    "events": {"request"},
    "images": {"bundle", "errors", "limits", "request", "samplers", "stages", "stats", "tensors"},
    "request_warnings": {"bundle", "limits", "request", "text"},
    "wire": {"bundle", "errors", "limits", "request", "request_fields", "tensors"},
    "pipeline": {
        "batching",
        "bundle",
        "conditioning",
        "errors",
        "events",
        "images",
        "limits",
        "request",
        "request_warnings",
        "samplers",
        "serving_options",
        "stages",
        "stats",
        "tensors",
        "text",
    },
    "description": {"bundle", "limits", "request", "request_fields", "wire"},
    "local_pipeline": {"bundle", "engines", "errors", "events", "limits", "pipeline", "request", "serving_options"},
    "trials": {
        "bundle",
        "engines",
        "errors",
        "events",
        "graphs",
        "limit_argument",
        "limits",
        "pipeline",
        "request",
        "stages",
        "tensors",
    },
    "http_answers": {"description", "errors", "events", "request", "response_tensors"},
    "triton": {
        "batching",
        "bundle",
        "defaults",
        "description",
        "engines",
        "errors",
        "events",
        "files",
        "limits",
        "options",
        "pipeline",
        "request",
        "request_fields",
        "response_tensors",
        "serving",
        "serving_options",
        "stages",
        "stats",
        "tensors",
        "wire",
    },
    "serve_command": {"defaults", "serving", "tensors", "torchserve", "triton"},
}
# The rooms of the load test, and which of them each may import; the modules beside them may import all.
LOADTEST_ROOMS = {
    "workload": set(),
    "sending": {"workload"},
    "server": {"sending"},
    "report": {"workload", "sending", "server"},
}
CORE_LIBRARIES = {"numpy", "tokenizers", "msgspec", "click"}
HEAVY = {"torch", "diffusers", "transformers", "onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "locust"}
DEFINE_TORCH_MODULES = [
    Path("export/diffuserve_export/graphs", f"{name}.py")
    for name in ("modules", "text_encoder", "unet", "latents_to_pixels", "pixels_to_latents", "safety_checker")
]
# Loaded by the engine torch alone, when it is.
WITH_TORCH = [
    Path("diffuserve", *parts)
    for parts in (
        ("engines", "torch_program.py"),
        *(
            ("torch_graphs", f"{name}.py")
            for name in ("cuda_graphs", "exporting", "module", "operators", "packages", "weights")
        ),
    )
]
# What Locust loads in its own process; no verb does.
IN_LOCUST = [
    Path("loadtest/diffuserve_loadtest/sending", name) for name in ("distributed.py", "generation.py", "locustfile.py")
]
# Where there is nothing to do without PyTorch; no verb loads them before it is called.
IN_TRAINING = [
    Path("training/diffuserve_training", name)
    for name in (
        "averaging.py",
        "checkpoints.py",
        "compose.py",
        "dataset.py",
        "latents.py",
        "half_range.py",
        "ldm_module.py",
        "lora_module.py",
        "optimisation.py",
        "muon.py",
        "recognition.py",
        "run.py",
        "step_module.py",
        "vae_module.py",
    )
]
NOT_FOR_HELP = HEAVY | {"numpy", "grpc", "tritonclient", "PIL", "tokenizers", "tqdm"}


def _sources(folder: str) -> Iterator[tuple[Path, ast.Module]]:
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    for path in paths:
        yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def _imported(node: ast.AST) -> list[str]:
    """Names of the modules that one statement imports; a relative import gives an empty name."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [(node.module or "") if not node.level else ""]
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
        return [str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
    return []


def _all_imports(tree: ast.AST) -> set[str]:
    """Top-level packages imported anywhere in a module, also inside functions and for type checking only."""
    return {name.split(".")[0] for node in ast.walk(tree) for name in _imported(node)}


def _imports_when_loaded(tree: ast.AST) -> set[str]:
    """Top-level packages imported by importing the module: not those in functions or under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        found |= {name.split(".")[0] for name in _imported(node)} | _imports_when_loaded(node)
    return found


def test_the_scan_sees_imports_wherever_they_stand() -> None:
    source = """
import a.b, c
from d.e import f
from . import x
if TYPE_CHECKING:
    import g
try:
    import h
except ImportError:
    pass
class K:
    import i
    def method(self):
        if self:
            from j import k
importlib.import_module("l.m")
async def later(): import n
"""
    assert _imports_when_loaded(ast.parse(source)) == {"a", "c", "d", "", "h", "i", "l"}
    assert _all_imports(ast.parse(source)) == {"a", "c", "d", "", "g", "h", "i", "j", "l", "n"}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_one_way(package: str) -> None:
    folder, others = MAY_IMPORT[package]
    wrong = {
        f"{path} imports {name or 'relatively'}"
        for path, tree in _sources(folder)
        for name in _all_imports(tree)
        if name in ("", "tests", *MAY_IMPORT) and name not in {package, *others}
    }
    assert not wrong


def _modules(folder: str, package: str) -> dict[str, set[str]]:
    """What each module of a package imports from the same package, wherever the import stands."""
    sources = {
        ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__"): tree
        for path, tree in _sources(folder)
    }
    imported: dict[str, set[str]] = {name: set() for name in sources}
    for name, tree in sources.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                members = (f"{node.module}.{alias.name}" for alias in node.names)
                imported[name] |= {member if member in sources else node.module for member in members}
            elif isinstance(node, ast.Import):
                imported[name] |= {alias.name for alias in node.names}
    return {name: (names & set(sources)) - {name} for name, names in imported.items()}


def _circle(arrows: dict[str, set[str]]) -> list[str]:
    """The nodes of one circle, or none."""
    try:
        list(TopologicalSorter(arrows).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def test_a_circle_is_seen() -> None:
    assert not _circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})
    assert {*_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})} == {"a", "b", "c"}


@pytest.mark.parametrize("package", [name for name in MAY_IMPORT if name != "triton_repo"])
def test_modules_import_without_circles(package: str) -> None:
    assert not _circle(_modules(MAY_IMPORT[package][0], package))


def test_rooms_import_one_way() -> None:
    used: dict[str, set[str]] = {}
    for name, others in _modules("diffuserve", "diffuserve").items():
        for other in others - {"diffuserve"}:
            if (room := _room(name)) != _room(other):
                used.setdefault(room, set()).add(_room(other))
    assert not _circle(ROOMS)
    rooms = {_room(name) for name in _modules("diffuserve", "diffuserve")} - {"diffuserve"}
    assert set(ROOMS) == rooms
    assert {room: others - ROOMS[room] for room, others in used.items() if others - ROOMS[room]} == {}
    assert {room: ROOMS[room] - used.get(room, set()) for room in ROOMS if ROOMS[room] - used.get(room, set())} == {}


def test_the_documented_rooms_are_all_and_in_order() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    [section] = re.findall(r"^### Inside `diffuserve/`$(.*?)^##", text, re.MULTILINE | re.DOTALL)
    rows = [re.findall(r"`(\w+)(?:/|\.py)`", row) for row in re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)]
    assert sorted(room for row in rows for room in row) == sorted(ROOMS)
    place = {room: number for number, row in enumerate(rows) for room in row}
    above = {room: {other for other in others if place[other] <= place[room]} for room, others in ROOMS.items()}
    assert above == ROOMS


def _room(module: str) -> str:
    """The folder or file below `diffuserve/` that a module belongs to."""
    return module.split(".")[1] if "." in module else module


def test_files_are_small() -> None:
    lines = {
        path: len((ROOT / path).read_text(encoding="utf-8").splitlines())
        for package, (folder, _) in MAY_IMPORT.items()
        if package != "triton_repo"
        for path, _ in _sources(folder)
    }
    assert {path: count for path, count in lines.items() if count > 400} == {}
    assert statistics.median(lines.values()) < 120


def test_no_room_is_the_house() -> None:
    lines: Counter[str] = Counter()
    for path, _ in _sources("diffuserve"):
        lines[path.parts[1]] += len((ROOT / path).read_text(encoding="utf-8").splitlines())
    [(room, most)] = lines.most_common(1)
    assert most < lines.total() / 5, f"{room} has {most} of {lines.total()} lines"


@pytest.mark.parametrize("room", LOADTEST_ROOMS)
def test_the_load_tests_rooms_import_one_way(room: str) -> None:
    may_import = {room, *LOADTEST_ROOMS[room]}
    wrong = {
        f"{path} imports {name}"
        for path, tree in _sources(f"loadtest/diffuserve_loadtest/{room}")
        for node in ast.walk(tree)
        for name in _imported(node)
        if name.startswith("diffuserve_loadtest") and (*name.split("."), "")[1] not in may_import
    }
    assert not wrong


def test_the_command_line_alone_names_the_other_packages() -> None:
    others = "|".join(name for name in MAY_IMPORT if name != "diffuserve")
    naming = {
        path
        for path, tree in _sources("diffuserve")
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and re.fullmatch(rf"({others})(\.\w+)*", str(node.value))
        if node.value != "triton_repo"  # the default folder to serve, no package
    }
    assert naming == {Path("diffuserve/cli.py")}


def test_default_places_have_one_home() -> None:
    places = {str(value) for value in vars(defaults).values() if isinstance(value, Path)}
    assert "triton_repo" in places
    literals = {
        (path, node.value)
        for folder, _ in MAY_IMPORT.values()
        for path, tree in _sources(folder)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in places
    }
    assert {path for path, _ in literals} == {Path("diffuserve/defaults.py")}


def test_the_load_test_names_its_subcommands_in_one_place() -> None:
    naming = {
        path
        for path, tree in _sources("loadtest/diffuserve_loadtest")
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        if re.fullmatch(r"diffuserve_(bench|faults|peers)(\.\w+)*", str(node.value))
    }
    assert naming == {Path("loadtest/diffuserve_loadtest/loadtest_command.py")}


def test_the_core_loads_few_libraries() -> None:
    allowed = CORE_LIBRARIES | set(sys.stdlib_module_names) | {"diffuserve"}
    wrong = {
        f"{path} imports {name}"
        for path, tree in _sources("diffuserve")
        if path.parts[1] not in ("triton", "torchserve", "engines", "graphs", "torch_graphs", "trials")
        for name in _imports_when_loaded(tree) - allowed
    }
    assert not wrong


def test_heavy_libraries_are_imported_inside_functions() -> None:
    heavy = {
        (path, name)
        for folder, _ in MAY_IMPORT.values()
        for path, tree in _sources(folder)
        for name in _imports_when_loaded(tree) & HEAVY
    }
    torch = {(path, "torch") for path in (*DEFINE_TORCH_MODULES, *WITH_TORCH, *IN_TRAINING)}
    assert heavy == torch | {(path, "locust") for path in IN_LOCUST}


@pytest.mark.parametrize("verb", ["", *_VERBS])
def test_help(verb: str) -> None:
    script = Path(sys.executable).with_name("diffuserve")
    run = subprocess.run([script, *([verb] if verb else []), "--help"], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith(f"Usage: diffuserve {verb}".rstrip())
    if not verb:
        assert all(f"  {name} " in run.stdout and line in run.stdout for name, (_, line, _) in _VERBS.items())


@pytest.mark.parametrize("verb", ["", *_VERBS])
def test_help_loads_nothing_heavy(verb: str) -> None:
    code = (
        "import json, sys; from diffuserve.cli import root;"
        f"root.main({[verb] if verb else []} + ['--help'], prog_name='diffuserve', standalone_mode=False);"
        "print(json.dumps(list(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    loaded = set(json.loads(run.stdout.splitlines()[-1]))
    assert "diffuserve.cli" in loaded
    assert not loaded & NOT_FOR_HELP
    others = {name.split(".")[0] for name in loaded} & set(MAY_IMPORT) - {"diffuserve"}
    assert others == ({_VERBS[verb][0].split(".")[0]} - {"diffuserve"} if verb else set())


def test_an_unknown_verb() -> None:
    script = Path(sys.executable).with_name("diffuserve")
    run = subprocess.run([script, "paint"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "No such command 'paint'" in run.stderr
