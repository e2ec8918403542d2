"""`loadledger infer`: inputs from arguments and files, outputs as a summary, JSON or a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loadledger.cli import options
from loadledger.cli.completion import loaded_models
from loadledger.cli.inputs import parse_input, whole_request
from loadledger.cli.output import exit_with_error, print_json, print_note, print_result

MAX_SIDE = 16_384
"""Longest side of a picture, in pixels: the limit of Pillow's JPEG and WebP."""
SUFFIXES = (".npy", ".npz")
TIMEOUT_S = 120
UNFIT = ("inference_failed", "invalid_input")
"""Codes of a model's refusals of a picture, such as one of another size."""


def _parse_size(
    _context: click.Context, _option: click.Parameter, text: str | None
) -> tuple[int, int] | None:
    """Return width and height of WIDTHxHEIGHT; one number stands for both."""
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    sides = [int(side) if side.isascii() and side.isdecimal() else 0 for side in (width, height or width)]
    if not all(0 < side <= MAX_SIDE for side in sides):
        raise click.BadParameter(f"{text[:64]!r} is not like 224x224, with up to {MAX_SIDE} each")
    return sides[0], sides[1]


def _parse_numbers(
    _context: click.Context, _option: click.Parameter, text: str | None
) -> tuple[float, ...] | None:
    """Return one number, or several separated by commas."""
    try:
        return None if text is None else tuple(map(float, text.split(",")))
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is not a number for all channels, or one for each, like 0.5,0.5,0.5"
        ) from None


@click.command()
@options.model_argument(completes=loaded_models)
@click.argument("inputs", nargs=-1, metavar="[INPUT]...")
@click.option("--version", "-v", metavar="N|LABEL", help="Version, or a label; it has to be the loaded one.")
@click.option(
    "--output", "-o", "outputs", multiple=True, metavar="NAME", help="Only this output. May be repeated."
)
@click.option(
    "--layout",
    type=click.Choice(["NCHW", "NHWC"]),
    help="Of a picture: channels before or after height and width. [from the model]",
)
@click.option(
    "--size", callback=_parse_size, metavar="WxH", help="Of a picture, which is resized. [from the model]"
)
@click.option(
    "--scale",
    type=float,
    metavar="FACTOR",
    help="Factor of a picture's values, 0 to 255. [1/255 for floating-point inputs, else 1]",
)
@click.option("--mean", callback=_parse_numbers, metavar="M,…", help="Subtracted from the scaled values.")
@click.option("--std", callback=_parse_numbers, metavar="S,…", help="Divisor of the values after that.")
@options.int_option("--timeout", metavar="SECONDS", text="Longest wait for the answer.", default=TIMEOUT_S)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the outputs to a file of numpy: one to .npy, any number to .npz.",
)
@options.json_option
@options.server_options
def infer(
    model: str,
    *,
    inputs: tuple[str, ...],
    version: str | None,
    outputs: tuple[str, ...],
    timeout: int,
    out: Path | None,
    as_json: bool,
    where: options.ServerChoice,
    **picture: Any,
) -> None:
    """Run an inference on a model.

    Without INPUT it lists the inputs, and prints a command that works.

    An INPUT is NAME=JSON, like x='[[1, 2]]', or NAME=@FILE: an array (.npy, .npz), a picture (PNG, JPEG,
    WebP) or JSON; @- is standard input. NAME=zeros, ones or random makes values up, of a shape as in
    x=random:1x3x224x224. A NAME like a=b or @x is given in quotes, as in '"a=b"=[1]'. The only input of a
    model needs no NAME=. @FILE alone can be an archive or a JSON object with the inputs by name, or a whole
    request of the protocol.

    Shapes and datatypes come from the model; what is changed for them is said on standard error. A server
    with `--on-demand on` loads the model first if needed.

    --json prints the whole tensors instead of a summary.
    """
    if not inputs:
        _list_inputs(model, version, where, as_json=as_json)
        return
    given = [parse_input(text) for text in inputs]
    if out is not None and (as_json or out.suffix not in SUFFIXES):
        raise click.BadParameter("give it a name with .npy or .npz, and no --json", param_hint="--out")
    with options.open_chosen_client(where, timeout_s=timeout) as client:
        request = whole_request(given)
        metadata = None if request else _find_metadata(client, model, version)
        from loadledger import ServerError
        from loadledger.cli import arrays  # it imports numpy

        size = arrays.ImageOptions(**picture)
        request = request or {"inputs": arrays.build_inputs(given, metadata, size, print_note)}
        try:
            result = client.infer(
                model,
                request["inputs"],
                version=version,
                outputs=outputs or request.get("outputs"),
                parameters=request.get("parameters"),
            )
        except ServerError as problem:
            if metadata is not None and problem.code in UNFIT:
                advice = arrays.suggest_size(given, metadata, size)
                problem.args = ("; ".join(filter(None, [str(problem), advice])),)
            raise
    from events.errors import WrongTarget

    if out is not None:
        try:
            arrays.write_arrays(out, result)
        except (OSError, ValueError, WrongTarget) as error:
            exit_with_error(f"{out} cannot be written: {error}")
        print_note(f"the outputs are in {out}")
    if as_json:
        print_json(arrays.result_json(result))
    else:
        click.echo("\n".join(arrays.result_lines(result)))


def _list_inputs(model: str, version: str | None, where: options.ServerChoice, *, as_json: bool) -> None:
    from loadledger.cli.models import format_tensors, replace_tensors

    with options.open_chosen_client(where) as client:
        shown, metadata = client.model(model), client.metadata(model, version=version)
    lines = format_tensors(replace_tensors(shown, metadata), where.words)
    print_result(metadata, list(lines)[1:], as_json=as_json)


def _find_metadata(client: Any, model: str, version: str | None) -> Any:
    """Return the metadata of a model, or None if it is not loaded."""
    from loadledger import ServerError
    from loadledger.inference import NOT_LOADED

    try:
        return client.metadata(model, version=version)
    except ServerError as problem:
        if problem.code not in NOT_LOADED:
            raise
        return None
