"""The configuration file: TOML whose keys are the settings' names. Flags and the environment go before it.

It holds no secrets: there are none among the settings, only names of files that have some. Relative paths in
it are relative to its folder, so that it means the same from wherever the server is started.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.settingchecks import path_refusal
from server.settings import ConfigError, Setting, checked, written_path

MAX_FILE_BYTES = 2**20
"""All settings, each with a page of comment, are a tenth of it."""

_WANTED = {
    str: 'text in quotes, like {name} = "…"',
    int: "a whole number without quotes, like {name} = 1",
    float: "a number without quotes, like {name} = 1.5",
    Path: 'a path in quotes, like {name} = "/…"; a relative one is relative to this file',
}


class _WrongType(Exception):
    """A value is of another type than its setting."""


@dataclass(frozen=True, slots=True)
class _Text:
    """The file as it was written, to say where in it something stands."""

    path: Path
    text: str

    def place(self, key: str) -> str:
        """Return the file and, where it is found, the line of a key of the top level, for a message."""
        name = re.escape(key)
        found = re.search(rf"""^[ \t]*\[*[ \t]*(["']?)({name})\1[ \t]*[=.\]]""", self.text, re.MULTILINE)
        if found is None:
            return str(self.path)
        line = 1 + self.text.count("\n", 0, found.start(2))
        return f"{self.path}:{line}"


def read_config_file(path: Path, known: Mapping[str, Setting]) -> dict[str, Any]:
    """Return the values that a file gives to settings, by name, converted and checked.

    Args:
        path: the file.
        known: all settings by name.

    Raises:
        ConfigError: it cannot be read or is no TOML, or keys in it are unknown or have no valid value: all of
            them are named, each with its line.
    """
    file = _read(path)
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in _parsed(file).items():
        try:
            values[key] = _value(file, key, value, known)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return values


def _read(path: Path) -> _Text:
    refusal = path_refusal(path)
    if refusal is not None:
        raise ConfigError(f"--config: {refusal}")
    try:
        if not path.is_file():  # nor a FIFO, which might never be written to
            raise ConfigError(f"--config: there is no file {path}")
        with path.open("rb") as opened:
            content = opened.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config: {path} cannot be read: {error}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"--config: {path} has more than {MAX_FILE_BYTES} bytes: it is no such file")
    try:
        # Editors of Windows begin a file with a mark, which is no TOML.
        return _Text(path, content.decode("utf-8-sig").replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: is not UTF-8, which TOML is") from None


def _parsed(file: _Text) -> dict[str, Any]:
    try:
        return tomllib.loads(file.text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        found = re.search(r"\(at line (\d+), column \d+\)$", str(error))
        where = f"{file.path}:{found[1]}" if found is not None else str(file.path)
        raise ConfigError(f"{where}: is not TOML: {error}") from None


def _value(file: _Text, key: str, value: object, known: Mapping[str, Setting]) -> Any:
    """Return the value that a key gives to its setting.

    Raises:
        ConfigError: naming file, line and key.
    """
    place = file.place(key)
    setting = known.get(key)
    if setting is None:
        raise ConfigError(f"{place}: there is no setting {key[:64]!r}{_hint(key, value, known)}")
    try:
        converted = _CONVERTERS[setting.kind](value, file.path)
    except _WrongType as error:
        wanted = _WANTED[setting.kind].format(name=setting.name)
        raise ConfigError(f"{place}: {setting.name} is {error}, and must be {wanted}") from None
    except ValueError as error:
        raise ConfigError(f"{place}: {setting.name}: {value!r:.40} is refused. {error}") from None
    return checked(setting, converted, named=f"{place}: {setting.name}")


def _hint(key: str, value: object, known: Mapping[str, Setting]) -> str:
    if isinstance(value, dict):
        return ": settings stand at the top, under no [table]"
    plain = key.removeprefix("LOADLEDGER_").lstrip("-").lower().replace("-", "_")
    near = difflib.get_close_matches(plain, known, n=1)
    return f"; did you mean {near[0]}?" if near else "; `loadledger serve --help` lists them all"


def _text_value(value: object, _path: Path) -> str:
    if not isinstance(value, str):
        raise _WrongType(_said(value))
    return value


def _whole_number(value: object, _path: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _WrongType(_said(value))
    return value


def _number(value: object, _path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _WrongType(_said(value))
    try:
        return float(value)
    except OverflowError:
        raise _WrongType(_said(value)) from None


def _path_value(value: object, path: Path) -> Path:
    if not isinstance(value, str) or not value:
        raise _WrongType(_said(value))
    if "\0" in value:
        raise ValueError("No path has a NUL character.")
    return path.parent / written_path(value)


_CONVERTERS: Mapping[type, Callable[[object, Path], Any]] = {
    str: _text_value,
    int: _whole_number,
    float: _number,
    Path: _path_value,
}


def _said(value: object) -> str:
    """Name a value as TOML has it, for a message."""
    match value:
        case bool():
            return f"the boolean {str(value).lower()}"
        case int() | float():
            return f"the number {value!s:.40}"
        case str():
            return f"the text {value[:40]!r}"
        case dict():
            return "a table"
        case list():
            return "a list"
        case _:
            return "a date or time"
