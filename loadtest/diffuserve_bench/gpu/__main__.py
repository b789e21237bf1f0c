"""The command line of `diffuserve bench gpu`, which needs nothing but the standard library to start:

PYTHONPATH=.:loadtest python -m diffuserve_bench.gpu --help
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from diffuserve.defaults import BENCH_RESULTS
from diffuserve_bench.gpu.phases import PHASES, Phase
from diffuserve_bench.gpu.record import Recorder, read_lines
from diffuserve_bench.gpu.runner import Stopped, run
from diffuserve_bench.gpu.settings import Settings

_STOPPED_CODE = 128 + 15  # as of a process that SIGTERM has ended


def main(arguments: Sequence[str] | None = None, program: str = "python -m diffuserve_bench.gpu") -> int:
    """Returns the exit code: 0 if every phase ended by itself, 1 if one died or was killed, 143 if the run was stopped."""
    options = _parser(program).parse_args(arguments)
    if options.report:
        from diffuserve_bench.gpu.report import markdown

        print(markdown(read_lines(options.report)))
        return 0
    seconds = options.seconds or sum(phase.seconds for phase in options.phases)
    with ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="diffuserve-gpu-")))
        work.mkdir(parents=True, exist_ok=True)
        settings = Settings(
            options.device,
            work.resolve(),
            model=options.model,
            bundle=options.bundle,
            tests=options.tests,
            ways=options.ways,
        )
        try:
            _write_machine(settings, options.output)
            return 0 if run(options.phases, settings, options.output, seconds) else 1
        except Stopped:
            return _STOPPED_CODE


def _write_machine(settings: Settings, output: Path) -> None:
    from diffuserve_bench.gpu.card import describe

    with Recorder(output) as recorder:
        recorder.line("machine", **describe(), settings=settings.to_json())


def _parser(program: str) -> argparse.ArgumentParser:
    described = "\n".join(f"  {phase.name:<10} {phase.seconds:>4.0f} s  {phase.text}" for phase in PHASES)
    parser = argparse.ArgumentParser(
        program,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Measures on a GPU, phase by phase, each in a process of its own and killed after its time. Every figure is\n"
            "written the moment it is known, so that a run that is stopped loses nothing but the one in progress.\n\n"
            f"phases, and the seconds that each may take:\n{described}"
        ),
    )
    parser.add_argument(
        "--phases",
        type=_phases,
        default=PHASES,
        metavar="A,B=600",
        help="which of them, and the seconds where it is to have others [default: all]",
    )
    parser.add_argument(
        "--seconds", type=_positive, help="for all phases together [default: what they may take by themselves]"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=BENCH_RESULTS / "gpu.jsonl",
        help="file for the figures, appended to [default: %(default)s]",
    )
    parser.add_argument(
        "--model",
        type=_bundle,
        help="bundle whose speed is measured; one of diffuserve export --without-weights gets random weights",
    )
    parser.add_argument("--bundle", type=_bundle, help="bundle with weights whose images are compared")
    parser.add_argument(
        "--work", type=Path, help="folder that keeps what is made on the way for another run [default: a temporary one]"
    )
    parser.add_argument("--tests", type=Path, default=Path("tests"), help="folder of the tests [default: %(default)s]")
    parser.add_argument(
        "--ways",
        type=_ways,
        default=(),
        metavar="ENGINE:PRECISION,...",
        help="engines as diffuserve engines lists them, in this order [default: each engine for GPUs in 16 bits]",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a dry run: a little of everything, on a CPU"
    )
    parser.add_argument(
        "--report",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="print tables in Markdown of such files, and do nothing else",
    )
    return parser


def _phases(text: str) -> tuple[Phase, ...]:
    return tuple(_phase(*each.strip().partition("=")) for each in text.split(","))


def _phase(name: str, equals: str, seconds: str) -> Phase:
    known = {phase.name: phase for phase in PHASES}
    if name not in known:
        raise argparse.ArgumentTypeError(f"there is no phase {name!r}; there are: {', '.join(known)}")
    return replace(known[name], seconds=_positive(seconds)) if equals else known[name]


def _ways(text: str) -> tuple[str, ...]:
    names = tuple(each.strip() for each in text.split(","))
    for name in names:
        if len(name.split(":")) != 2:
            raise argparse.ArgumentTypeError(
                f"there is {name!r}; it must be an engine and a precision, torch-cuda:fp16"
            )
    return names


def _positive(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be a number of seconds above 0")
    return seconds


def _bundle(text: str) -> Path:
    path = Path(text)
    if not (path / "manifest.json").is_file():
        raise argparse.ArgumentTypeError(f"{text} is not a bundle: it has no manifest.json")
    return path


if __name__ == "__main__":
    sys.exit(main())
