"""The settings of a server: what each is for, its default, and which values are valid.

The options of `serve` and `check`, and the table in the documentation, are made from here;
`server.configsources` reads the values.
"""

import dataclasses
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args

from marshmallow import ValidationError, validate

from runtime.memory import budget_bytes
from server.auth.proxies import FORWARDED, X_FORWARDED_FOR, Proxies, parse_networks

PREFIX = "LOADLEDGER_"
"""Of the environment variables."""

AUTO = "auto"
ON = "on"
OFF = "off"
MAX_TIMEOUT_S = 3600
"""The longest that a client may ask for, too."""
MAX_KEEP_ALIVE_S = 365 * 86400
"""A year: whoever wants more means never, which is -1."""
MANY = 1_000_000

_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"(\d{1,18})(MB|GB|TB|MiB|GiB|TiB|)", re.ASCII)
_PERIODS_S = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
_RATE = re.compile(
    r"([1-9]\d{0,11}) *(?:/|per) *([1-9]\d{0,5})? *(second|minute|hour|day)s?", re.ASCII | re.IGNORECASE
)

Validator = Callable[[Any], object]


class ConfigError(Exception):
    """Settings are missing or not valid; each line of the text says which, why and what to do."""


def parse_size(text: str) -> int:
    """Return the bytes of a size: bytes, or a whole number of MB, GB, TB, MiB, GiB or TiB.

    Raises:
        ValueError: it is none, or 0; its text says what it must be.
    """
    found = _SIZE.fullmatch(text)
    if found is None or int(found[1]) == 0:
        raise ValueError(
            "Must be bytes, or a whole number of MB, GB, TB, MiB, GiB or TiB, like 20GB, and more than 0; to"
            " prepare nothing, give --prepare=off."
        )
    return int(found[1]) * _UNITS[found[2]]


class RateLimit(NamedTuple):
    """So many requests in a window of so many seconds."""

    amount: int
    window_s: int


def parse_limit(text: str) -> RateLimit | None:
    """Return a rate limit, like 600/minute or 20 per 5 minutes; None for off.

    Raises:
        ValueError: the text is neither; the error's says what it must be.
    """
    if text == OFF:
        return None
    found = _RATE.fullmatch(text)
    if found is None:
        raise ValueError(f"Must be one limit like 600/minute, or {OFF}.")
    return RateLimit(int(found[1]), int(found[2] or 1) * _PERIODS_S[found[3].lower()])


def _parsed(parse: Callable[[str], object]) -> Validator:
    """Return a validator that refuses what cannot be parsed."""

    def validator(text: str) -> None:
        try:
            parse(text)
        except ValueError as error:
            raise ValidationError(str(error)) from None

    return validator


def _printable(text: str) -> None:
    if not text.strip() or not text.isprintable():
        raise ValidationError("Must be printable and not empty.")


_SECONDS = validate.Range(0, MAX_TIMEOUT_S)
_POSITIVE_SECONDS = validate.Range(0, MAX_TIMEOUT_S, min_inclusive=False)
_SHARE = validate.Range(0, 1)
_SWITCH = validate.OneOf((ON, OFF))
_LIMIT = _parsed(parse_limit)
_PATH = validate.Regexp("[^~]", error="Must name a path, and written out: nothing here replaces a ~.")
"""A shell leaves the ~ in --data=~/ledger, and a folder of that name would be made."""


