"""The settings of a server: purpose, default and valid values of each, and what their texts mean.

The options of `serve` and `check` and the table in the documentation are generated from `Config`;
`server.configsources` reads the values.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args
from urllib.parse import urlsplit

from marshmallow import ValidationError, validate
from msgspec import Struct

from features.devices.names import ALL_DEVICES, ANY, CPU, DEVICE, DEVICE_RULE, MAX_DEVICES
from features.grpc.gatewaywire import gateway_bytes
from features.rules import LoadPolicy
from runtime.memory import MemoryLimit
from runtime.memoryplan import OBSERVED_BYTES, MemoryPlan, plan_memory
from runtime.timeouts import DRAIN_TIMEOUT_S, INFERENCE_GRACE_S, PROGRESS_TIMEOUT_S
from runtime.uploads.staging import UploadPolicy, Writable
from runtime.wire import MAX_REQUEST_BYTES
from server.auth.proxies import Proxies, parse_networks

PREFIX = "LOADLEDGER_"
"""Of the settings' environment variables."""

FOLDERS = "~/.local/share/loadledger"
"""Where a user's own directories are, as the XDG base directory specification has it by default."""
MAX_TIMEOUT_S = 3600
"""Also the longest timeout that a request may choose."""
MAX_KEEP_ALIVE_S = 365 * 86400
"""A year; for longer there is -1, which means never."""
MAX_THREADS = 1024
"""Of a model: more than most machines have cores."""
MANY = 1_000_000
"""Upper limit of counts: catches typing errors, limits nothing real."""

Validator = Callable[[Any], object]

AUTO = "auto"
ON = "on"
OFF = "off"
OWN = "own"
ALL = "all"
NONE = "none"
_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"(\d{1,18})(MB|GB|TB|MiB|GiB|TiB|)", re.ASCII)
SIZES = "bytes, or a number of MB, GB, TB, MiB, GiB or TiB"
"""The notations of a size, for messages and help."""
_PERCENTAGE = re.compile(r"(\d{1,3}(?:\.\d{1,9})?)%", re.ASCII)
_PERIODS_S = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
_RATE = re.compile(
    r"([1-9]\d{0,11}) *(?:/|per) *([1-9]\d{0,5})? *(second|minute|hour|day)s?", re.ASCII | re.IGNORECASE
)

NODE_ATTRIBUTE = re.compile(r"[A-Za-z0-9._-]{1,63}=[A-Za-z0-9._-]{1,63}", re.ASCII)
"""An attribute of a node, which loads may require."""
NODE_ATTRIBUTE_RULE = (
    "Must be like zone=a: letters, digits, '.', '_' and '-', at most 63 before and after '='."
)
MAX_NODE_ATTRIBUTES = 16
"""That a load may require: its event has them."""

NOT_SHARED = (
    "nodes have to know which of them have a version: start all with --repository-writable=on if the"
    " repository is one folder that they share, with --repository-writable=own if each has its own"
)

DATABASE_SCHEMES = ("postgresql", "postgres")
"""The schemes of a database's address."""


def parse_size(text: str, instead: str = "") -> int:
    """Return the bytes of a size: bytes, or a whole number of MB, GB, TB, MiB, GiB or TiB.

    Args:
        text: the size.
        instead: what to do for none at all, for the message.

    Raises:
        ValueError: the text is no size or 0; the message says what it must be.
    """
    found = _SIZE.fullmatch(text)
    size = 0 if found is None else int(found[1]) * _UNITS[found[2]]
    if not size:
        raise ValueError(f"Must be {SIZES}, whole and more than 0, like 20GB{instead}.")
    return size


def parse_store_size(text: str) -> int | None:
    """Return the bytes of the store's size; None for auto, 0 for off. Raises as `parse_size`."""
    if text in (AUTO, OFF):
        return None if text == AUTO else 0
    return parse_size(text, f", {AUTO}, or {OFF}")


def parse_request_size(text: str) -> int:
    """Return the most bytes of a request, at most what a worker takes. Raises as `parse_size`."""
    size = parse_size(text)
    if size > MAX_REQUEST_BYTES:
        raise ValueError("Must be at most 2GiB.")
    return size


def parse_budget(text: str, limit_bytes: int) -> int:
    """Return the memory budget of all workers in bytes, at least 1.

    Args:
        text: a size, even above the limit (there may be swap), or a percentage of the limit, more than 0 and
            at most 100.
        limit_bytes: the memory that this container or machine may use.

    Raises:
        ValueError: the text is neither; the message says what it must be.
    """
    if not text.endswith("%"):
        return parse_size(text, ", or a percentage, like 80%")
    found = _PERCENTAGE.fullmatch(text)
    if found is None or not 0 < (percent := Decimal(found[1])) <= 100:  # noqa: PLR2004 - it is per cent
        raise ValueError("Must be a percentage of more than 0 and at most 100, like 80%.")
    return max(1, int(limit_bytes * percent / 100))


