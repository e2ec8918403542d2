"""Which server does a command talk to? Options, variables, profiles, `loadledger login`, and the client.

A profile is a TOML file with `url`, `token` and `ca`, by default `~/.config/loadledger/profile.toml`. As it
holds a token, a profile that others may read is refused, and the token goes to the profile's URL only.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import click

from loadledger.cli.output import INTERRUPTED, exit_with_error, to_printable

URL = "LOADLEDGER_URL"
TOKEN = "LOADLEDGER_TOKEN"  # noqa: S105 -- the name of a variable
CA = "LOADLEDGER_CA"
PROFILE = "LOADLEDGER_PROFILE"
DEFAULT_URL = "http://127.0.0.1:8080"
DEFAULT_PROFILE = "profile"

MAX_PROFILE_BYTES = 64 * 1024
"""Three lines, one of which is a token."""
KNOWN = ("url", "token", "ca")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
UNAUTHENTICATED, FORBIDDEN = 401, 403
HINTS = {
    "unknown_model": "`loadledger models` lists them",
    "unknown_version": "`loadledger models MODEL` lists its versions",
    "unknown_job": "`loadledger jobs` lists them",
    "not_loaded": "`loadledger ps` lists loaded models",
    "nothing_loaded": "`loadledger ps` lists loaded models",
    "model_not_loaded": "`loadledger load MODEL --wait` loads it",
}
"""Advice by the server's error codes."""
Command = Callable[..., None]
json_option = click.option("--json", "as_json", is_flag=True, show_default=False, help="Print JSON.")
"""Adds `--json`, passed as `as_json`."""


class ProfileProblem(Exception):
    """The profile cannot be used."""


@dataclass(frozen=True, slots=True)
class ServerTarget:
    """The server that a command talks to; the content of a profile file.

    Attributes:
        ca: file of certificates to trust, in PEM; None is the system's.
    """

    url: str = DEFAULT_URL
    token: str | None = field(default=None, repr=False)
    ca: Path | None = None


def find_target(url: str | None, profile: str | None, environment: Mapping[str, str]) -> ServerTarget:
    """Find the server: by option, then variable, then profile, then the default URL.

    Raises:
        ProfileProblem: the profile does not exist, or cannot be used.
    """
    kept = _choose_target(profile, environment)
    chosen = url or environment.get(URL) or kept.url
    is_its_own = chosen.rstrip("/") == kept.url.rstrip("/")
    token = environment.get(TOKEN) or (kept.token if is_its_own else None)
    ca = environment.get(CA)
    return ServerTarget(chosen, token, Path(ca) if ca else kept.ca if is_its_own else None)


def profile_path(profile: str | None, environment: Mapping[str, str]) -> Path:
    """Return the path of a profile.

    Args:
        profile: a name, a path with a slash in it, or None for the default one.
        environment: gives the home and configuration folders.

    Raises:
        ProfileProblem: the name is invalid, or there is no home folder.
    """
    name = profile or environment.get(PROFILE) or DEFAULT_PROFILE
    if "/" in name:
        return Path(name)
    if not _NAME.fullmatch(name):
        raise ProfileProblem(f"{name[:64]!r} cannot name a profile: use letters, digits, and . _ - between")
    folder = _folder(environment)
    if folder is None:
        raise ProfileProblem("there is no HOME for profiles: give --profile a path, like ./mine.toml")
    return folder / f"{name}.toml"


