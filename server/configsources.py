"""Read the settings: option, then variable, then file, then default.

The file is TOML with the settings' names as keys. All mistakes of all sources are reported together.
"""

from __future__ import annotations

import difflib
import logging
import re
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from marshmallow import ValidationError, fields

from features.policyfile import TABLES, read_tables
from server.auth.modes import find_risk
from server.config import PREFIX, ConfigError, Setting, settings

_log = logging.getLogger(__name__)

CONFIG_VARIABLE = f"{PREFIX}CONFIG"
OF_OTHERS = frozenset(
    f"{PREFIX}{name}" for name in ("URL", "TOKEN", "CA", "PROFILE", "ROLE", "SUBJECT", "EXPIRES", "MODELS")
)
"""Variables of other commands and of deploy/compose.yaml."""

_FIELDS = {str: fields.String, Path: fields.String, int: fields.Integer, float: fields.Float}
_TOML: Mapping[type, tuple[tuple[type, ...], str]] = {
    str: ((str,), "text in quotes"),
    Path: ((str,), "a path in quotes"),
    int: ((int,), "a whole number without quotes"),
    float: ((int, float), "a number without quotes"),
}
"""The TOML types of each kind of setting, and its description."""

_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT)|_PORT_\d+_(TCP|UDP|SCTP)")
"""Kubernetes sets such variables, and one that ends in _PORT, for each Service."""


class Mistake(NamedTuple):
    """A mistake in the configuration and its place: an option, a variable, or a key of the file."""

    place: str
    text: str


class _Given(NamedTuple):
    """A value, its place, and the folder of the file that it comes from."""

    place: str
    value: Any
    folder: Path | None = None


def read_settings(
    flags: Mapping[str, Any], environment: Mapping[str, str], *, needed: Collection[str] = ()
) -> tuple[dict[str, Any], list[Mistake]]:
    """Read the settings.

    Args:
        flags: options by the settings' names; None means not given. `config` names the file.
        environment: LOADLEDGER_CONFIG names the file, unless the option does.
        needed: directories that must be known, given or as the user's own.

    Returns:
        The values that are given or have a default, and all mistakes.
    """
    file, mistakes = _read_file(flags.get("config"), environment)
    values: dict[str, Any] = {}
    if tables := {name: file[name] for name in TABLES if name in file}:
        of_tables, wrong = _read_tables(tables)
        values.update(of_tables)
        mistakes += wrong
    for setting in settings():
        given = _find(setting, flags, environment, file)
        if setting.folder is None:
            values[setting.name] = setting.default
        elif (default := default_folder(setting.folder, environment)) is not None:
            values[setting.name] = default
        elif given is None and setting.name in needed:
            source = f"set {setting.variable}, or {setting.name} in the file that --config names"
            mistakes.append(Mistake(setting.flag, f"is missing, and there is no HOME: give it or {source}"))
        if given is not None:
            try:
                values[setting.name] = _convert(setting, given)
            except ValidationError as error:
                mistakes.append(_mistake_of(given, error))
    return values, mistakes


def default_folder(name: str, environment: Mapping[str, str]) -> Path | None:
    """Return a user's own directory by the XDG base directory specification; None without a home."""
    given, home = environment.get("XDG_DATA_HOME", ""), environment.get("HOME", "")
    base = Path(given) if given.startswith("/") else Path(home, ".local", "share") if home else None
    return None if base is None else base / "loadledger" / name


def raise_mistakes(mistakes: Sequence[Mistake]) -> None:
    """Raise all mistakes as one error, if there are any.

    Raises:
        ConfigError: with a line for each mistake.
    """
    if mistakes:
        raise ConfigError("\n".join(f"{place}: {text}" for place, text in mistakes))


def _read_tables(tables: Mapping[str, _Given]) -> tuple[dict[str, Any], list[Mistake]]:
    """Return the settings that the tables are, without any if there is a mistake."""
    [folder] = {given.folder or Path() for given in tables.values()}
    values, wrong = read_tables({name: given.value for name, given in tables.items()}, folder)
    places = {name: given.place.removesuffix(name) for name, given in tables.items()}
    return values, [Mistake(places[place.partition("[")[0]] + place, text) for place, text in wrong]