def parse_memory_budget(text: str, limit_bytes: int) -> int | None:
    """Return the memory budget of all workers; None for auto. For arguments and errors see `parse_budget`."""
    return None if text == AUTO else parse_budget(text, limit_bytes)


class RateLimit(NamedTuple):
    """Requests per window, and the window's length in seconds."""

    amount: int
    window_s: int


def parse_limit(text: str) -> RateLimit | None:
    """Return a rate limit, like 600/minute or 20 per 5 minutes; None for off.

    Raises:
        ValueError: the text is neither; the message says what it must be.
    """
    if text == OFF:
        return None
    found = _RATE.fullmatch(text)
    if found is None:
        raise ValueError(f"Must be one limit like 600/minute, or {OFF}.")
    return RateLimit(int(found[1]), int(found[2] or 1) * _PERIODS_S[found[3].lower()])


def parse_ledger(text: str) -> str:
    """Return the address of a ledger's database.

    Raises:
        ValueError: the text is no such address; the message says what it must be.
    """
    try:
        parts = urlsplit(text)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in DATABASE_SCHEMES or len(parts.path) < len("/x"):
        raise ValueError("Must be like postgresql://USER@HOST/DATABASE; the password may be in PGPASSWORD.")
    return text


def parse_node_address(text: str) -> str:
    """Return the URL of a node.

    Raises:
        ValueError: the text is none; the message says what it must be.
    """
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path.strip("/") or parts.query:
        raise ValueError("Must be like http://HOST:PORT, without a path.")
    return text


def parse_node_attributes(text: str) -> tuple[str, ...]:
    """Return attributes in order, each once.

    Raises:
        ValueError: one is not of the form; the message says what it must be.
    """
    attributes = [each.strip() for each in text.split(",") if each.strip()]
    if not attributes or not all(NODE_ATTRIBUTE.fullmatch(each) for each in attributes):
        raise ValueError(f"{NODE_ATTRIBUTE_RULE} Several are separated by commas.")
    return tuple(sorted(set(attributes)))


def parse_devices(text: str) -> tuple[str, ...]:
    """Return the names of devices in a list like `cuda:*,cpu`.

    Raises:
        ValueError: it has other names, or none.
    """
    names = tuple(dict.fromkeys(text.split(",")))
    if not all(map(DEVICE.fullmatch, names)) or len(names) > MAX_DEVICES:
        raise ValueError(f"{DEVICE_RULE} Several are separated by commas.")
    return names


def parse_visible_devices(text: str) -> tuple[str, ...]:
    """Return the names of devices in a list like `cuda:1,openvino:*`, all, or none.

    Raises:
        ValueError: it is neither.
    """
    if text in (ALL, NONE):
        return ALL_DEVICES if text == ALL else ()
    try:
        return parse_devices(text)
    except ValueError as error:
        raise ValueError(f"{error} Or {ALL}, or {NONE}.") from None


def parse_device_memory(text: str) -> Mapping[str, str]:
    """Return the memory budget by device of a list like `cuda:0=20GB,cuda:1=50%`.

    Raises:
        ValueError: it is not of the form.
    """
    found = dict[str, str]()
    for each in text.split(","):
        device, _, budget = each.partition("=")
        if not DEVICE.fullmatch(device) or device == CPU or ANY in device or device in found:
            raise ValueError("Must be like cuda:0=20GB,cuda:1=50%, with each device once, and without cpu.")
        parse_budget(budget, limit_bytes=1)
        found[device] = budget
    return found


class ConfigError(Exception):
    """Settings are missing or invalid; each line says which setting, why and what to do."""


def _validator_of(parse: Callable[[str], object]) -> Validator:
    def validator(text: str) -> None:
        try:
            parse(text)
        except ValueError as error:
            raise ValidationError(str(error)) from None

    return validator


def _check_printable(text: str) -> None:
    if not text.strip() or not text.isprintable():
        raise ValidationError("Must be printable and not empty.")


