"""`diffuserve loadtest peers`."""

from __future__ import annotations

from pathlib import Path

import click

_PATH = click.Path(path_type=Path)


@click.command("peers", short_help="Beside what people would use otherwise.")
@click.option("--checkpoint", type=_PATH, default=Path("model_store/checkpoints/tiny-emoji"), show_default=True)
@click.option("--repository", type=_PATH, default=Path("triton_repo"), show_default=True)
@click.option("--archive", type=_PATH, default=Path("model_store/mar/tiny-emoji.mar"), show_default=True)
@click.option("--peers", type=_PATH, default=Path("loadtest/peers"), show_default=True)
@click.option(
    "--environments", type=_PATH, default=Path(".peers"), show_default=True, help="Where peers are installed."
)
@click.option("--steps", default="20", show_default=True, help="Of a request; several with commas between are mixed.")
@click.option("--backlog", type=click.IntRange(1, 80), default=48, show_default=True, help="Requests at once.")
@click.option("--seconds", type=click.FloatRange(min=5), default=90.0, show_default=True, help="Of each load.")
@click.option("--only", multiple=True, help="Contenders, by name; all unless given.")
@click.option("--output", type=_PATH, default=Path("bench-results"), show_default=True)
def command(
    checkpoint: Path,
    repository: Path,
    archive: Path,
    peers: Path,
    environments: Path,
    steps: str,
    backlog: int,
    seconds: float,
    only: tuple[str, ...],
    output: Path,
) -> None:
    """The same checkpoint on FastAPI, LitServe, TorchServe with a plain handler, and on diffuserve: images a second at
    saturation, latencies at half and at four fifths of the slowest one's, peak memory, lines of setup. About half an hour."""
    import msgspec

    from diffuserve_loadtest.peers.comparison import compare_peers, uniform
    from diffuserve_loadtest.peers.contenders import Sources, contenders_from
    from diffuserve_loadtest.report import publish

    contenders = contenders_from(Sources(checkpoint, repository, archive, peers, environments))
    unknown = set(only) - {contender.name for contender in contenders}
    if unknown:
        names = ", ".join(contender.name for contender in contenders)
        raise click.UsageError(f"There is no contender {sorted(unknown)[0]!r}; there are {names}.")
    chosen = [contender for contender in contenders if not only or contender.name in only]
    try:
        counts = tuple(int(part) for part in steps.split(","))
    except ValueError:
        raise click.UsageError(f"--steps {steps!r} must be numbers with commas between.") from None
    requests = uniform(counts[0])
    if len(counts) > 1:
        requests = msgspec.structs.replace(requests, steps=counts)
    settings: dict[str, object] = {
        "steps": steps,
        "backlog": backlog,
        "seconds": seconds,
        "checkpoint": str(checkpoint),
    }
    publish(compare_peers(chosen, requests, backlog=backlog, seconds=seconds, settings=settings), output)
