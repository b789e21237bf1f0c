"""The tests that need a GPU, counted."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree

from diffuserve_bench.gpu.record import FAILED, PhaseRecord, Skipped
from diffuserve_bench.gpu.settings import Settings

_MARKER = "pytest.mark.gpu"
# Those that take seconds, without the fixtures of the whole project, which need more packages than these tests do. Warnings of
# other versions than those that this project is tested with are not failures here.
_OPTIONS = ("-m", "gpu and not slow", "--noconftest", "--continue-on-collection-errors", "-q", "-W", "default")
_PASSED = "passed"
_OUTCOMES = {"failure": FAILED, "error": FAILED, "skipped": "skipped"}


def measure(settings: Settings, record: PhaseRecord) -> None:
    """Runs pytest on the files that have such tests, and writes down how many passed, were skipped and failed, and
    why.

    Raises:
        Skipped: there are no tests.
        ModuleNotFoundError: there is no pytest.
        RuntimeError: a test failed, or pytest made no report.
    """
    import pytest

    files = [str(path) for path in sorted(settings.tests.rglob("test_*.py")) if _MARKER in path.read_text()]
    if not files:
        raise Skipped(f"{settings.tests} has no tests that need a GPU; name the folder of the tests: --tests")
    report = settings.work / "tests.xml"
    report.unlink(missing_ok=True)
    places = ("-p", "no:cacheprovider", f"--basetemp={settings.work / 'pytest'}", f"--junit-xml={report}")
    run = subprocess.run([sys.executable, "-m", pytest.__name__, *_OPTIONS, *places, *files], check=False)
    if not report.is_file():
        raise RuntimeError(f"pytest ended with {run.returncode} and no report; its own output says why")
    cases = ElementTree.parse(report).iter("testcase")  # noqa: S314 - pytest has just written it
    outcomes = [(case.get("name", ""), *_outcome(case)) for case in cases]
    for outcome in (_PASSED, *dict.fromkeys(_OUTCOMES.values())):
        record.figure("tests", sum(each == outcome for _, each, _ in outcomes), outcome)
    for name, outcome, message in outcomes:
        if outcome != _PASSED:
            record.note(outcome, message, test=name)
    if any(outcome == FAILED for _, outcome, _ in outcomes):
        raise RuntimeError("tests failed")


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    """How the test ended, and its message."""
    for tag, outcome in _OUTCOMES.items():
        if (found := case.find(tag)) is not None:
            return outcome, found.get("message", "")
    return _PASSED, ""