_SECONDS = validate.Range(0, MAX_TIMEOUT_S)
_POSITIVE_SECONDS = validate.Range(0, MAX_TIMEOUT_S, min_inclusive=False)
_SWITCH = validate.OneOf((ON, OFF))
_LIMIT = _validator_of(parse_limit)
_NODE_NAME = validate.Regexp(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z", error="Must be letters, digits, '.', '_' and '-', at most 63."
)
_PATH = validate.Regexp("[^~]", error="Must name a path in full: ~ is not expanded.")
"""A shell does not expand the ~ of --data=~/ledger; a folder named ~ would be created."""


def setting(
    default: Any, help_text: str, validator: Validator | None = None, *, section: str | None = None
) -> Any:
    """Return an optional field of the configuration; `section` begins one of `SECTIONS`."""
    return field(default=default, metadata={"help": help_text, "validator": validator, "section": section})


def own_folder(name: str, help_text: str, *, section: str | None = None) -> Any:
    """Return a field for a directory; a user's own is `name` in `default_folder`."""
    return field(metadata={"help": help_text, "folder": name, "section": section})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The settings of one server. Nothing here reads the environment or files."""

    repository: Path = own_folder(
        "models", "Directory of models, as MODEL/VERSION/model.onnx.", section="Files and address"
    )
    data: Path = own_folder("data", "Directory of the ledger and the keys; created when it is missing.")
    host: str = setting("127.0.0.1", "Address to listen on.", _check_printable)
    port: int = setting(8080, "Port to listen on; 0 picks a free one.", validate.Range(0, 65535))

    grpc_port: int | None = setting(
        None,
        "Port for gRPC, at the same address and with the same certificate; 0 picks a free one. If unset,"
        " there is no gRPC.",
        validate.Range(0, 65535),
    )

    ledger: str | None = setting(
        None,
        "PostgreSQL database of the ledger, like postgresql://USER@HOST/DATABASE; the data directory then"
        " has a replica. If unset, the ledger is a file there.",
        _validator_of(parse_ledger),
        section="Several machines",
    )
    node_name: str | None = setting(
        None, "Name of this node among those of the --ledger; if unset, the host's name.", _NODE_NAME
    )
    node_address: str | None = setting(
        None,
        "URL at which the other nodes reach this one; if unset, that of the host's name and --port.",
        _validator_of(parse_node_address),
    )
    node_attributes: str | None = setting(
        None,
        "Attributes of this node, which loads may require, like zone=a,gpu=none.",
        _validator_of(parse_node_attributes),
    )
    lease_s: float = setting(
        10.0,
        "Seconds without a sign of life after which this node is lost, and its models are loaded elsewhere.",
        validate.Range(1, MAX_TIMEOUT_S),
    )
    when_away: str = setting(
        "serve",
        "When the ledger's database cannot be reached: serve (go on answering with what is loaded, for 10"
        " min), or stop.",
        validate.OneOf(("serve", "stop")),
    )

    memory_budget: str = setting(
        AUTO,
        "Memory for all workers together: auto is 80% of the container's or machine's memory, or less where"
        f" requests and the server leave less. Or a percentage, {SIZES}.",
        _validator_of(lambda text: parse_memory_budget(text, limit_bytes=1)),
        section="Memory and what is loaded",
    )
    max_loaded: int = setting(
        0, "Models that may be loaded at the same time; 0 means no limit.", validate.Range(0, MANY)
    )
    devices: str = setting(
        CPU,
        "Devices of each model, unless its load says otherwise: cpu, or a list like cuda:*,cpu, of which a"
        " load takes the first that has room.",
        _validator_of(parse_devices),
    )
    visible_devices: str = setting(
        ALL,
        "Devices of the machine that this server uses beside the CPU: all, none, or a list like"
        " cuda:1,openvino:*. The code of other execution providers is not run.",
        _validator_of(parse_visible_devices),
    )
    device_memory: str | None = setting(
        None,
        "Memory for all workers on a device, like cuda:0=20GB,cuda:1=50%: of its own memory, or of what its"
        " workers take of the machine's. If unset, 90% of a device's own memory.",
        _validator_of(parse_device_memory),
    )
    evict: str = setting(
        OFF,
        "Evict idle models when a load needs room, and with on_demand also busy ones after their turn: idle,"
        " or off.",
        validate.OneOf((OFF, "idle")),
    )
    min_residency_s: float = setting(10.0, "Seconds after its load before a model may be evicted.", _SECONDS)
    keep_alive_s: int = setting(
        -1,
        "Idle seconds after which a model is unloaded, unless its load says otherwise; -1 is never, 0 is"
        " directly after its last request.",
        validate.Range(-1, MAX_KEEP_ALIVE_S),
    )
    on_demand: str = setting(
        OFF, "Load a model when an inference needs it; the inference waits: on, or off.", _SWITCH
    )
    restore: str = setting(
        "all",
        "Models to reload at start, of those that were loaded when the server ended: all, or none.",
        validate.OneOf(("all", "none")),
    )

    threads: int = setting(
        0,
        "Threads of each model, unless its load says otherwise; 0 means as many as the server may use: its"
        " CPU affinity and the container's CPU quota.",
        validate.Range(0, MAX_THREADS),
        section="Loads and inferences",
    )
    drain_timeout_s: float = setting(
        DRAIN_TIMEOUT_S, "Seconds that an unload waits for running inferences.", _SECONDS
    )
    inference_timeout_s: float = setting(60.0, "Seconds that one inference may take.", _POSITIVE_SECONDS)
    max_request_size: str = setting(  # Triton's default (`--http-max-input-size`)
        "64MiB",
        f"Largest request of an inference, also after decompression: {SIZES}; at most 2GiB. Requests and"
        " answers may hold sixteen times as much memory at once, and at least 1 GiB; in a small container an"
        " eighth of its memory, and at least twice as much as the largest request.",
        _validator_of(parse_request_size),
    )

    store_size: str = setting(
        AUTO,
        "Disk space for the private copies that models are loaded from; the least recently used are deleted"
        f" first: auto, which leaves a tenth of the file system free, {SIZES}; or off, which loads from the"
        " repository: then nobody may ever change a file there.",
        _validator_of(parse_store_size),
        section="Files of models, and confinement",
    )
    repository_writable: str = setting(
        AUTO,
        "Whether callers with the role admin may add and remove versions: auto (if the repository's folder"
        " belongs to the server's user, and there is no --ledger), on, off, or own, if each node has a"
        " repository of its own.",
        validate.OneOf((AUTO, ON, OFF, OWN)),
    )
    confine: str = setting(
        AUTO,
        "Confine workers with Landlock and seccomp: auto (as far as the kernel can), require (or do not"
        " start, and load nothing on devices, whose workers are confined less), require-cpu (the same, but"
        " load on devices), or off.",
        validate.OneOf((AUTO, "require", "require-cpu", OFF)),
    )
    ledger_stderr: str = setting(
        ON,
        "Record what a worker printed before it died, which may hold inputs of clients: on, or off, which"
        " writes it to the server's log only.",
        _SWITCH,
    )

    jwt_audience: str = setting(
        "loadledger", "Value of aud that tokens must have.", _check_printable, section="Tokens"
    )
    jwt_issuer: str | None = setting(
        None, "Value of iss that tokens must have; if unset, iss is not checked.", _check_printable
    )
    jwt_keys: Path | None = setting(
        None, "Public key (PEM) or JWKS file of an identity provider, used instead of our own keys."
    )
    jwt_roles_claim: str = setting(
        "roles", "Claim that lists the roles; may be a path like realm_access.roles.", _check_printable
    )

    tls_cert: Path | None = setting(
        None,
        "Certificate (PEM, with its chain) for HTTPS; reloaded when the file changes.",
        section="Connections, TLS and proxies",
    )
    tls_key: Path | None = setting(
        None, "The certificate's private key (PEM, not encrypted, mode 0600 or 0640)."
    )
    trusted_proxies: str | None = setting(
        None,
        "Trusted proxies, whose X-Forwarded-For names the client: addresses or networks, with commas.",
        _validator_of(parse_networks),
    )
    idle_timeout_s: float = setting(
        75.0,
        "Seconds that an idle connection is kept open; must be more than a proxy in front keeps it.",
        _POSITIVE_SECONDS,
    )

    limit_management: str = setting(
        "600/minute", "Loads and unloads per subject, or off.", _LIMIT, section="Rate limits"
    )
    limit_inference: str = setting("600000/minute", "Inferences per subject, or off.", _LIMIT)

    log_format: str = setting(
        "text",
        "Form of log lines: text, or json.",
        validate.OneOf(("text", "json")),
        section="Logs, traces and metrics",
    )
    log_level: str = setting(
        "info",
        "Lowest level of log lines: debug, info, warning, or error.",
        validate.OneOf(("debug", "info", "warning", "error")),
    )
    trace_inferences: float = setting(
        0.01,
        "Share of inferences without a trace of their own that are traced, from 0 to 1.",
        validate.Range(0, 1),
    )
    metrics: str = setting(
        "token",
        "Access to /metrics: token (of any role), or open (no token).",
        validate.OneOf(("token", "open")),
    )

    policy: LoadPolicy = field(default_factory=LoadPolicy)
    """The rules for loads; the tables of the file have them, and no option."""
    tables: Mapping[str, tuple[Struct, ...]] = field(default_factory=dict)
    """Further tables of the file, by name, for the features that have them (`features.policyfile`)."""

    # Limits whose best value is known: constants for users, which tests make shorter.
    loads_at_once: int = 0
    """Models that load at the same time; 0 is one for each CPU that the server may use."""
    timeout_s: int = 300
    """Of a load, waiting included, unless its request or its loadledger.toml says otherwise."""
    progress_timeout_s: int = PROGRESS_TIMEOUT_S
    inference_grace_s: float = INFERENCE_GRACE_S
    inference_queue: int = 1024
    """Inferences of one model that may be queued or running, unless its load has a `max_queue`. More
    would wait longer than clients do."""
    max_connections: int = 10_000
    """Open at the same time; at most three quarters of the process's file descriptors."""
    head_timeout_s: float = 10.0
    """In which the head of a request must arrive; on a new connection, counted from its start."""
    max_upload_bytes: int = 20 * 10**9
    """Of a version that a caller adds; larger ones are put into the repository's folder."""
    limit_auth_failures: str = "30/minute"
    """Refused credentials per peer address."""
    limit_reads: str = "6000/minute"
    """Other requests per subject: 100 a second, which no page of the console and few scripts reach."""
    streams_per_subject: int = 20
    """Streams of events that one subject may have open: the windows of a person, and some programs."""

    @property
    def default_devices(self) -> tuple[str, ...]:
        return parse_devices(self.devices)

    @property
    def visible_device_names(self) -> tuple[str, ...]:
        return parse_visible_devices(self.visible_devices)

    @property
    def device_budgets(self) -> Mapping[str, str]:
        return {} if self.device_memory is None else parse_device_memory(self.device_memory)

    def max_loads(self, cpus: int) -> int:
        return self.loads_at_once or cpus

    def model_threads(self, cpus: int) -> int:
        return self.threads or cpus

    @property
    def max_request_bytes(self) -> int:
        return parse_request_size(self.max_request_size)

    def plan_memory(self, limit: MemoryLimit) -> MemoryPlan:
        """Return what the parts of the server may take of the container's or machine's memory."""
        budget, largest = parse_memory_budget(self.memory_budget, limit.bytes), self.max_request_bytes
        more = 0 if self.grpc_port is None else gateway_bytes(limit.bytes, largest)
        observed = OBSERVED_BYTES if "record" in self.tables else 0
        return plan_memory(limit, budget, largest, more + observed)

    @property
    def loads_for_inferences(self) -> bool:
        return self.on_demand == ON

    @property
    def has_store(self) -> bool:
        return self.store_size != OFF

    def store_bytes(self) -> int | None:
        """Return how many bytes the store may take; None leaves a tenth of the file system free."""
        return parse_store_size(self.store_size)

    def upload_policy(self) -> UploadPolicy:
        return UploadPolicy(
            cast("Writable", self.repository_writable),
            is_immutable=not self.has_store,
            unshared=NOT_SHARED if self.ledger is not None and self.repository_writable == AUTO else "",
            max_bytes=self.max_upload_bytes,
        )

    def proxies(self) -> Proxies:
        trusted = () if self.trusted_proxies is None else parse_networks(self.trusted_proxies)
        return Proxies(trusted)


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of the configuration, with its option and variable; the name is the key in the file.

    Attributes:
        folder: name of the user's own directory, for a setting whose default it is.
        default: as it is shown.
    """

    name: str
    help: str
    kind: type
    folder: str | None
    default: Any
    validator: Validator | None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()


def settings() -> tuple[Setting, ...]:
    return tuple(_describe_setting(each) for each in dataclasses.fields(Config) if "help" in each.metadata)


def _describe_setting(entry: "dataclasses.Field[Any]") -> Setting:
    kind = (get_args(entry.type) or (entry.type,))[0]  # of `Path | None` the path
    folder = entry.metadata.get("folder")
    return Setting(
        name=entry.name,
        help=entry.metadata["help"],
        kind=kind,
        folder=folder,
        default=f"{FOLDERS}/{folder}" if folder is not None else entry.default,
        validator=_PATH if kind is Path else entry.metadata["validator"],
    )


def _find_sections() -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    title = ""
    for entry in dataclasses.fields(Config):
        if "help" in entry.metadata:
            title = entry.metadata["section"] or title
            sections.setdefault(title, []).append(entry.name)
    return sections


SECTIONS: Mapping[str, Sequence[str]] = _find_sections()
"""The settings by what they are about, as the help and the documentation list them."""
