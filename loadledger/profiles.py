"""Profiles: the server's URL and token, from variables, files and the default.

A profile is a TOML file with `url`, `token` and `ca`, by default `~/.config/loadledger/profile.toml`, which
`loadledger login` writes. As it holds a token, a profile that others may read is refused, and the token goes
to the profile's URL only.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

URL = "LOADLEDGER_URL"
TOKEN = "LOADLEDGER_TOKEN"  # noqa: S105 -- the name of a variable
CA = "LOADLEDGER_CA"
PROFILE = "LOADLEDGER_PROFILE"
PORT = "LOADLEDGER_PORT"
DEFAULT_URL = "http://127.0.0.1:8080"
DEFAULT_PROFILE = "profile"

MAX_PROFILE_BYTES = 64 * 1024
"""Three lines, one of which is a token."""
KNOWN = ("url", "token", "ca")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ProfileProblem(ValueError):
    """The profile cannot be used."""


@dataclass(frozen=True, slots=True)
class ServerTarget:
    """A server to talk to; the content of a profile file.

    Attributes:
        ca: file of authorities' certificates, in PEM; None is the system's.
    """

    url: str = DEFAULT_URL
    token: str | None = field(default=None, repr=False)
    ca: Path | None = None


def find_target(url: str | None, profile: str | None, environment: Mapping[str, str]) -> ServerTarget:
    """Find the server: by its URL if given, then variable, then profile, then on this machine.

    Args:
        url: the server's URL, if given.
        profile: as for `profile_path`.
        environment: its variables LOADLEDGER_URL, _TOKEN, _CA, _PROFILE and _PORT.

    Raises:
        ProfileProblem: the profile does not exist, or cannot be used.
    """
    kept = _choose_target(profile, environment)
    chosen = url or environment.get(URL) or kept.url
    is_its_own = chosen.rstrip("/") == kept.url.rstrip("/")
    token = environment.get(TOKEN) or (kept.token if is_its_own else None)
    ca = environment.get(CA)
    return ServerTarget(chosen, token, Path(ca) if ca else kept.ca if is_its_own else None)


def local_server(environment: Mapping[str, str]) -> ServerTarget:
    """Return the server of this machine; its port is a variable of `serve`, also set by Kubernetes."""
    port = environment.get(PORT, "")
    return ServerTarget(f"http://127.0.0.1:{port}" if re.fullmatch("[1-9][0-9]{0,4}", port) else DEFAULT_URL)


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
        FileNotFoundError: the file does not exist.
        ProfileProblem: others may read the file, or it is invalid.
    """
    try:
        text = _private_text(path)
        import tomllib

        values = tomllib.loads(text)
    except (FileNotFoundError, ProfileProblem):
        raise
    except OSError as error:
        raise ProfileProblem(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not quoted: its text may hold the token
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
        OSError: the file cannot be written.
        WrongTarget: there is a folder or a special file at the path.
    """
    from events.files import write_file

    values = {"url": profile.url, "token": profile.token, "ca": profile.ca and str(profile.ca)}
    text = "".join(
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items() if value
    )
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with write_file(path.resolve(), replace=True) as file:
        file.write(text.encode())


def _choose_target(profile: str | None, environment: Mapping[str, str]) -> ServerTarget:
    """Return the content of the named profile, else of the default one if there is one."""
    is_named = profile or environment.get(PROFILE)
    if not is_named and _folder(environment) is None:
        return local_server(environment)
    path = profile_path(profile, environment)
    try:
        return read_profile(path)
    except FileNotFoundError:
        if is_named:
            raise ProfileProblem(f"there is no {path}; `loadledger login` creates one") from None
        return local_server(environment)


def _folder(environment: Mapping[str, str]) -> Path | None:
    """Return the configuration folder by the XDG base directory specification; it must be absolute."""
    given, home = environment.get("XDG_CONFIG_HOME", ""), environment.get("HOME", "")
    base = Path(given) if given.startswith("/") else Path(home) / ".config" if home else None
    return None if base is None else base / "loadledger"


def _private_text(path: Path) -> str:
    # O_NONBLOCK: opening a FIFO would wait forever.
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
    return content.decode("utf-8-sig")