def read_profile(path: Path) -> ServerTarget:
    """Read a profile file.

    Raises:
        FileNotFoundError: it does not exist.
        ProfileProblem: others may read it, or it is invalid.
    """
    try:
        text = _private_text(path)
        import tomllib  # noqa: PLC0415 - keeps commands quick that read none

        values = tomllib.loads(text)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ProfileProblem(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # its text may hold the token, so it is not repeated
        kind = "UTF-8" if isinstance(error, UnicodeDecodeError) else "TOML"
        raise ProfileProblem(f"{path} is not {kind}: write it again with `loadledger login`") from None
    unknown = sorted(values.keys() - set(KNOWN))
    if unknown:
        raise ProfileProblem(f"{path}: {unknown[0][:64]!r} is unknown: use {', '.join(KNOWN)}")
    wrong = [name for name, value in values.items() if not isinstance(value, str) or not value]
    if wrong:
        raise ProfileProblem(f'{path}: {wrong[0]} has to be a string, like {wrong[0]} = "…"')
    ca = values.get("ca")
    url, token = values.get("url", DEFAULT_URL), values.get("token")
    return ServerTarget(url, token, Path(ca).expanduser() if ca else None)


def write_profile(path: Path, profile: ServerTarget) -> None:
    """Write a private profile; an existing one is replaced atomically.

    Raises:
        OSError: it cannot be written.
    """
    values = {"url": profile.url, "token": profile.token, "ca": profile.ca and str(profile.ca)}
    text = "".join(
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items() if value
    )
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        new.replace(path)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise


def _choose_target(profile: str | None, environment: Mapping[str, str]) -> ServerTarget:
    """Return the content of the named profile, else of the default one if there is one."""
    is_named = profile or environment.get(PROFILE)
    if not is_named and _folder(environment) is None:
        return ServerTarget()
    path = profile_path(profile, environment)
    try:
        return read_profile(path)
    except FileNotFoundError:
        if is_named:
            raise ProfileProblem(f"there is no {path}; `loadledger login` creates one") from None
        return ServerTarget()


def _folder(environment: Mapping[str, str]) -> Path | None:
    """Return the configuration folder by the XDG base directory specification; it must be absolute."""
    given, home = environment.get("XDG_CONFIG_HOME", ""), environment.get("HOME", "")
    base = Path(given) if given.startswith("/") else Path(home) / ".config" if home else None
    return None if base is None else base / "loadledger"


def _private_text(path: Path) -> str:
    # O_NONBLOCK: the open of a FIFO would wait for ever.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ProfileProblem(f"{path} is not a regular file")
        if status.st_uid not in {os.geteuid(), 0}:
            raise ProfileProblem(f"{path} belongs to another user, who could redirect your token")
        if status.st_mode & 0o077:
            mode = f"{stat.S_IMODE(status.st_mode):04o}"
            raise ProfileProblem(
                f"{path} holds a token and others may access it (mode {mode}): chmod 600 {path}"
            )
        content = file.read(MAX_PROFILE_BYTES + 1)
    if len(content) > MAX_PROFILE_BYTES:
        raise ProfileProblem(f"{path} is no profile: it has more than {MAX_PROFILE_BYTES} bytes")
    return content.decode()


@dataclass(frozen=True, slots=True)
class ServerChoice:
    """The options that name a server."""

    url: str | None = None
    profile: str | None = None


def server_options(command: Command) -> Command:
    """Add `--url` and `--profile`, passed as `where`."""

    @wraps(command)
    def call(*arguments: Any, url: str | None, profile: str | None, **options: Any) -> None:
        command(*arguments, where=ServerChoice(url, profile), **options)

    with_profile = click.option(
        "--profile",
        metavar="NAME|FILE",
        help="Profile with URL and token, as `login` saves it. [LOADLEDGER_PROFILE]",
    )
    with_url = click.option(
        "--url", metavar="URL", help="Server, like http://127.0.0.1:8080. [LOADLEDGER_URL]"
    )
    return with_url(with_profile(call))


def open_chosen_client(where: ServerChoice, *, timeout_s: float = 30.0) -> AbstractContextManager[Any]:
    """Open a client of the server that the options name; problems end the command, as in `open_client`."""
    try:
        target = find_target(where.url, where.profile, os.environ)
    except ProfileProblem as problem:
        exit_with_error(str(problem))
    return open_client(target, timeout_s=timeout_s)


@contextmanager
def open_client(place: ServerTarget, *, timeout_s: float = 30.0) -> Iterator[Any]:
    """Give a client of a server; a problem is printed and ends the command.

    Ctrl-C ends the command silently.
    """
    from loadledger import Client, ClientProblem  # noqa: PLC0415 - keeps `loadledger --help` quick

    try:
        with Client(place.url, token=place.token, ca_file=place.ca, timeout_s=timeout_s) as client:
            yield client
    except ClientProblem as problem:
        exit_with_error(explain_problem(problem, place))
    except ValueError as error:  # an argument cannot be sent
        exit_with_error(str(error))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def explain_problem(problem: Exception, place: ServerTarget) -> str:
    """Return a problem's message with advice."""
    status = getattr(problem, "status", None)
    if status == UNAUTHENTICATED and not place.token:
        return (
            f"{place.url} asks for a token: set LOADLEDGER_TOKEN, or save one with `loadledger login`"
            " (`loadledger token` creates one on the server's machine)"
        )
    if status == FORBIDDEN:
        return f"{problem}; use a token with that role (`loadledger token --role …`)"
    hint = HINTS.get(getattr(problem, "code", ""))
    return f"{problem}; {hint}" if hint else str(problem)


def int_option(
    *flags: str, metavar: str, text: str, least: int = 1, **options: Any
) -> Callable[[Command], Command]:
    """Add an option with an integer of at least `least`."""
    return click.option(*flags, metavar=metavar, type=click.IntRange(min=least), help=text, **options)


def own_data() -> Path:
    """Return the user's own data directory, which `serve` takes by default."""
    from server.configsources import default_folder  # noqa: PLC0415 - keeps `loadledger --help` quick

    found = default_folder("data", os.environ)
    if found is None:
        raise click.UsageError("there is no HOME: name the data directory with --data or LOADLEDGER_DATA")
    return found


def data_option(command: Command) -> Command:
    """Add the option `--data`."""
    return click.option(
        "--data",
        type=click.Path(path_type=Path, file_okay=False),
        envvar="LOADLEDGER_DATA",
        default=own_data,
        show_default="~/.local/share/loadledger/data",
        help="Directory of the ledger and the keys.",
    )(command)


def require_data(data: Path) -> None:
    """Refuse a data directory that does not exist."""
    if not data.is_dir():
        raise click.BadParameter(
            f"there is no {data}; `loadledger token` and `serve` create it", param_hint="--data"
        )


@click.command()
@click.option("--url", metavar="URL", envvar="LOADLEDGER_URL", default=DEFAULT_URL, help="Server.")
@click.option("--profile", metavar="NAME|FILE", help="Profile to write. [LOADLEDGER_PROFILE]")
@click.option(
    "--ca",
    metavar="FILE",
    envvar="LOADLEDGER_CA",
    type=click.Path(path_type=Path, dir_okay=False, exists=True, resolve_path=True),
    help="Certificates to trust, in PEM, instead of the system's. [LOADLEDGER_CA]",
)
@json_option
def login(url: str, profile: str | None, ca: Path | None, *, as_json: bool) -> None:
    """Save a server's URL and a token in a profile.

    Type the token at the prompt, or pipe it in: `loadledger token … | loadledger login`. The command first
    checks that the server accepts it. Only you can read the file.

    --json prints the server's `url` and the file's path as `profile`.
    """
    try:
        path = profile_path(profile, os.environ)
    except ProfileProblem as problem:
        exit_with_error(str(problem))
    token = _token()
    with open_client(ServerTarget(url, token, ca)) as client:
        client.resources()
        url = client.url
    try:
        write_profile(path, ServerTarget(url, token, ca))
    except OSError as error:
        exit_with_error(f"{path} cannot be written: {error.strerror}")
    members = {"url": url, "profile": str(path)}  # dumped with escapes, as a path may be no UTF-8
    text = f"{to_printable(url)} accepts the token; saved in {path}"
    click.echo(json.dumps(members, indent=2) if as_json else text)


def _token() -> str:
    if sys.stdin.isatty():
        text: str = click.prompt("Token", hide_input=True, err=True)
    else:
        text = sys.stdin.readline(64 * 1024)
    if not text.strip():
        exit_with_error("there is no token on standard input: `loadledger token … | loadledger login`")
    return text.strip()