def setting(default: Any, help_text: str, validator: Validator | None = None) -> Any:
    """Return a field of the configuration that need not be given."""
    return field(default=default, metadata={"help": help_text, "validator": validator})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How one server runs. Nothing here reads the environment or files."""

    repository: Path = field(metadata={"help": "Directory of models, as MODEL/VERSION/model.onnx."})
    data: Path = field(metadata={"help": "Directory of the ledger and the keys; created when it is missing."})
    host: str = setting("127.0.0.1", "Address to listen on.", _printable)
    port: int = setting(8080, "Port to listen on; 0 picks a free one.", validate.Range(0, 65535))
    tls_cert: Path | None = field(
        default=None,
        metadata={
            "help": "Certificate (PEM, with its chain) to serve HTTPS with; read again when it changes."
        },
    )
    tls_key: Path | None = field(
        default=None,
        metadata={"help": "The certificate's private key (PEM, not encrypted, mode 0600 or 0640)."},
    )
    trusted_proxies: str | None = setting(
        None,
        "Addresses or networks of proxies, with commas between, that are believed when they say for whom a"
        " request is.",
        _parsed(parse_networks),
    )
    forwarded_header: str = setting(
        X_FORWARDED_FOR,
        "In which header field they say so: x-forwarded-for, or forwarded (RFC 7239).",
        validate.OneOf((X_FORWARDED_FOR, FORWARDED)),
    )
    loads_at_once: int = setting(
        0,
        "How many models may load at the same time; 0 means as many as there are cores.",
        validate.Range(0, 1024),
    )
    threads: int = setting(1, "Threads that one model computes with.", validate.Range(1, 1024))
    drain_timeout_s: float = setting(30.0, "How long an unload waits for running inferences.", _SECONDS)
    inference_timeout_s: float = setting(60.0, "How long one inference may take.", _POSITIVE_SECONDS)
    inference_grace_s: float = setting(
        5.0,
        "How long an inference that was told to stop may go on before its worker is killed.",
        _POSITIVE_SECONDS,
    )
    inference_queue: int = setting(
        1024, "How many inferences of one model may be queued or running.", validate.Range(1, MANY)
    )
    timeout_s: int = setting(
        300,
        "How long a load may take, waiting included, when its request does not say.",
        validate.Range(1, MAX_TIMEOUT_S),
    )
    memory_budget: str = setting(
        "80%",
        "Memory that workers may take together: bytes, or a percentage of what this container or machine may"
        " use.",
        _parsed(lambda text: budget_bytes(text, limit_bytes=1)),
    )
    max_loaded: int = setting(
        0, "How many models may be loaded at once; 0 means no limit.", validate.Range(0, MANY)
    )
    evict: str = setting(
        OFF,
        "Whether a load that needs room unloads the least recently used idle models: idle, or off.",
        validate.OneOf((OFF, "idle")),
    )
    min_residency_s: float = setting(
        10.0, "How long a model stays after it was loaded before it may be evicted.", _SECONDS
    )
    keep_alive_s: int = setting(
        -1,
        "After how many idle seconds a model is unloaded, when its load does not say; -1 is never, 0 is"
        " right after its last request.",
        validate.Range(-1, MAX_KEEP_ALIVE_S),
    )
    strategy: str = setting(
        "beside",
        "How a new version takes the place of the old one, when its load does not say: beside, in_place, or"
        " auto.",
        validate.OneOf(("beside", "in_place", "auto")),
    )
    on_demand: str = setting(
        OFF,
        "Whether an inference for a model that is not loaded requests its load and waits: on, or off.",
        _SWITCH,
    )
    warm_up: str = setting(
        ON,
        "Whether a model runs once before it gets requests, when its loadledger.toml does not say: on, or"
        " off.",
        _SWITCH,
    )
    prepare: str = setting(
        ON,
        "Whether models that were loaded are prepared in the background, so as to load faster later: on, or"
        " off, which does not use what was prepared either.",
        _SWITCH,
    )
    prepared_size: str = setting(
        "20GB",
        "Disk space that prepared models may take, the least recently used of which go first: bytes, or a"
        " number of MB, GB, TB, MiB, GiB or TiB.",
        _parsed(parse_size),
    )
    huge_pages: str = setting(
        AUTO,
        "Whether workers use huge pages for memory: auto, where they make loading faster, or off.",
        validate.OneOf((AUTO, OFF)),
    )
    restore: str = setting(
        "all",
        "What is loaded again at start of what was loaded when the server ended: all, or none.",
        validate.OneOf(("all", "none")),
    )
    streams_per_subject: int = setting(
        20, "How many streams of events one subject may have open.", validate.Range(1, MANY)
    )
    max_connections: int = setting(
        10_000,
        "How many connections may be open at once; three quarters of the file descriptors that the process"
        " may have, if that is less.",
        validate.Range(1, MANY),
    )
    head_timeout_s: float = setting(
        10.0,
        "How long the head of a request may take to arrive, on a new connection from its first moment.",
        _POSITIVE_SECONDS,
    )
    idle_timeout_s: float = setting(
        75.0,
        "How long a connection is kept between two requests; more than a proxy in front keeps it.",
        _POSITIVE_SECONDS,
    )
    log_format: str = setting(
        "text", "How log lines are written: text, for people, or json.", validate.OneOf(("text", "json"))
    )
    log_level: str = setting(
        "info",
        "From which level on log lines are written: debug, info, warning, or error.",
        validate.OneOf(("debug", "info", "warning", "error")),
    )
    log_inferences: float = setting(
        0.0, "The share of inferences that have a log line each, from 0, none, to 1, all.", _SHARE
    )
    otel: str = setting(
        AUTO,
        "Whether traces are exported with OpenTelemetry: auto, where OTEL_EXPORTER_OTLP_ENDPOINT is set, on,"
        " or off.",
        validate.OneOf((AUTO, ON, OFF)),
    )
    trace_inferences: float = setting(
        0.01,
        "The share of inferences that are traced, of those that come without a trace of their own, from 0 to"
        " 1.",
        _SHARE,
    )
    metrics: str = setting(
        "token",
        "Who may read /metrics: token, who has one of any role, or open, anybody.",
        validate.OneOf(("token", "open")),
    )
    jwt_audience: str = setting("loadledger", "The aud that tokens must name.", _printable)
    jwt_issuer: str | None = setting(
        None, "The iss that tokens must name; unset, it is not looked at.", _printable
    )
    jwt_keys: Path | None = field(
        default=None,
        metadata={
            "help": "Public key (PEM) or JWKS file of an identity provider, used instead of our own keys."
        },
    )
    jwt_roles_claim: str = setting(
        "roles", "The claim that lists the roles; a path like realm_access.roles is followed.", _printable
    )
    limit_management: str = setting("600/minute", "Loads and unloads per subject, or off.", _LIMIT)
    limit_inference: str = setting("600000/minute", "Inferences per subject, or off.", _LIMIT)
    limit_reads: str = setting("6000/minute", "Other requests per subject, or off.", _LIMIT)
    limit_auth_failures: str = setting("30/minute", "Refused credentials per peer address, or off.", _LIMIT)

    def max_loads(self) -> int:
        """Return how many loads may run at once, with 0 resolved to the cores this process may use."""
        return self.loads_at_once or len(os.sched_getaffinity(0))

    def prepared_bytes(self) -> int:
        """Return how many bytes prepared models may take."""
        return parse_size(self.prepared_size)

    def proxies(self) -> Proxies:
        """Return whom to believe when they say for whom a request is."""
        trusted = () if self.trusted_proxies is None else parse_networks(self.trusted_proxies)
        return Proxies(trusted, self.forwarded_header)


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of the configuration as people meet it.

    Attributes:
        name: the field's name, and the key in the file.
        help: what it is for.
        kind: `str`, `int`, `float` or `Path`.
        required: whether it has to be given.
        default: None where there is none.
        validator: raises `ValidationError` for a value that is not valid; None where each is.
    """

    name: str
    help: str
    kind: type
    required: bool
    default: Any
    validator: Validator | None

    @property
    def flag(self) -> str:
        """The option, such as `--port`."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable, such as `LOADLEDGER_PORT`."""
        return PREFIX + self.name.upper()


def settings() -> tuple[Setting, ...]:
    """Return all settings, in the order of `Config`."""
    return tuple(map(_described, dataclasses.fields(Config)))


def _described(entry: "dataclasses.Field[Any]") -> Setting:
    kind = (get_args(entry.type) or (entry.type,))[0]  # of `Path | None` the path
    required = entry.default is dataclasses.MISSING
    return Setting(
        name=entry.name,
        help=entry.metadata["help"],
        kind=kind,
        required=required,
        default=None if required else entry.default,
        validator=_PATH if kind is Path else entry.metadata["validator"],
    )
