"""Variables that look like settings and are none: a mistyped one would be passed over without a word."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping

from server.config import CONFIG_VARIABLE, settings

_log = logging.getLogger(__name__)

PREFIX = "LOADLEDGER_"
OF_COMMANDS = frozenset(
    f"{PREFIX}{name}" for name in ("URL", "TOKEN", "CA", "PROFILE", "ROLE", "SUBJECT", "EXPIRES")
)
"""What other commands read; it may be set where a server is started, too."""
OF_COMPOSE = frozenset({f"{PREFIX}MODELS"})
"""What our file for Docker Compose reads, and is often set in a shell."""
NEAR = 0.5
"""Of `difflib`: enough that REPO is REPOSITORY."""

_SERVICE_LINK = re.compile(
    r"LOADLEDGER(_[A-Z0-9_]+)?_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?"
    r"|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_PORT = re.compile(r"LOADLEDGER_[A-Z0-9_]+_PORT")
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://.*")
"""Kubernetes sets these for each Service whose name begins with loadledger, in every pod beside it."""


def unknown_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that begin as settings do and that nothing reads, each with what may be meant.

    Their values are not looked at closer: one may be a secret.
    """
    known = {setting.variable for setting in settings()} | OF_COMMANDS | {CONFIG_VARIABLE}
    return {
        name: _advice(name, known)
        for name, value in sorted(environment.items())
        if name.startswith(PREFIX) and name not in known | OF_COMPOSE and not _is_service_link(name, value)
    }


def warn_of_unknown(environment: Mapping[str, str]) -> None:
    """Log one line that names them, if there are any."""
    unknown = unknown_variables(environment)
    if unknown:
        told = "; ".join(f"{name}: {advice}" for name, advice in unknown.items())
        _log.warning("variables that nothing reads: %s", told)


def _is_service_link(name: str, value: str) -> bool:
    if _SERVICE_PORT.fullmatch(name) and _SERVICE_ADDRESS.fullmatch(value):
        return True
    return _SERVICE_LINK.fullmatch(name) is not None


def _advice(name: str, known: set[str]) -> str:
    plain = {each.removeprefix(PREFIX): each for each in known}
    near = difflib.get_close_matches(name.removeprefix(PREFIX), plain, n=1, cutoff=NEAR)
    return f"did you mean {plain[near[0]]}?" if near else "`loadledger serve --help` lists the settings"
