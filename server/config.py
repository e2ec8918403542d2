"""The one configuration: what can be set, by which flag and variable, and what is a valid value.

Everything that shows settings to people (the command's options, the README's table) is generated from here.
"""

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import environs
import limits
from marshmallow import ValidationError, validate

from server.keyring import read_public_keys
from server.keys import KeyProblem

Check = Callable[[Any], object]

OFF = "off"
MAX_TIMEOUT_S = 3600  # the longest that a client may ask for, too


class ConfigError(Exception):
    """A setting is missing or has no valid value; the text says which, why and what to do."""


def _about(help_text: str, *, kind: type = str, check: Check | None = None) -> Mapping[str, Any]:
    return {"help": help_text, "kind": kind, "check": check}


def _text(value: str) -> None:
    if not value.strip() or not value.isprintable():
        raise ValidationError("Must be printable and not empty.")


def _seconds(value: float) -> None:
    if not 0 <= value <= MAX_TIMEOUT_S:  # the range check of marshmallow lets NaN pass
        raise ValidationError(f"Must be a number of seconds from 0 to {MAX_TIMEOUT_S}.")


def _some_seconds(value: float) -> None:
    _seconds(value)
    if value == 0:
        raise ValidationError("Must be more than 0 seconds.")


def _limit(value: str) -> None:
    if value == OFF:
        return
    try:
        items = limits.parse_many(value)
    except ValueError:
        items = []
    if len(items) != 1 or items[0].amount < 1:
        raise ValidationError(f"Must be one limit like 600/minute, or {OFF}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How one server runs. Paths are as given; nothing here touches the file system."""

    repository: Path = field(metadata=_about("Directory of models, as MODEL/VERSION/model.onnx.", kind=Path))
    data: Path = field(
        metadata=_about("Directory of the ledger and the keys; created when it is missing.", kind=Path)
    )
    host: str = field(default="127.0.0.1", metadata=_about("Address to listen on.", check=_text))
    port: int = field(
        default=8080,
        metadata=_about("Port to listen on; 0 picks a free one.", kind=int, check=validate.Range(0, 65535)),
    )
    loads_at_once: int = field(
        default=0,
        metadata=_about(
            "How many models may load at the same time; 0 means as many as there are cores.",
            kind=int,
            check=validate.Range(0, 1024),
        ),
    )
    threads: int = field(
        default=1,
        metadata=_about("Threads that one model computes with.", kind=int, check=validate.Range(1, 1024)),
    )
    drain_timeout_s: float = field(
        default=30.0,
        metadata=_about(
            "How long an unload waits for running inferences.",
            kind=float,
            check=_seconds,
        ),
    )
    inference_timeout_s: float = field(
        default=60.0,
        metadata=_about(
            "How long one inference may take.",
            kind=float,
            check=_some_seconds,
        ),
    )
    inference_grace_s: float = field(
        default=5.0,
        metadata=_about(
            "How long an inference that was told to stop may go on before its worker is killed.",
            kind=float,
            check=_some_seconds,
        ),
    )
    inference_queue: int = field(
        default=1024,
        metadata=_about(
            "How many inferences of one model may be queued or running.",
            kind=int,
            check=validate.Range(1, 1_000_000),
        ),
    )
    timeout_s: int = field(
        default=300,
        metadata=_about(
            "How long a load may take, waiting included, when its request does not say.",
            kind=int,
            check=validate.Range(1, MAX_TIMEOUT_S),
        ),
    )
    jwt_audience: str = field(
        default="loadledger", metadata=_about("The aud that tokens must name.", check=_text)
    )
    jwt_issuer: str | None = field(
        default=None,
        metadata=_about("The iss that tokens must name; unset, it is not looked at.", check=_text),
    )
    jwt_keys: Path | None = field(
        default=None,
        metadata=_about(
            "Public key (PEM) or JWKS file of an identity provider, used instead of our own keys.", kind=Path
        ),
    )
    jwt_roles_claim: str = field(
        default="roles",
        metadata=_about(
            "The claim that lists the roles; a path like realm_access.roles is followed.", check=_text
        ),
    )
    limit_management: str = field(
        default="600/minute", metadata=_about("Loads and unloads per subject, or off.", check=_limit)
    )
    limit_inference: str = field(
        default="600000/minute", metadata=_about("Inferences per subject, or off.", check=_limit)
    )
    limit_reads: str = field(
        default="6000/minute", metadata=_about("Other requests per subject, or off.", check=_limit)
    )
    limit_auth_failures: str = field(
        default="30/minute", metadata=_about("Refused credentials per peer address, or off.", check=_limit)
    )

    def __post_init__(self) -> None:
        for setting in settings():
            value = getattr(self, setting.name)
            if value is not None and setting.check is not None:
                _checked(setting, value)

    def max_loads(self) -> int:
        """Return how many loads may run at once, with 0 resolved to the cores this process may use."""
        return self.loads_at_once or len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of `Config` as people meet it.

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


def settings() -> tuple[Setting, ...]:
    """Return all settings, in the order of `Config`."""
    return tuple(_described(entry) for entry in dataclasses.fields(Config))


def load_config(flags: Mapping[str, object], environment: Mapping[str, str]) -> Config:
    """Read the whole configuration: flags (by field name, None is unset) before environment before defaults.

    Raises:
        ConfigError: naming the option and the variable.
    """
    return Config(**read_settings([setting.name for setting in settings()], flags, environment))


def read_settings(
    names: Collection[str], flags: Mapping[str, object], environment: Mapping[str, str]
) -> dict[str, Any]:
    """Read only some settings, for a command that needs no others.

    Raises:
        ConfigError: naming the option and the variable.
    """
    env = _MappingEnv(environment)
    return {setting.name: _read(setting, flags, env) for setting in settings() if setting.name in names}


def check_files(config: Config) -> None:
    """Check, when serving begins, that what must exist does.

    Raises:
        ConfigError: naming the option and the path.
    """
    if not config.repository.is_dir():
        raise ConfigError(f"--repository: {config.repository} is not a directory; create it or name another")
    if config.data.exists() and not config.data.is_dir():
        raise ConfigError(f"--data: {config.data} is not a directory; name another")
    if config.jwt_keys is not None:
        try:
            read_public_keys(config.jwt_keys)
        except (OSError, KeyProblem) as error:
            raise ConfigError(f"--jwt-keys: {error}; name the provider's PEM or JWKS file") from None


def configuration_table() -> str:
    """Return the README's table of settings, in Markdown."""
    head = ["| option | variable | default | what |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *(_row(setting) for setting in settings())]) + "\n"


class _MappingEnv(environs.Env):
    """Environs over a given mapping: only the command's entry point knows the process's own environment."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        super().__init__()
        self._environment = environment

    def _get_value(self, env_key: str, default: Any) -> Any:
        return self._environment.get(env_key, default)


def _described(entry: "dataclasses.Field[Any]") -> Setting:
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


def _read(setting: Setting, flags: Mapping[str, object], env: environs.Env) -> Any:
    given = flags.get(setting.name)
    if given is not None:
        return _checked(setting, _converted(setting, given))
    parsers: Mapping[type, Callable[..., Any]] = {
        str: env.str,
        int: env.int,
        float: env.float,
        Path: env.path,
    }
    try:
        value = parsers[setting.kind](setting.variable, None)
    except environs.EnvError as error:
        raise ConfigError(f"{error}{_advice(setting)}") from None
    if value is not None:
        return _checked(setting, value)
    if setting.required:
        raise ConfigError(f"{setting.name} is missing: give {setting.flag} or set {setting.variable}")
    return setting.default


def _converted(setting: Setting, given: object) -> Any:
    try:
        return setting.kind(given)
    except (TypeError, ValueError):
        raise ConfigError(f"{setting.flag}: {given!r} is not a valid {setting.kind.__name__}") from None


def _checked(setting: Setting, value: Any) -> Any:
    try:
        if setting.check is not None:
            setting.check(value)
    except ValidationError as error:
        reasons = " ".join(_messages(error))
        raise ConfigError(
            f"{setting.flag} (or {setting.variable}): {value!r} is refused. {reasons}"
        ) from None
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


def _row(setting: Setting) -> str:
    default = (
        "(required)" if setting.required else f"`{setting.default}`" if setting.default is not None else ""
    )
    return f"| `{setting.flag}` | `{setting.variable}` | {default} | {setting.help} |"
