"""The documentation's links lead somewhere, its index is whole, and the errors that it lists are those of the sources."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from diffuserve import errors
from diffuserve.errors import TRITON_CODE, DiffuserveError, ServerUnavailable
from diffuserve.http_answers import HTTP_STATUS
from diffuserve_client.retries import is_safe

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SOURCES = ("diffuserve", "export", "client", "handlers")
MESSAGES = re.findall(r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
ERRORS = re.findall(
    r"^\| `(\w+)` \| `(\w+)` \| (\w*) ?\| (\w*) ?\| ([\w ]+) \| \S.*\|$", (DOCS / "errors.md").read_text(), re.MULTILINE
)


def pages() -> list[Path]:
    """The project's Markdown files."""
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in files if name.endswith(".md")]
    return sorted(found)


def prose(page: Path) -> str:
    """Without blocks of code, in which `#` and `](` mean something else."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives to headings: small letters, no punctuation, hyphens for spaces, numbers for repetitions."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def links(page: Path) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if "://" not in link]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), f"{link}: there are {sorted(anchors(target))}"


def test_links_and_anchors_are_found() -> None:
    """Else the test above could not fail."""
    assert "docs/http.md" in links(ROOT / "README.md")
    assert {"retries", "limits"} <= anchors(DOCS / "faults.md")
    assert "stable-diffusion-15-at-its-real-size" in anchors(DOCS / "benchmarks.md")


def test_the_index_has_every_page() -> None:
    listed = re.findall(r"^- \[[^\]]+\]\(([\w./-]+\.md)\): ", (DOCS / "README.md").read_text(), re.MULTILINE)
    beside = {page.name for page in DOCS.glob("*.md")} - {"README.md"}
    above = {page.name for page in ROOT.glob("*.md")} - {"README.md"}
    assert sorted(listed) == sorted([*beside, *(f"../{name}" for name in above)])


def test_the_first_page_leads_to_those_beside_it() -> None:
    assert {"CONTRIBUTING.md", "SECURITY.md"} <= {*links(ROOT / "README.md")}


def texts() -> list[str]:
    """Every text in the sources but docstrings, with `…` in the place of what an f-string inserts."""
    found = []
    for path in (path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
                found.append(node.value)
    return found


def texts_of_triton() -> bytes:
    """The program that runs Triton's Python models."""
    spec = importlib.util.find_spec("pytriton")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "tritonserver" / "backends" / "python" / "libtriton_python.so").read_bytes()


def test_the_messages_of_troubleshooting_are_in_the_sources() -> None:
    assert len(MESSAGES) > 25
    ours, triton = texts(), texts_of_triton()
    for message in MESSAGES:
        words = message.strip("… ")
        assert len(words) > 10, f"{message!r} is too short to be told from others"
        assert any(words in text for text in ours) or words.encode() in triton, (
            f"{message!r} of docs/troubleshooting.md is in no source: quote what is there now"
        )


def test_the_errors_are_all_listed_with_their_codes() -> None:
    classes = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, DiffuserveError)]
    assert sorted(ERRORS) == sorted(
        (cls.__name__, cls.code, TRITON_CODE.get(cls, ""), str(HTTP_STATUS.get(cls, "")), retried(cls))
        for cls in classes
    )


def retried(cls: type[DiffuserveError]) -> str:
    """When the clients send a request again that ended so."""
    if is_safe(cls("")):
        return "yes"
    return "if never sent" if cls is ServerUnavailable and is_safe(ServerUnavailable("", never_begun=True)) else "no"
