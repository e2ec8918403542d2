"""`loadledger infer`: run an inference with inputs from options or a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from loadledger.cli.completion import loaded_models
from loadledger.cli.output import exit_with_error, format_cell, format_table, print_result
from loadledger.cli.server import (
    ServerChoice,
    int_option,
    json_option,
    open_chosen_client,
    server_options,
)

HEAD = ("OUTPUT", "DATATYPE", "SHAPE", "DATA")
NAMES = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
"""As in the JSON of Protocol Buffers."""
MAX_DATA_CHARACTERS = 400
"""Longest output in a table; `--json` has all of it."""


@click.command()
@click.argument("model", shell_complete=loaded_models)
@click.option(
    "--input",
    "-i",
    "typed",
    multiple=True,
    metavar="NAME=JSON",
    help="An input as nested lists, like x='[[1, 2]]', or from a file: x=@FILE. May be repeated.",
)
@click.option(
    "--file",
    "-f",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help='Inputs as {"NAME": lists}, or a whole request of the protocol; - is standard input.',
)
@int_option("--version", "-v", metavar="N", text="Version; it has to be the loaded one.")
@click.option(
    "--output", "-o", "outputs", multiple=True, metavar="NAME", help="Only this output. May be repeated."
)
@json_option
@server_options
def infer(
    model: str,
    *,
    typed: tuple[str, ...],
    file: Path | None,
    version: int | None,
    outputs: tuple[str, ...],
    as_json: bool,
    where: ServerChoice,
) -> None:
    """Run an inference on a model.

    Shapes and datatypes come from the model. A server with `--on-demand on` loads the model first if needed.
    """
    request = _request(typed, file)
    with open_chosen_client(where, timeout_s=120.0) as client:
        answer = client.infer(
            model,
            request["inputs"],
            version=version,
            outputs=outputs or request.get("outputs"),
            parameters=request.get("parameters"),
        )
    print_result(_with_named_numbers(answer), _lines(answer), as_json=as_json)


def _request(typed: tuple[str, ...], file: Path | None) -> dict[str, Any]:
    if (file is None) == (not typed):
        raise click.UsageError("give the inputs: --input NAME=JSON for each, or --file FILE")
    if file is None:
        return {"inputs": dict(map(_parse_input, typed))}
    given = _parse_json(_text(file), f"--file {file}")
    if not isinstance(given, dict):
        raise click.BadParameter('it has to be a JSON object, like {"x": [[1, 2]]}', param_hint="--file")
    if not isinstance(given.get("inputs"), list):
        return {"inputs": given}
    outputs = given["outputs"] if isinstance(given.get("outputs"), list) else []
    wanted = [each["name"] if isinstance(each, dict) and "name" in each else each for each in outputs]
    return {**given, "outputs": wanted or None}


def _parse_input(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise click.BadParameter(f"{text[:64]!r} is not NAME=JSON, like x='[[1, 2]]'", param_hint="--input")
    if value.startswith("@"):
        value = _text(Path(value[1:]))
    return name, _parse_json(value, f"--input {name}")


def _parse_json(text: str, hint: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"it is not JSON: {error}", param_hint=hint) from None


def _text(file: Path) -> str:
    try:
        if str(file) == "-":
            return sys.stdin.read()
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        exit_with_error(f"{file} cannot be read: {error}")


def _with_named_numbers(answer: dict[str, Any]) -> dict[str, Any]:
    """Return an answer with NaN and the infinities by name: JSON has no numbers for them."""
    for output in answer.get("outputs", []):
        data = output.get("data")
        if isinstance(data, list):
            output["data"] = list(map(_named_number, data))
    return answer


def _named_number(element: Any) -> Any:
    return NAMES.get(str(element), element) if isinstance(element, float) else element


def _lines(answer: dict[str, Any]) -> Iterator[str]:
    rows = [_row(output) for output in answer.get("outputs", [])]
    yield f"{format_cell(answer.get('model_name'))} version {format_cell(answer.get('model_version'))}"
    yield from format_table(HEAD, rows)


def _row(output: dict[str, Any]) -> tuple[str, ...]:
    name, datatype = format_cell(output.get("name")), format_cell(output.get("datatype"))
    data = json.dumps(output.get("data"), ensure_ascii=False)
    return name, datatype, json.dumps(output.get("shape")), format_cell(data, most=MAX_DATA_CHARACTERS)
