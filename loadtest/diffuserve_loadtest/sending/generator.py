"""Starts the generator, which is Locust in processes of its own, and waits for its recording.

It is apart from this process because gevent changes the standard library for all that runs beside it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from diffuserve.errors import DiffuserveError
from diffuserve.serving.process import free_ports
from diffuserve_loadtest.sending.records import Recording, all_answered, read_recording
from diffuserve_loadtest.sending.target import Target
from diffuserve_loadtest.workload.arrivals import Closed
from diffuserve_loadtest.workload.files import to_yaml
from diffuserve_loadtest.workload.workload import Workload

_LOCUSTFILE = Path(__file__).with_name("locustfile.py")
CANNOT_KEEP_UP = 3
"""Its exit code when requests were sent late, or not at all."""
_MARGIN_S = 60.0
_WORKERS_START_WITHIN_S = 30
_HOST = "127.0.0.1"


class GeneratorFailed(DiffuserveError):
    """It could not start, or did not end."""

    code = "generator_failed"


def generate(
    workload: Workload, target: Target, *, key_file: Path | None = None, workers: int = 1
) -> tuple[Recording, bool]:
    """Sends a workload to a target.

    Args:
        workload: with rates in requests per second.
        target: where to.
        key_file: TorchServe's keys.
        workers: processes that send; with several, one more directs them.

    Returns:
        What happened to each request, and whether the generator kept up.

    Raises:
        GeneratorFailed: it ended otherwise; its own words are in the message.
    """
    with _started(workload, target, key_file, workers) as generator:
        code = generator.wait(workload.duration_s + workload.patience_s + _MARGIN_S, 0, CANNOT_KEEP_UP)
        return read_recording(generator.path), code == 0


@contextlib.contextmanager
def generating(workload: Workload, target: Target) -> Iterator[None]:
    """Sends a workload while the block runs, and hangs up at its end on what is in flight.

    Raises:
        GeneratorFailed: as `generate`, at the end of the block.
        RequestsFailed: a request had another end than its answer, said at the end of the block.
    """
    with _started(workload, target, None, 1) as generator:
        yield
        generator.process.terminate()
        generator.wait(_MARGIN_S, 0, CANNOT_KEEP_UP, -signal.SIGTERM)
        if generator.path.exists():  # else the block ended before it had begun
            all_answered(read_recording(generator.path))


@dataclass(frozen=True)
class _Generator:
    """Locust's process, the master's if there are several, and the file for its recording."""

    process: subprocess.Popen[str]
    path: Path

    def wait(self, limit_s: float, *codes: int) -> int:
        """Its exit code; raises `GeneratorFailed` if that is none of `codes`, or if it does not end."""
        try:
            _, log = self.process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise GeneratorFailed(f"The generator has not ended after {limit_s:.0f} s and was stopped.") from None
        code = self.process.returncode
        if code not in codes:
            raise GeneratorFailed(f"The generator ended with {code}. {_last_words(log)}")
        if code == CANNOT_KEEP_UP:
            click.echo(_last_words(log, "could not keep up"), err=True)
        return code


@contextlib.contextmanager
def _started(workload: Workload, target: Target, key_file: Path | None, workers: int) -> Iterator[_Generator]:
    with tempfile.TemporaryDirectory(prefix="diffuserve-loadtest-") as name, contextlib.ExitStack() as stack:
        file, path = Path(name) / "workload.yaml", Path(name) / "recording.json"
        file.write_text(to_yaml(workload))
        options = ["--workload", str(file), "--protocol", target.protocol, "--host", target.url]
        options += ["--model", target.model]
        options += ["--recording", str(path)]
        options += ["--key-file", str(key_file)] if key_file else []
        directing: list[str] = []
        if isinstance(workload.arrivals, Closed):  # a process without a user would send nothing
            workers = min(workers, workload.arrivals.users)
        if workers > 1:
            [port] = free_ports(_HOST, 1)
            directing = ["--master", f"--expect-workers={workers}", f"--master-bind-host={_HOST}"]
            directing += [f"--expect-workers-max-wait={_WORKERS_START_WITHIN_S}", f"--master-bind-port={port}"]
            if not isinstance(workload.arrivals, Closed):
                directing += ["--users", str(workers), "--spawn-rate", str(workers)]
            for _ in range(workers):
                stack.enter_context(_process([*options, "--worker", f"--master-host={_HOST}", f"--master-port={port}"]))
        process = stack.enter_context(_process([*options, "--headless", "--only-summary", *directing]))
        yield _Generator(process, path)


@contextlib.contextmanager
def _process(options: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Locust in a group of its own, which is killed at the end whatever happens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "locust", "--locustfile", str(_LOCUSTFILE), *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE if "--worker" not in options else subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stderr:
            process.stderr.close()


def _last_words(log: str, wanted: str = "") -> str:
    lines = [line for line in log.splitlines() if line.strip() and wanted in line]
    return "\n".join(lines[-5:])
