"""`diffuserve loadtest WORKLOAD`: a load, a report and a verdict."""

from __future__ import annotations

import signal
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from diffuserve.defaults import ARCHIVES, LOADTEST_RESULTS, REPOSITORY, TRITON
from diffuserve.tensors import STABLE_DIFFUSION
from diffuserve_loadtest.sending.target import PROTOCOLS

if TYPE_CHECKING:
    from diffuserve_loadtest.report.found import Found
    from diffuserve_loadtest.report.run import Run
    from diffuserve_loadtest.report.slo import Slo
    from diffuserve_loadtest.server.under_test import UnderTest
    from diffuserve_loadtest.workload.workload import Workload

_PATH = click.Path(path_type=Path)
_SLO_BROKEN, _CANNOT_KEEP_UP = 2, 3
_TRY_S = 45.0  # of a search
_MAX_ROWS = 32  # of a UNet call, where the server does not say
# command: (module with the click command `command`, its line in the help)
_SUBCOMMANDS = {
    "faults": ("diffuserve_faults.faults_command", "Attack a server, and count what is lost."),
    "peers": ("diffuserve_peers.peers_command", "Other servers under the same load."),
}


class _WorkloadOrCommand(click.Group):
    """A first word that is not a command is a workload, which `run` takes."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.list_commands(ctx):
            args = ["run", *args]
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["run", "compare", *_SUBCOMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _SUBCOMMANDS:
            import importlib

            command: click.Command = importlib.import_module(_SUBCOMMANDS[cmd_name][0]).command
            return command
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            error.exit_code = 1  # type: ignore[misc]  # click's own 2 says here that the SLO was broken
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        ours = {name: each.get_short_help_str(limit=80) for name, each in self.commands.items()}
        with formatter.section("Commands"):
            formatter.write_dl([*ours.items(), *((name, text) for name, (_, text) in _SUBCOMMANDS.items())])


@click.group("loadtest", cls=_WorkloadOrCommand, short_help="Load a server, and say what it holds.")
def command() -> None:
    """Drives a server with a workload and reports. WORKLOAD is one of burst, cancel-storm, mixed, overload, ramp, single,
    soak, or a YAML file.

    \b
    diffuserve loadtest mixed                                  # starts a server of its own
    diffuserve loadtest mixed --url localhost:8001             # one that runs already
    diffuserve loadtest mixed --slo "p95<20s,errors<0.1%"      # exit code 2 if it was not kept
    diffuserve loadtest mixed --slo "p95<20s" --find-max       # the highest rate that keeps it
    diffuserve loadtest compare A.json B.json
    """
    # As Ctrl-C, so that the server and the generator that were started end with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


@command.command("run", short_help="Run a workload (the default).")
@click.argument("workload")
@click.option(
    "--server", type=click.Choice(["triton", "torchserve"]), default="triton", help="What to start.  [triton]"
)
@click.option("--repository", type=_PATH, default=REPOSITORY, show_default=True, help="For Triton.")
@click.option("--archive", type=_PATH, help=f"For TorchServe.  [default: the only one in {ARCHIVES}]")
@click.option("--url", help="A server that runs already: HOST:PORT for gRPC, http://HOST:PORT for HTTP.")
@click.option("--model", default=STABLE_DIFFUSION, show_default=True, help="Which of the server's models.")
@click.option("--protocol", type=click.Choice(PROTOCOLS), help="[default: triton-grpc, or torchserve-grpc]")
@click.option(
    "--metrics-url", help=f"Of a server at --url.  [default: http://HOST:{TRITON.metrics}/metrics for Triton]"
)
@click.option("--pid", type=int, help="Of a server at --url on this machine, to watch its memory.")
@click.option("--key-file", type=_PATH, help="Of a TorchServe at --url.")
@click.option(
    "--duration",
    "duration_s",
    type=click.FloatRange(min=1),
    help="Seconds.  [default: the workload's; 45 for each try of --find-max]",
)
@click.option("--rate", "rate_per_s", type=click.FloatRange(min=0, min_open=True), help="Poisson arrivals a second.")
@click.option(
    "--capacity-per-s",
    type=click.FloatRange(min=0, min_open=True),
    help="What a load of 1 is.  [default: measured first, in 40 s]",
)
@click.option("--slo", "slo_text", default="", help="Such as p95<3s,errors<0.1%.")
@click.option("--find-max", "searching", is_flag=True, help="Search the highest rate that keeps --slo.")
@click.option("--bundle", type=_PATH, help="Time its engines first, for the serving efficiency.")
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes that send.")
@click.option("--output", type=_PATH, default=LOADTEST_RESULTS, show_default=True)
def run(
    workload: str,
    server: str,
    repository: Path,
    archive: Path | None,
    url: str | None,
    model: str,
    protocol: str | None,
    metrics_url: str | None,
    pid: int | None,
    key_file: Path | None,
    duration_s: float | None,
    rate_per_s: float | None,
    capacity_per_s: float | None,
    slo_text: str,
    searching: bool,
    bundle: Path | None,
    workers: int,
    output: Path,
) -> None:
    """Runs WORKLOAD. Exit codes: 0 all is well, 1 it could not run, 2 the SLO was broken, 3 the generator could not keep up, so
    that the figures are not the server's."""
    from diffuserve_loadtest.engine_bound import engine_bound_per_s
    from diffuserve_loadtest.report.page import publish_run
    from diffuserve_loadtest.report.slo import slo_from_text
    from diffuserve_loadtest.run_workload import measure_capacity, run_workload
    from diffuserve_loadtest.workload.files import read_workload

    slo = slo_from_text(slo_text)
    if searching and not slo.terms:
        raise click.UsageError('--find-max needs an SLO to keep, such as --slo "p95<20s,errors<0.1%".')
    duration_s = duration_s or (_TRY_S if searching else None)
    chosen = _overridden(read_workload(workload), duration_s, rate_per_s)
    name = Path(workload).stem
    opened = (
        _running(url, model, protocol, metrics_url, pid, key_file)
        if url
        else _started(server, repository, model, archive, protocol)
    )
    with opened as under_test:
        bound_per_s = engine_bound_per_s(chosen, bundle, under_test.max_rows or _MAX_ROWS) if bundle else None
        if capacity_per_s is None and (searching or chosen.needs_capacity):
            capacity_per_s = measure_capacity(chosen, under_test)
        if searching:
            assert capacity_per_s is not None  # noqa: S101 - for the type checker
            result, found = _search(name, chosen, under_test, slo, capacity_per_s, bound_per_s, workers)
        else:
            found = None
            result = run_workload(
                name,
                chosen,
                under_test,
                slo=slo,
                capacity_per_s=capacity_per_s,
                engine_bound_per_s=bound_per_s,
                workers=workers,
            )
    publish_run(result, output, found)
    if not result.kept_up:
        sys.exit(_CANNOT_KEEP_UP)
    if (found is not None and found.rate_per_s is None) or (found is None and not result.slo_kept):
        sys.exit(_SLO_BROKEN)


