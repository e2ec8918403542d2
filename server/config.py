"""The one configuration: what can be set, by which flag and variable, and what is a valid value.

Whatever shows settings to people (options of the command, the table in docs/) is generated from here.
"""

import dataclasses
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marshmallow import validate

from server.auth.keyring import read_public_keys
from server.auth.keys import KeyProblem
from server.auth.proxies import FORWARDED, X_FORWARDED_FOR, Proxies, parse_networks
from server.configfile import read_config_file
from server.connections.tls import TlsProblem, load_context
from server.settingchecks import (
    MAX_TIMEOUT_S,
    OFF,
    check_budget,
    check_limit,
    check_networks,
    check_seconds,
    check_share,
    check_size,
    check_some_seconds,
    check_text,
)
from server.settings import (
    ConfigError,
    MappingEnv,
    Setting,
    about,
    checked,
    described,
    read,
    size_bytes,
)

AUTO = "auto"
ON = "on"
MAX_KEEP_ALIVE_S = 365 * 86400  # a year: whoever wants more means never, which is -1
CONFIG_VARIABLE = "LOADLEDGER_CONFIG"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How one server runs. Paths are as given; nothing here touches the file system."""

    repository: Path = field(metadata=about("Directory of models, as MODEL/VERSION/model.onnx.", kind=Path))
    data: Path = field(
        metadata=about("Directory of the ledger and the keys; created when it is missing.", kind=Path)
    )
    host: str = field(default="127.0.0.1", metadata=about("Address to listen on.", check=check_text))
    port: int = field(
        default=8080,
        metadata=about("Port to listen on; 0 picks a free one.", kind=int, check=validate.Range(0, 65535)),
    )
    tls_cert: Path | None = field(
        default=None,
        metadata=about(
            "Certificate (PEM, with its chain) to serve HTTPS with; read again when it changes.", kind=Path
        ),
    )
    tls_key: Path | None = field(
        default=None,
        metadata=about("The certificate's private key (PEM, not encrypted, mode 0600 or 0640).", kind=Path),
    )
    trusted_proxies: str | None = field(
        default=None,
        metadata=about(
            "Addresses or networks of proxies, with commas between, that are believed when they say for whom"
            " a request is.",
            check=check_networks,
        ),
    )
    forwarded_header: str = field(
        default=X_FORWARDED_FOR,
        metadata=about(
            "In which header field they say so: x-forwarded-for, or forwarded (RFC 7239).",
            check=validate.OneOf((X_FORWARDED_FOR, FORWARDED)),
        ),
    )
    loads_at_once: int = field(
        default=0,
        metadata=about(
            "How many models may load at the same time; 0 means as many as there are cores.",
            kind=int,
            check=validate.Range(0, 1024),
        ),
    )
    threads: int = field(
        default=1,
        metadata=about("Threads that one model computes with.", kind=int, check=validate.Range(1, 1024)),
    )
    drain_timeout_s: float = field(
        default=30.0,
        metadata=about(
            "How long an unload waits for running inferences.",
            kind=float,
            check=check_seconds,
        ),
    )
    inference_timeout_s: float = field(
        default=60.0,
        metadata=about(
            "How long one inference may take.",
            kind=float,
            check=check_some_seconds,
        ),
    )
    inference_grace_s: float = field(
        default=5.0,
        metadata=about(
            "How long an inference that was told to stop may go on before its worker is killed.",
            kind=float,
            check=check_some_seconds,
        ),
    )
    inference_queue: int = field(
        default=1024,
        metadata=about(
            "How many inferences of one model may be queued or running.",
            kind=int,
            check=validate.Range(1, 1_000_000),
        ),
    )
    timeout_s: int = field(
        default=300,
        metadata=about(
            "How long a load may take, waiting included, when its request does not say.",
            kind=int,
            check=validate.Range(1, MAX_TIMEOUT_S),
        ),
    )
    memory_budget: str = field(
        default="80%",
        metadata=about(
            "Memory that workers may take together: bytes, or a percentage of what this container or machine"
            " may use.",
            check=check_budget,
        ),
    )
    max_loaded: int = field(
        default=0,
        metadata=about(
            "How many models may be loaded at once; 0 means no limit.",
            kind=int,
            check=validate.Range(0, 1_000_000),
        ),
    )
    evict: str = field(
        default=OFF,
        metadata=about(
            "Whether a load that needs room unloads the least recently used idle models: idle, or off.",
            check=validate.OneOf((OFF, "idle")),
        ),
    )
    min_residency_s: float = field(
        default=10.0,
        metadata=about(
            "How long a model stays after it was loaded before it may be evicted.",
            kind=float,
            check=check_seconds,
        ),
    )
    keep_alive_s: int = field(
        default=-1,
        metadata=about(
            "After how many idle seconds a model is unloaded, when its load does not say; -1 is never, 0 is"
            " right after its last request.",
            kind=int,
            check=validate.Range(-1, MAX_KEEP_ALIVE_S),
        ),
    )
    strategy: str = field(
        default="beside",
        metadata=about(
            "How a new version takes the place of the old one, when its load does not say: beside, in_place,"
            " or auto.",
            check=validate.OneOf(("beside", "in_place", "auto")),
        ),
    )
    on_demand: str = field(
        default=OFF,
        metadata=about(
            "Whether an inference for a model that is not loaded requests its load and waits: on, or off.",
            check=validate.OneOf((ON, OFF)),
        ),
    )
    warm_up: str = field(
        default=ON,
        metadata=about(
            "Whether a model runs once before it gets requests, when its loadledger.toml does not say: on, or"
            " off.",
            check=validate.OneOf((ON, OFF)),
        ),
    )
    prepare: str = field(
        default=ON,
        metadata=about(
            "Whether models that were loaded are prepared in the background, so as to load faster later: on,"
            " or off, which does not use what was prepared either.",
            check=validate.OneOf((ON, OFF)),
        ),
    )
    prepared_size: str = field(
        default="20GB",
        metadata=about(
            "Disk space that prepared models may take, the least recently used of which go first: bytes, or a"
            " number of MB, GB, TB, MiB, GiB or TiB.",
            check=check_size,
        ),
    )
    huge_pages: str = field(
        default=AUTO,
        metadata=about(
            "Whether workers use huge pages for memory: auto, where they make loading faster, or off.",
            check=validate.OneOf((AUTO, OFF)),
        ),
    )
    restore: str = field(
        default="all",
        metadata=about(
            "What is loaded again at start of what was loaded when the server ended: all, or none.",
            check=validate.OneOf(("all", "none")),
        ),
    )
    streams_per_subject: int = field(
        default=20,
        metadata=about(
            "How many streams of events one subject may have open.",
            kind=int,
            check=validate.Range(1, 1_000_000),
        ),
    )
    max_connections: int = field(
        default=10_000,
        metadata=about(
            "How many connections may be open at once; three quarters of the file descriptors that the"
            " process may have, if that is less.",
            kind=int,
            check=validate.Range(1, 1_000_000),
        ),
    )
    max_connections_per_address: int = field(
        default=0,
        metadata=about(
            "How many of them may be of one peer address, trusted proxies and this machine apart; 0 means no"
            " limit.",
            kind=int,
            check=validate.Range(0, 1_000_000),
        ),
    )
    head_timeout_s: float = field(
        default=10.0,
        metadata=about(
            "How long the head of a request may take to arrive, on a new connection from its first moment.",
            kind=float,
            check=check_some_seconds,
        ),
    )
    idle_timeout_s: float = field(
        default=75.0,
        metadata=about(
            "How long a connection is kept between two requests; more than a proxy in front keeps it.",
            kind=float,
            check=check_some_seconds,
        ),
    )
    log_format: str = field(
        default="text",
        metadata=about(
            "How log lines are written: text, for people, or json.", check=validate.OneOf(("text", "json"))
        ),
    )
    log_level: str = field(
        default="info",
        metadata=about(
            "From which level on log lines are written: debug, info, warning, or error.",
            check=validate.OneOf(("debug", "info", "warning", "error")),
        ),
    )
    log_inferences: float = field(
        default=0.0,
        metadata=about(
            "The share of inferences that have a log line each, from 0, none, to 1, all.",
            kind=float,
            check=check_share,
        ),
    )
    otel: str = field(
        default=AUTO,
        metadata=about(
            "Whether traces are exported with OpenTelemetry: auto, where OTEL_EXPORTER_OTLP_ENDPOINT is set,"
            " on, or off.",
            check=validate.OneOf((AUTO, ON, OFF)),
        ),
    )
    trace_inferences: float = field(
        default=0.01,
        metadata=about(
            "The share of inferences that are traced, of those that come without a trace of their own, from 0"
            " to 1.",
            kind=float,
            check=check_share,
        ),
    )
    metrics: str = field(
        default="token",
        metadata=about(
            "Who may read /metrics: token, who has one of any role, or open, anybody.",
            check=validate.OneOf(("token", "open")),
        ),
    )
    jwt_audience: str = field(
        default="loadledger", metadata=about("The aud that tokens must name.", check=check_text)
    )
    jwt_issuer: str | None = field(
        default=None,
        metadata=about("The iss that tokens must name; unset, it is not looked at.", check=check_text),
    )
    jwt_keys: Path | None = field(
        default=None,
        metadata=about(
            "Public key (PEM) or JWKS file of an identity provider, used instead of our own keys.", kind=Path
        ),
    )
    jwt_roles_claim: str = field(
        default="roles",
        metadata=about(
            "The claim that lists the roles; a path like realm_access.roles is followed.", check=check_text
        ),
    )
    limit_management: str = field(
        default="600/minute", metadata=about("Loads and unloads per subject, or off.", check=check_limit)
    )
    limit_inference: str = field(
        default="600000/minute", metadata=about("Inferences per subject, or off.", check=check_limit)
    )
    limit_reads: str = field(
        default="6000/minute", metadata=about("Other requests per subject, or off.", check=check_limit)
    )
    limit_auth_failures: str = field(
        default="30/minute",
        metadata=about("Refused credentials per peer address, or off.", check=check_limit),
    )

    def __post_init__(self) -> None:
        for setting in settings():
            value = getattr(self, setting.name)
            if value is not None and setting.check is not None:
                checked(setting, value)
        if (self.tls_cert is None) != (self.tls_key is None):
            given = "--tls-key" if self.tls_cert is None else "--tls-cert"
            raise ConfigError(f"{given} is given alone: HTTPS takes both --tls-cert and --tls-key")

    def max_loads(self) -> int:
        """Return how many loads may run at once, with 0 resolved to the cores this process may use."""
        return self.loads_at_once or len(os.sched_getaffinity(0))

    def prepared_bytes(self) -> int:
        """Return how many bytes prepared models may take."""
        return size_bytes(self.prepared_size)

    def proxies(self) -> Proxies:
        """Return whom to believe when they say for whom a request is."""
        trusted = () if self.trusted_proxies is None else parse_networks(self.trusted_proxies)
        return Proxies(trusted, self.forwarded_header)


def settings() -> tuple[Setting, ...]:
    """Return all settings, in the order of `Config`."""
    return tuple(described(entry) for entry in dataclasses.fields(Config))


def load_config(flags: Mapping[str, object], environment: Mapping[str, str]) -> Config:
    """Read the whole configuration: flags before environment before file before defaults.

    Args:
        flags: by field name; None is unset. `config` names the file.
        environment: LOADLEDGER_CONFIG names the file, unless the flag does.

    Raises:
        ConfigError: naming the option and the variable, or the file and the line.
    """
    return Config(**read_settings([setting.name for setting in settings()], flags, environment))


def read_settings(
    names: Collection[str], flags: Mapping[str, object], environment: Mapping[str, str]
) -> dict[str, Any]:
    """Read only some settings, for a command that needs no others.

    Raises:
        ConfigError: naming the option and the variable, or the file and the line.
    """
    env, file = MappingEnv(environment), file_values(flags, environment)
    return {setting.name: read(setting, flags, env, file) for setting in settings() if setting.name in names}


def file_values(flags: Mapping[str, object], environment: Mapping[str, str]) -> Mapping[str, Any]:
    """Return what the configuration file gives, by the settings' names; nothing if none is named.

    Raises:
        ConfigError: naming the file, and the line where it can.
    """
    given = flags.get("config")
    path = environment.get(CONFIG_VARIABLE) if given is None else str(given)
    if path is None:
        return {}
    if not path:
        raise ConfigError(f"--config (or {CONFIG_VARIABLE}) names no file; correct or unset it")
    return read_config_file(Path(path), {setting.name: setting for setting in settings()})


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
    if config.tls_cert is not None and config.tls_key is not None:
        try:
            load_context(config.tls_cert, config.tls_key)
        except TlsProblem as error:
            raise ConfigError(f"--tls-cert, --tls-key: {error}") from None
