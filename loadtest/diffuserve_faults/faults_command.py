"""`diffuserve loadtest faults`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from diffuserve.defaults import LOADTEST_RESULTS, REPOSITORY
from diffuserve.tensors import STABLE_DIFFUSION

# Here too, so that the help need not load the cases; a test compares them.
NAMES = (
    "killed-server",
    "killed-inflight",
    "killed-stage",
    "restarted",
    "cut-clients",
    "cut-http",
    "cut-grpc",
    "never-reads",
    "large",
    "garbage",
    "overload",
)


@click.command("faults", short_help="Attack a server, and count what is lost.")
@click.option("--case", "names", type=click.Choice(NAMES), multiple=True, help="Repeat it for several.  [default: all]")
@click.option("--repository", type=click.Path(path_type=Path), default=REPOSITORY, show_default=True)
@click.option("--model", default=STABLE_DIFFUSION, show_default=True, help="Which of the repository's is attacked.")
@click.option("--output", type=click.Path(path_type=Path), default=LOADTEST_RESULTS, show_default=True, help="Folder.")
@click.option(
    "--scale",
    type=click.FloatRange(0.001, 10),
    default=1.0,
    show_default=True,
    help="Share of the usual number of requests and seconds.",
)
def command(names: tuple[str, ...], repository: Path, model: str, output: Path, scale: float) -> None:
    """Starts a server on free ports of this machine, does to it what goes wrong in operation, and counts.

    A request is lost if it gets neither an answer nor an error in time, a wrong answer, or two. Exit code 1 if any was, or
    if the server was not as before afterwards.
    """
    # Servers are started while gRPC runs in this process; what is forked becomes another program at once.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

    from diffuserve_faults.runner import run_cases
    from diffuserve_loadtest.report.report import publish

    report = run_cases(names or NAMES, repository, model=model, scale=scale)
    publish(report, output)
    if not report.measured["passed"]:
        raise click.exceptions.Exit(1)
