"""The inputs of `loadledger infer`: arguments and files, read within limits.

The content decides what a file is, not its name, so that standard input can be any of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import click

from loadledger.cli.output import exit_with_error

MAX_FILE_BYTES = 256 * 2**20
"""Longest file: a server takes tensors of 64 MiB, which are longer as JSON and shorter in an archive."""
EXAMPLES = "NAME=JSON, like x='[[1, 2]]', or NAME=@FILE"
_NAMELESS = '@[{"'
_ARRAY, _ARCHIVES = b"\x93NUMPY", (b"PK\x03\x04", b"PK\x05\x06")
_IMAGES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_WEBP = slice(0, 4), slice(8, 12), b"RIFF", b"WEBP"


@dataclass(frozen=True, slots=True)
class InputFile:
    """The content of a file that is no JSON: an array, an archive of arrays or a picture."""

    label: str
    content: bytes

    @property
    def is_archive(self) -> bool:
        """Whether it is an archive of numpy (.npz)."""
        return self.content.startswith(_ARCHIVES)

    @property
    def is_image(self) -> bool:
        """Whether it is a PNG, JPEG or WebP image."""
        first, second, riff, webp = _WEBP
        is_webp = self.content[first] == riff and self.content[second] == webp
        return is_webp or self.content.startswith(_IMAGES)

    @property
    def is_array(self) -> bool:
        """Whether it is an array of numpy (.npy)."""
        return self.content.startswith(_ARRAY)


@dataclass(frozen=True, slots=True)
class GivenInput:
    """An input as it was given.

    Attributes:
        name: None if it was omitted.
        value: of JSON, or a file.
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
    name, equals, value = (None, "=", text) if text[:1] in _NAMELESS else text.partition("=")
    if not equals:
        name, value = None, text
    if name == "" or (name is None and not text):
        raise _misfit(f"{text[:64]!r} is not {EXAMPLES}")
    if value.startswith("@"):
        return GivenInput(name, read_value(Path(value[1:])))
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
        return json.loads(content)
    except (ValueError, RecursionError):
        raise _misfit(
            f"{label} is no array of numpy (.npy, .npz), no PNG, JPEG or WebP image, and no JSON"
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
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _misfit(f"{name[:64]!r} is not JSON: {error}; give {EXAMPLES}") from None


def _misfit(text: str) -> click.BadParameter:
    return click.BadParameter(text, param_hint="INPUT")
