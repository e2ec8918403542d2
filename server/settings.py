"""What a setting is to people, an option and a variable, and how one is read; `server.config` has them."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import environs
from marshmallow import ValidationError

Check = Callable[[Any], object]

_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"(\d{1,18})(MB|GB|TB|MiB|GiB|TiB|)", re.ASCII)


class ConfigError(Exception):
    """A setting is missing or has no valid value; the text says which, why and what to do."""


def about(help_text: str, *, kind: type = str, check: Check | None = None) -> Mapping[str, Any]:
    """Return the metadata of a field: what it is for, its type, and what refuses a value."""
    return {"help": help_text, "kind": kind, "check": check}


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of the configuration as people meet it.

    Attributes:
        name: The field's name.
        flag: The command's option, such as `--port`.
        variable: The environment variable, such as `LOADLEDGER_PORT`.
        kind: `str`, `int`, `float` or `Path`.
        default: None when there is none; see `required`.
    """

    name: str
    flag: str
    variable: str
    help: str
    kind: type
    required: bool
    default: Any
    check: Check | None


class MappingEnv(environs.Env):
    """Environs over a given mapping: only the command's entry point knows the process's own environment."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        super().__init__()
        self._environment = environment

    def _get_value(self, env_key: str, default: Any) -> Any:
        return self._environment.get(env_key, default)


def described(entry: "dataclasses.Field[Any]") -> Setting:
    """Return a field as the setting that it is."""
    required = entry.default is dataclasses.MISSING
    return Setting(
        name=entry.name,
        flag="--" + entry.name.replace("_", "-"),
        variable="LOADLEDGER_" + entry.name.upper(),
        help=entry.metadata["help"],
        kind=entry.metadata["kind"],
        required=required,
        default=None if required else entry.default,
        check=entry.metadata["check"],
    )


def read(
    setting: Setting,
    flags: Mapping[str, object],
    env: environs.Env,
    file: Mapping[str, Any] | None = None,
) -> Any:
    """Read a setting: flag, by the field's name, before variable before file before default.

    Args:
        setting: which one.
        flags: by the setting's name; None is not given.
        env: has the variables.
        file: what the configuration file gives, checked.

    Raises:
        ConfigError: naming the option and the variable.
    """
    given = flags.get(setting.name)
    if given is not None:
        return checked(setting, _converted(setting, given))
    parsers: Mapping[type, Callable[..., Any]] = {
        str: env.str,
        int: env.int,
        float: env.float,
        Path: env.str,
    }
    try:
        value = parsers[setting.kind](setting.variable, None)
    except environs.EnvError as error:
        raise ConfigError(f"{error}{_advice(setting)}") from None
    if value is not None:
        return checked(setting, _path(setting, value) if setting.kind is Path else value)
    if file is not None and setting.name in file:
        return file[setting.name]
    if setting.required:
        raise ConfigError(
            f"{setting.name} is missing: give {setting.flag} or set {setting.variable}, or {setting.name} in"
            " the file that --config names"
        )
    return setting.default


def _converted(setting: Setting, given: object) -> Any:
    if setting.kind is Path:
        return _path(setting, str(given))
    try:
        return setting.kind(given)
    except (TypeError, ValueError):
        raise ConfigError(f"{setting.flag}: {given!r} is not a valid {setting.kind.__name__}") from None


def _path(setting: Setting, text: str) -> Path:
    try:
        return written_path(text)
    except ValueError as error:
        raise ConfigError(f"{setting.flag} (or {setting.variable}): {text!r} is refused. {error}") from None


def written_path(text: str) -> Path:
    """Return the path that a text names.

    Raises:
        ValueError: it names none, and would be taken for the folder that this runs in, or it begins with a
            `~`, of which a folder of that name would be made; its text says what it must be.
    """
    if not text:
        raise ValueError("Must name a path.")
    if text.startswith("~"):  # a shell leaves it in --data=~/ledger, and nobody else replaces it
        raise ValueError("Must be written out: ~ is replaced by a shell, and only where a word begins.")
    return Path(text)


def checked(setting: Setting, value: Any, named: str | None = None) -> Any:
    """Return a value that is valid.

    Args:
        setting: what it is a value of.
        value: of the setting's type.
        named: what a message calls the setting; else by its option and variable.

    Raises:
        ConfigError: naming the setting.
    """
    try:
        if setting.check is not None:
            setting.check(value)
    except ValidationError as error:
        reasons = " ".join(_messages(error))
        name = named or f"{setting.flag} (or {setting.variable})"
        raise ConfigError(f"{name}: {value!r} is refused. {reasons}") from None
    return value


def _messages(error: ValidationError) -> Iterator[str]:
    for message in error.messages:
        yield str(message)


def _advice(setting: Setting) -> str:
    advice = f" Correct or unset {setting.variable}; {setting.help}"
    if setting.name == "port":
        # A Service of that name makes Kubernetes set LOADLEDGER_PORT=tcp://… in each pod beside it.
        advice += (
            " Under Kubernetes, a Service named loadledger sets this variable: use enableServiceLinks: false."
        )
    return advice


def size_bytes(text: str) -> int:
    """Return a size in bytes.

    Args:
        text: bytes, or a whole number of MB, GB, TB, MiB, GiB or TiB, with nothing between.

    Raises:
        ValueError: it is none; its text says what it must be.
    """
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ValueError("Must be bytes, or a whole number of MB, GB, TB, MiB, GiB or TiB, like 20GB.")
    return int(found[1]) * _UNITS[found[2]]
