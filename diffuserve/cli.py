"""The command line: a table of verbs, each imported when it is called.

It is the composition root, the one place that knows every package; it knows them by name only, so `diffuserve --help`
and one verb's work never load what another verb needs.
"""

from __future__ import annotations

import importlib
import sys

import click

from diffuserve import __version__
from diffuserve.errors import DiffuserveError

# verb: (module with the click command `command`, its line in the help, the extra that installs what it needs)
_VERBS = {
    "export": ("diffuserve_export.export_command", "Checkpoint -> bundle: ONNX, checksums, parity figures.", "export"),
    "assemble": ("diffuserve_export.repository.assemble_command", "Bundle -> Triton model repository.", "serve"),
    "archive": (
        "diffuserve_export.repository.archive_command",
        "Bundle -> model archive for TorchServe.",
        "torchserve",
    ),
    "engines": ("diffuserve.trials.engines_command", "What this machine can run, and what a bundle runs on.", "serve"),
    "serve": ("diffuserve.serve_command", "Starts Triton or TorchServe.", "serve"),
    "generate": ("diffuserve_client.generate_command", "Prompt -> image, from a running server or --local.", "serve"),
    "loadtest": ("diffuserve_loadtest.loadtest_command", "Loads a server with a workload, and reports.", "loadtest"),
    "train": ("diffuserve_training.train_command", "Trains the bundled model, or a LoRA for a checkpoint.", "train"),
    "bench": ("diffuserve_bench.bench_command", "Measures, two things against each other in one run.", "loadtest"),
}


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        command: click.Command = importlib.import_module(_VERBS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, text) for verb, (_, text, _) in _VERBS.items()])


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="diffuserve")
def root() -> None:
    """Serves Stable Diffusion with in-flight batching: requests join and leave the batch at every step."""


def main() -> None:
    """Runs the command line; errors that are meant for the user are printed without a traceback, exit code 1."""
    try:
        root.main(standalone_mode=True)
    except DiffuserveError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
    except ModuleNotFoundError as error:
        verb = next((arg for arg in sys.argv[1:] if arg in _VERBS), None)
        if verb is None:
            raise
        extra = _VERBS[verb][2]
        click.echo(
            f"Error: `{verb}` needs {error.name}, which is not installed. Install it: pip install 'diffuserve[{extra}]'",
            err=True,
        )
        sys.exit(1)