def _overridden(workload: Workload, duration_s: float | None, rate_per_s: float | None) -> Workload:
    import msgspec

    from diffuserve_loadtest.workload.arrivals import Poisson

    if duration_s is not None:
        warm_up_s = min(workload.warm_up_s, duration_s / 4)
        workload = msgspec.structs.replace(workload, duration_s=duration_s, warm_up_s=warm_up_s)
    if rate_per_s is not None:
        workload = msgspec.structs.replace(workload, arrivals=Poisson(rate_per_s=rate_per_s))
    return workload


def _running(
    url: str, model: str, protocol: str | None, metrics_url: str | None, pid: int | None, key_file: Path | None
) -> AbstractContextManager[UnderTest]:
    from diffuserve_loadtest.sending.target import Protocol, Target
    from diffuserve_loadtest.server.under_test import UnderTest

    kind: Protocol = protocol or "triton-grpc"  # type: ignore[assignment]
    if metrics_url is None and kind.startswith("triton"):
        host = url.split("://")[-1].rpartition(":")[0] or "localhost"
        metrics_url = f"http://{host}:{TRITON.metrics}/metrics"
    return nullcontext(UnderTest(Target(kind, url, model=model), metrics_url, pid, key_file))


def _started(
    server: str, repository: Path, model: str, archive: Path | None, protocol: str | None
) -> AbstractContextManager[UnderTest]:
    from diffuserve.torchserve.configuration import only_archive
    from diffuserve_loadtest.server.under_test import started_torchserve, started_triton

    if protocol is not None and not protocol.startswith(server):
        raise click.UsageError(f"{protocol} is not a protocol of --server {server}.")
    if server == "torchserve" and model != STABLE_DIFFUSION:
        raise click.UsageError(f"An archive's model is called {STABLE_DIFFUSION}. Drop --model {model}.")
    click.echo(f"Starting {server} ...", err=True)
    if server == "triton":
        return started_triton(repository, protocol or "triton-grpc", model)  # type: ignore[arg-type]
    return started_torchserve(archive or only_archive(), protocol or "torchserve-grpc")  # type: ignore[arg-type]


def _search(
    name: str,
    workload: Workload,
    server: UnderTest,
    slo: Slo,
    capacity_per_s: float,
    bound_per_s: float | None,
    workers: int,
) -> tuple[Run, Found]:
    """The run of the highest rate that kept the SLO, or of the last try if none did."""
    import msgspec

    from diffuserve_loadtest.find_max import find_max
    from diffuserve_loadtest.report.found import Try
    from diffuserve_loadtest.run_workload import run_workload
    from diffuserve_loadtest.workload.arrivals import Poisson

    runs: dict[float, Run] = {}

    def attempt(rate_per_s: float) -> Try:
        at_rate = msgspec.structs.replace(workload, arrivals=Poisson(rate_per_s=rate_per_s))
        server.wait_until_idle()
        result = run_workload(
            name,
            at_rate,
            server,
            slo=slo,
            capacity_per_s=capacity_per_s,
            engine_bound_per_s=bound_per_s,
            workers=workers,
        )
        runs[rate_per_s] = result
        words = ", ".join(f"{verdict.term.text}: {verdict.words}" for verdict in result.verdicts)
        click.echo(f"{rate_per_s:.3g} requests/s: {'kept' if result.slo_kept else 'broken'} ({words})", err=True)
        measures = result.measures
        return Try(rate_per_s, result.slo_kept, dict(measures.latency_s), measures.goodput_per_s)

    found = find_max(attempt, 0.7 * capacity_per_s)
    return runs[found.rate_per_s or found.tries[-1].rate_per_s], found


@command.command("compare", short_help="Two runs side by side.")
@click.argument("first", type=_PATH)
@click.argument("second", type=_PATH)
@click.option("--output", type=_PATH, default=LOADTEST_RESULTS, show_default=True)
def compare(first: Path, second: Path, output: Path) -> None:
    """Prints the figures of two runs with their ratios, and plots the latencies over each other."""
    from diffuserve_loadtest.report.compare import comparison_of, read_for_comparison
    from diffuserve_loadtest.report.report import publish

    publish(comparison_of(read_for_comparison(first), read_for_comparison(second), (first.stem, second.stem)), output)
