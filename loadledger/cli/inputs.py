"""Inputs of an inference, from arguments of a command and from files.

The content decides what a file is, not its name, so that standard input can be any of them.
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

from loadledger.cli.output import exit_with_error
from loadledger.cli.snippets import NAMELESS

MAX_FILE_BYTES = 256 * 2**20
"""Longest file: a server takes tensors of 64 MiB, which are longer as JSON and shorter in an archive."""
EXAMPLES = "NAME=JSON, like x='[[1, 2]]', NAME=@FILE, or NAME=zeros, ones or random"
_FILL = re.compile(r"(zeros|ones|random)(?::(\d{1,9}(?:x\d{1,9})*))?")
_ARRAY, _ARCHIVES = b"\x93NUMPY", (b"PK\x03\x04", b"PK\x05\x06")
_IMAGES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_WEBP = slice(0, 4), slice(8, 12), b"RIFF", b"WEBP"
_QUOTED = re.compile(r'("(?:[^"\\]|\\.)*")=(.*)', re.DOTALL)
"""An input with its name as a JSON text, which any name can be written as."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """The content of a file other than JSON: an array, an archive of arrays or a picture."""

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
    """Made-up values: zeros, ones or random numbers; without a shape, as in the server's example."""

    values: str
    shape: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class GivenInput:
    """An input from the command line.

    Attributes:
        name: None if omitted.
        value: from JSON, from a file, or made up.
    """

    name: str | None
    value: Any

    @property
    def names_inputs(self) -> bool:
        """Whether the value has inputs by name: a JSON object or an archive without a name of its own."""
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
    """Return the content of a file (- is standard input): a value of JSON, or an `InputFile`."""
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
    """Return a number of JSON; only the word Infinity makes an infinite one."""
    if math.isinf(float(number)):
        raise ValueError(f"{number[:64]} is out of range")
    return float(number)


def _misfit(text: str) -> click.BadParameter:
    return click.BadParameter(text, param_hint="INPUT")