def _find(
    setting: Setting, flags: Mapping[str, Any], environment: Mapping[str, str], file: Mapping[str, _Given]
) -> _Given | None:
    if flags.get(setting.name) is not None:
        return _Given(setting.flag, flags[setting.name])
    if setting.variable in environment:
        return _Given(setting.variable, environment[setting.variable])
    return file.get(setting.name)


def _convert(setting: Setting, given: _Given) -> Any:
    """Return a value of the setting's kind.

    Raises:
        ValidationError: the value is invalid.
    """
    types, wanted = _TOML[setting.kind]
    if given.folder is not None and type(given.value) not in types:  # a boolean is no number
        raise ValidationError(f"Must be {wanted}.")
    value = _FIELDS[setting.kind](validate=setting.validator).deserialize(given.value)
    return (given.folder or Path()) / value if setting.kind is Path else value


def _mistake_of(given: _Given, error: ValidationError) -> Mistake:
    text = f"{given.value!r:.80} is refused. {' '.join(map(str, error.messages))}"
    if given.place == f"{PREFIX}PORT" and "://" in given.value:
        text += (
            " Kubernetes sets this variable for a Service named loadledger: use enableServiceLinks: false."
        )
    return Mistake(given.place, text)


def _read_file(flag: str | None, environment: Mapping[str, str]) -> tuple[dict[str, _Given], list[Mistake]]:
    source, name = (
        ("--config", flag) if flag is not None else (CONFIG_VARIABLE, environment.get(CONFIG_VARIABLE))
    )
    if name is None:
        return {}, []
    path = Path(name)
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors write a byte order mark
        if (risk := find_risk(path)) is not None:
            return {}, [Mistake(source, risk)]
        document = tomllib.loads(text)
    except OSError as error:
        return {}, [Mistake(source, f"{name!r:.200} cannot be read: {error.strerror}; name another file")]
    except (ValueError, RecursionError) as error:  # or not UTF-8, or the path has a NUL
        return {}, [Mistake(source, f"{name!r:.200} is not TOML: {error}")]
    file = {key: _Given(f"{path}{_line(text, key)}: {key}", document[key], path.parent) for key in document}
    known = {*(setting.name for setting in settings()), *TABLES}
    return file, [_unknown_key(key, file[key], known) for key in file if key not in known]


def _unknown_key(key: str, given: _Given, known: Collection[str]) -> Mistake:
    if isinstance(given.value, dict):
        return Mistake(given.place, "there is no such setting; settings stand at the top, not in a [table]")
    return Mistake(given.place, f"there is no such setting; {_suggestion(key, known)}")


def _line(text: str, key: str) -> str:
    """Return `:LINE` of a top-level key, or nothing."""
    found = re.search(rf"""^[ \t\["']*{re.escape(key)}\b""", text, re.MULTILINE)
    return "" if found is None else f":{1 + text.count(chr(10), 0, found.start())}"


def unknown_variables(environment: Mapping[str, str]) -> Iterator[Mistake]:
    """Yield unknown variables with the prefix of settings: one may be mistyped."""
    known = {*(setting.variable for setting in settings()), CONFIG_VARIABLE, *OF_OTHERS}
    for name, value in sorted(environment.items()):
        is_link = _SERVICE_LINK.search(name) or (name.endswith("_PORT") and "://" in value)
        if name.startswith(PREFIX) and name not in known and not is_link:
            yield Mistake(name, _suggestion(name, known))


def warn_of_unknown_variables(environment: Mapping[str, str]) -> None:
    """Log one line with the unknown variables, if any; values may be secrets and are not shown."""
    unknown = [f"{name}: {text}" for name, text in unknown_variables(environment)]
    if unknown:
        _log.warning("unknown variables: %s", "; ".join(unknown))


def _suggestion(name: str, known: Iterable[str]) -> str:
    plain = {each.removeprefix(PREFIX).lower(): each for each in known}
    typed = name.removeprefix(PREFIX).lower().replace("-", "_")
    near = difflib.get_close_matches(typed, plain, n=1, cutoff=0.5)  # enough that REPO is REPOSITORY
    return f"did you mean {plain[near[0]]}?" if near else "`loadledger serve --help-all` lists the settings"
