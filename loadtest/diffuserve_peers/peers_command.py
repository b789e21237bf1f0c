"""`diffuserve loadtest peers`."""

from __future__ import annotations

import signal
from pathlib import Path

import click

from diffuserve.defaults import BENCH_RESULTS, REPOSITORY, TINY_ARCHIVE, TINY_CHECKPOINT

_PATH = click.Path(path_type=Path)


@click.command("peers", short_help="Beside what people would use otherwise.")
@click.option("--checkpoint", type=_PATH, default=TINY_CHECKPOINT, show_default=True)
@click.option("--repository", type=_PATH, default=REPOSITORY, show_default=True)
@click.option("--archive", type=_PATH, default=TINY_ARCHIVE, show_default=True)
@click.option("--peers", type=_PATH, default=Path("loadtest/peers"), show_default=True)
@click.option(
    "--environments", type=_PATH, default=Path(".peers"), show_default=True, help="Where peers are installed."
)
@click.option("--steps", default="20", show_default=True, help="Of a request; several with commas between are mixed.")
@click.option("--backlog", type=click.IntRange(1, 80), default=32, show_default=True, help="Requests at once.")
@click.option("--seconds", type=click.FloatRange(5, 3600), default=40.0, show_default=True, help="Of each load.")
@click.option("--rounds", type=click.IntRange(1, 20), default=2, show_default=True, help="Of the loads.")
@click.option("--only", multiple=True, help="Contenders, by name; a wrong one is answered with all.")
@click.option("--output", type=_PATH, default=BENCH_RESULTS, show_default=True)
def command(
    checkpoint: Path,
    repository: Path,
    archive: Path,
    peers: Path,
    environments: Path,
    steps: str,
    backlog: int,
    seconds: float,
    rounds: int,
    only: tuple[str, ...],
    output: Path,
) -> None:
    """The same checkpoint on FastAPI, LitServe, TorchServe with a plain handler, and on diffuserve: images per second at
    saturation, latencies at half and at four fifths of the slowest one's, peak memory, lines of setup. About 25 minutes."""
    from diffuserve_loadtest.report.report import publish
    from diffuserve_peers.comparison import compare_peers, uniform
    from diffuserve_peers.contenders import Sources, contenders_from
    from diffuserve_peers.environments import requirements_of

    try:
        counts = tuple(int(part) for part in steps.split(","))
    except ValueError:
        raise click.UsageError(f"--steps {steps!r} must be numbers with commas between.") from None
    for path, made_by in ((repository, "diffuserve assemble BUNDLE"), (archive, "diffuserve archive BUNDLE")):
        if not path.exists():
            raise click.UsageError(f"There is no {path}. Make it: {made_by}")
    if not peers.is_dir():
        raise click.UsageError(f"There is no {peers}. Give the folder loadtest/peers of diffuserve's sources: --peers")
    contenders = contenders_from(Sources(checkpoint, repository, archive, peers, environments))
    unknown = set(only) - {contender.name for contender in contenders}
    if unknown:
        names = ", ".join(contender.name for contender in contenders)
        raise click.UsageError(f"There is no contender {min(unknown)!r}; there are {names}.")
    chosen = [each for each in contenders if (each.name in only if only else not each.control)]
    settings: dict[str, object] = {
        "steps": steps,
        "backlog": backlog,
        "seconds": seconds,
        "rounds": rounds,
        "checkpoint": str(checkpoint),
        "requirements": requirements_of(peers),
    }
    requests = uniform(counts if len(counts) > 1 else counts[0])
    # As Ctrl-C: a peer's processes would outlive a comparison that ended at once.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    report = compare_peers(chosen, requests, backlog=backlog, seconds=seconds, rounds=rounds, settings=settings)
    publish(report, output)
