"""`loadledger infer`: inputs from arguments and files, outputs as a summary, JSON or a file.

The content decides what a file is, not its name, so that standard input can be any of them. What needs
numpy is in arrays.py.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import click

from loadledger.cli.completion import loaded_models
from loadledger.cli.options import (
    ServerChoice,
    json_option,
    open_chosen_client,
    server_options,
)
from loadledger.cli.output import exit_with_error, print_json, print_note, print_result
from loadledger.cli.snippets import NAMELESS

MAX_FILE_BYTES = 256 * 2**20
"""Longest file: a server takes tensors of 64 MiB, which are longer as JSON and shorter in an archive."""
EXAMPLES = "NAME=JSON, like x='[[1, 2]]', NAME=@FILE, or NAME=zeros, ones or random"
_FILL = re.compile(r"(zeros|ones|random)(?::(\d{1,9}(?:x\d{1,9})*))?")
_ARRAY, _ARCHIVES = b"\x93NUMPY", (b"PK\x03\x04", b"PK\x05\x06")
_IMAGES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_WEBP = slice(0, 4), slice(8, 12), b"RIFF", b"WEBP"
MAX_SIDE = 16_384
"""Longest side of a picture, in pixels; Pillow's JPEG and WebP have no longer ones."""
SUFFIXES = (".npy", ".npz")
_QUOTED = re.compile(r'("(?:[^"\\]|\\.)*")=(.*)', re.DOTALL)
"""An input whose name is a text of JSON, as any name may be."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """The content of a file that is no JSON: an array, an archive of arrays or a picture."""

    label: str
    content: bytes

    @property
    def is_archive(self) -> bool:
        return self.content.startswith(_ARCHIVES)

    @property
    def is_image(self) -> bool:
        first, second, riff, webp = _WEBP
        is_webp = self.content[first] == riff and self.content[second] == webp
        return is_webp or self.content.startswith(_IMAGES)

    @property
    def is_array(self) -> bool:
        return self.content.startswith(_ARRAY)


@dataclass(frozen=True, slots=True)
class InputFill:
    """Made-up values: zeros, ones or random numbers; without a shape, of the shape that the server tried."""

    values: str
    shape: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class GivenInput:
    """An input as it was given.

    Attributes:
        name: None if it was omitted.
        value: of JSON, a file, or made up.
    """

    name: str | None
    value: Any

    @property
    def names_inputs(self) -> bool:
        """Whether it has inputs by name: a JSON object or an archive without a name of its own."""
        if self.name is not None:
            return False
        return isinstance(self.value, Mapping) or (
            isinstance(self.value, InputFile) and self.value.is_archive
        )


def parse_input(text: str) -> GivenInput:
    """Parse an argument and read its file."""
    name: str | None
    name, equals, value = (None, "=", text) if text[:1] in NAMELESS else text.partition("=")
    if quoted := _QUOTED.fullmatch(text):
        name, value = _parse_json(quoted[1], quoted[1]), quoted[2]
    if not equals:
        name, value = None, text
    if name == "" or (name is None and not text):
        raise _misfit(f"{text[:64]!r} is not {EXAMPLES}")
    if value.startswith("@"):
        return GivenInput(name, read_value(Path(value[1:])))
    if filled := _FILL.fullmatch(value):
        shape = None if filled[2] is None else tuple(map(int, filled[2].split("x")))
        return GivenInput(name, InputFill(filled[1], shape))
    return GivenInput(name, _parse_json(value, text if name is None else name))


def read_value(file: Path) -> Any:
    """Return the content of a file, - is standard input: a value of JSON, or an `InputFile`."""
    label = "standard input" if str(file) == "-" else file.name
    try:
        if str(file) == "-":
            content = _read(sys.stdin.buffer, label)
        else:
            with file.open("rb") as opened:
                content = _read(opened, label)
    except OSError as error:
        exit_with_error(f"{file} cannot be read: {error.strerror}")
    found = InputFile(label, content)
    if found.is_array or found.is_archive or found.is_image:
        return found
    try:
        return json.loads(content, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise _misfit(
            f"{label} is no array of numpy (.npy, .npz), no PNG, JPEG or WebP image, and no JSON: {error}"
        ) from None


def whole_request(given: Sequence[GivenInput]) -> dict[str, Any] | None:
    for each in given:
        members = each.value if each.names_inputs else None
        if isinstance(members, Mapping) and isinstance(members.get("inputs"), list):
            if len(given) > 1:
                raise _misfit("a whole request has all inputs: give it alone")
            outputs = members.get("outputs")
            named = outputs if isinstance(outputs, list) else []
            wanted = [one["name"] if isinstance(one, dict) and "name" in one else one for one in named]
            return {**members, "outputs": wanted or None}
    return None


def _read(file: BinaryIO, label: str) -> bytes:
    content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        exit_with_error(f"{label} has more than {MAX_FILE_BYTES // 2**20} MiB")
    return content


def _parse_json(text: str, name: str) -> Any:
    try:
        return json.loads(text, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise _misfit(f"{name[:64]!r} is not JSON: {error}; give {EXAMPLES}") from None


def _finite(number: str) -> float:
    """Return a number of JSON; only the word Infinity is one."""
    if math.isinf(float(number)):
        raise ValueError(f"{number[:64]} is out of range")
    return float(number)


def _misfit(text: str) -> click.BadParameter:
    return click.BadParameter(text, param_hint="INPUT")


def _parse_size(
    _context: click.Context, _option: click.Parameter, text: str | None
) -> tuple[int, int] | None:
    """Return width and height of WIDTHxHEIGHT; one number is both."""
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
    """Return a number, or several with commas."""
    try:
        return None if text is None else tuple(map(float, text.split(",")))
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is not a number for all channels, or one for each, like 0.5,0.5,0.5"
        ) from None


@click.command()
@click.argument("model", shell_complete=loaded_models)
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
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the outputs to a file of numpy: one to .npy, any number to .npz.",
)
@json_option
@server_options
def infer(
    model: str,
    *,
    inputs: tuple[str, ...],
    version: str | None,
    outputs: tuple[str, ...],
    out: Path | None,
    as_json: bool,
    where: ServerChoice,
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
        _list_inputs(model, where, as_json=as_json)
        return
    given = [parse_input(text) for text in inputs]
    if out is not None and (as_json or out.suffix not in SUFFIXES):
        raise click.BadParameter("give it a name with .npy or .npz, and no --json", param_hint="--out")
    with open_chosen_client(where, timeout_s=120.0) as client:
        request = whole_request(given) or {
            "inputs": _find_inputs(client, model, version, given=given, picture=picture)
        }
        result = client.infer(
            model,
            request["inputs"],
            version=version,
            outputs=outputs or request.get("outputs"),
            parameters=request.get("parameters"),
        )
    from events.errors import WrongTarget
    from loadledger.cli import arrays  # it imports numpy

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


def _list_inputs(model: str, where: ServerChoice, *, as_json: bool) -> None:
    from loadledger.cli.models import format_tensors, replace_tensors

    with open_chosen_client(where) as client:
        shown, metadata = client.model(model), client.metadata(model)
    lines = format_tensors(replace_tensors(shown, metadata), where.words)
    print_result(metadata, list(lines)[1:], as_json=as_json)


def _find_inputs(
    client: Any,
    model: str,
    version: str | None,
    *,
    given: list[GivenInput],
    picture: dict[str, Any],
) -> dict[str, Any]:
    from loadledger import ServerError
    from loadledger.inference import NOT_LOADED

    try:
        metadata = client.metadata(model, version=version)
    except ServerError as problem:
        if problem.code not in NOT_LOADED:
            raise
        metadata = None
    from loadledger.cli import arrays  # it imports numpy

    return arrays.build_inputs(given, metadata, arrays.ImageOptions(**picture), print_note)
