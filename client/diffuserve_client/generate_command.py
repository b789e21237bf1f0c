"""`diffuserve generate`: prompts to image files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diffuserve.defaults import BUNDLES, KEY_FILE, TORCHSERVE, TRITON
from diffuserve.errors import DiffuserveError, InvalidRequest
from diffuserve.tensors import STABLE_DIFFUSION
from diffuserve_client.request_options import request_options

if TYPE_CHECKING:
    from diffuserve.request import RequestFields
    from diffuserve_client.batch import TextToImage

_INTERRUPTED = 130  # the shell's exit code for Ctrl-C


@click.command("generate", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@click.option(
    "--prompts",
    "prompt_file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="More prompts: UTF-8, one a line, # for comments.",
)
@request_options
@click.option(
    "-o",
    "--output",
    metavar="NAME.png",
    type=click.Path(path_type=Path),
    help="Several images become NAME-1.png, NAME-2.png ... [named after prompt and seed]",
)
@click.option("--grid", is_flag=True, help="One contact sheet instead of a file per image.")
@click.option("--force", is_flag=True, help="Overwrite files. [a number is added to the new one's name]")
@click.option("--server", "kind", type=click.Choice(["triton", "torchserve"]), help="What kind of server. [triton]")
@click.option(
    "--url",
    metavar="HOST:PORT",
    help=f"Its gRPC address. [localhost:{TRITON.grpc}; TorchServe: localhost:{TORCHSERVE.grpc}]",
)
@click.option("--model", metavar="NAME", help=f"Which of the server's models. [{STABLE_DIFFUSION}]")
@click.option(
    "--key-file",
    type=click.Path(path_type=Path),
    help=f"TorchServe's keys, as `diffuserve serve` says. [{KEY_FILE}]",
)
@click.option(
    "--retries",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    help="How often to ask again where the server is full, stopping or not there.",
)
@click.option("--describe", is_flag=True, help="Print as JSON what the server offers, and draw nothing.")
@click.option("--quiet", is_flag=True, help="Print the files' names only, and no progress bar.")
@click.option("--local", is_flag=True, help="Draw in this process, without a server.")
@click.option(
    "--bundle",
    metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help=f"The model for --local. [the one in {BUNDLES}]",
)
def command(
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    seeds: tuple[int, ...],
    num_images: int,
    format: str | None,
    output: Path | None,
    grid: bool,
    force: bool,
    kind: str | None,
    url: str | None,
    model: str | None,
    key_file: Path | None,
    retries: int,
    describe: bool,
    quiet: bool,
    local: bool,
    bundle: Path | None,
    **settings: Any,
) -> None:
    """Draws PROMPT and saves the images.

    Several prompts and seeds are drawn together. Settings left out are the model's own.

    \b
    diffuserve generate "a slice of pizza" -o pizza.png
    diffuserve generate "a cat" "a dog" --seed 1 --seed 2 --grid -o pets.png
    """
    if not (prompts or prompt_file or describe):
        raise click.UsageError('Nothing to draw. Give a prompt, such as "a slice of pizza", or a file with --prompts.')
    if local and (url is not None or kind is not None or model is not None):
        raise click.UsageError(
            "--local needs no server, and --url, --server or --model names one. Drop one of the two."
        )
    if key_file is not None and kind != "torchserve":
        raise click.UsageError("--key-file is TorchServe's. Add --server torchserve or drop --key-file.")
    if bundle is not None and not local:
        raise click.UsageError("--bundle is for --local; a server has its own. Add --local or drop --bundle.")

    def open_client() -> TextToImage:
        return _local_client(bundle) if local else _client(kind, url, model or STABLE_DIFFUSION, key_file, retries)

    if describe:
        if prompts or prompt_file:
            raise click.UsageError("--describe draws nothing. Drop it, or the prompts.")
        with _reported():
            _print_description(open_client())
        return

    from diffuserve_client.batch import Job
    from diffuserve_client.output import check_writable, format_for, path_for
    from diffuserve_client.prompts import read_prompts

    try:
        texts = [*prompts, *(read_prompts(prompt_file) if prompt_file is not None else [])]
        image_format = format_for(output, format)
        # Without -o the final name depends on the seed; any seed's will do to check the folder.
        check_writable(path_for(output, image_format, prompt=texts[0], seed=0, number=1, total=1))
    except InvalidRequest as error:
        raise click.UsageError(str(error)) from None
    jobs = [
        Job(index, prompt, seed)
        for index, (prompt, seed) in enumerate((prompt, seed) for prompt in texts for seed in seeds or (None,))
    ]
    # Separate files keep the server's encoding; a sheet is put together from lossless images.
    fields: RequestFields = {
        **settings,  # type: ignore[typeddict-item]
        "num_images": num_images,
        "format": "png" if grid else image_format,
    }

    from diffuserve_client.run import Run

    work = Run(jobs, fields, output=output, format=image_format, grid=grid, overwrite=force, quiet=quiet)
    with _reported(), closing(open_client()) as client:
        failed = work.draw(client)
    if failed:
        raise click.exceptions.Exit(1)


@contextmanager
def _reported() -> Iterator[None]:
    """Errors and Ctrl-C become messages and exit codes."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("Cancelled.", err=True)
        raise click.exceptions.Exit(_INTERRUPTED) from None
    except DiffuserveError as error:
        raise click.ClickException(str(error)) from None


def _print_description(client: TextToImage) -> None:
    import msgspec

    with closing(client):
        click.echo(msgspec.json.format(msgspec.json.encode(client.describe()), indent=2))


def _client(kind: str | None, url: str | None, model: str, key_file: Path | None, retries: int) -> TextToImage:
    from diffuserve_client.client import Client

    if kind != "torchserve":
        return Client(url, model=model, retries=retries)
    from diffuserve.torchserve.keys import read_inference_token
    from diffuserve_client.torchserve import TorchServe

    server = TorchServe(read_inference_token(key_file or KEY_FILE))
    return Client(url, server=server, model=model, retries=retries)


def _local_client(bundle: Path | None) -> TextToImage:
    from diffuserve_client.local import LocalClient

    if bundle is None:
        found = sorted(manifest.parent for manifest in BUNDLES.glob("*/manifest.json"))
        if len(found) != 1:
            names = f"{len(found)} bundles: {', '.join(path.name for path in found)}" if found else "no bundle"
            raise click.UsageError(f"{BUNDLES} holds {names}. Name one with --bundle, or make one: diffuserve export")
        [bundle] = found
    return LocalClient(bundle)
