"""What `loadledger check` says of a configuration before it is served: all that is wrong with it."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runtime.machine import MemoryUnknown, budget_bytes, memory_limit
from runtime.survey import Finding, Severity, is_folder, is_there
from server.config import Config, check_files, file_values, settings
from server.pathchecks import check_paths
from server.settings import ConfigError, MappingEnv, Setting, read
from server.unknownvariables import unknown_variables


class NothingToCheck(Exception):
    """No repository was named, so there is nothing that could be checked."""


def check_configuration(
    flags: Mapping[str, object], environment: Mapping[str, str]
) -> tuple[Config, list[Finding]]:
    """Read a configuration as `serve` would, and look at what it names.

    Args:
        flags: by the settings' names; None is unset.
        environment: for what no flag says.

    Returns:
        The configuration, with the defaults in place of what is refused, and what is wrong with it.

    Raises:
        NothingToCheck: neither says where the repository is.
    """
    values, findings = _values(flags, environment)
    if values.get("repository") is None:
        raise NothingToCheck("say what to check: --repository DIR, or LOADLEDGER_REPOSITORY")
    has_data = values.get("data") is not None
    if not has_data:  # a repository is checked without: it stands in itself, and is told of once
        values["data"] = values["repository"]
    config = _config(values, findings)
    findings += [each for each in _files(config) if has_data or each.place != "--data"]
    if has_data:
        findings += _data(config.data)
    findings += [*_memory(config), *_address(config), *_variables(environment)]
    return config, findings


def _config(values: dict[str, Any], findings: list[Finding]) -> Config:
    """Make the configuration; settings that do not go together are left out."""
    try:
        return Config(**values)
    except ConfigError as error:
        findings.append(_refused(error, "configuration"))
        return Config(repository=values["repository"], data=values["data"])


def _values(
    flags: Mapping[str, object], environment: Mapping[str, str]
) -> tuple[dict[str, Any], list[Finding]]:
    env, values, findings = MappingEnv(environment), dict[str, Any](), list[Finding]()
    file: Mapping[str, Any] = {}
    try:
        file = file_values(flags, environment)
    except ConfigError as error:
        findings += [_refused(line, "--config") for line in str(error).split("\n")]
    for setting in settings():
        try:
            values[setting.name] = read(setting, flags, env, file)
        except ConfigError as error:
            if not _is_missing(setting, flags, environment):
                findings.append(_refused(error, setting.flag))
            if not setting.required:
                values[setting.name] = setting.default
    return values, findings


def _refused(error: ConfigError | str, place: str) -> Finding:
    """Return what is wrong, at the place that it says itself, if it does."""
    named, colon, text = str(error).partition(": ")
    if colon and (named.startswith("--") or named.rpartition(":")[2].isdecimal()):
        return Finding(named, "invalid_setting", text)
    return Finding(place, "invalid_setting", str(error))


def _is_missing(setting: Setting, flags: Mapping[str, object], environment: Mapping[str, str]) -> bool:
    return setting.required and flags.get(setting.name) is None and setting.variable not in environment


def _files(config: Config) -> Iterator[Finding]:
    for check in (check_paths, check_files):
        try:
            check(config)
        except ConfigError as error:
            yield from (_refused(line, "configuration") for line in str(error).split("\n"))
            return


def _data(data: Path) -> Iterator[Finding]:
    """Yield whether the ledger could not be written."""
    folder = data
    while not is_there(folder) and folder != folder.parent:
        folder = folder.parent
    if is_folder(folder) and not os.access(folder, os.W_OK | os.X_OK):
        text = f"{folder} may not be written by the user that this runs as: correct its mode or owner"
        yield Finding("--data", "unwritable", text)


def _memory(config: Config) -> Iterator[Finding]:
    try:
        limit = memory_limit()
    except MemoryUnknown as error:
        yield Finding("--memory-budget", error.code, str(error))
        return
    budget = budget_bytes(config.memory_budget, limit.bytes)
    if budget > limit.bytes:
        text = f"{budget} bytes are more than the {limit.bytes} that the {limit.source} allows"
        yield Finding("--memory-budget", "beyond_limit", text, Severity.NOTE)


def _variables(environment: Mapping[str, str]) -> Iterator[Finding]:
    for name, advice in unknown_variables(environment).items():
        yield Finding(name, "unknown_variable", f"nothing reads it; {advice}", Severity.NOTE)


def _address(config: Config) -> Iterator[Finding]:
    """Yield whether the address cannot be listened on."""
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        yield Finding("--host", "no_address", f"{config.host!r} cannot be resolved: {error}")
        return
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            text = f"{config.host}:{config.port} cannot be listened on: {error.strerror}"
            hint = "; another process does, which may be the server" if taken else ""
            severity = Severity.NOTE if taken else Severity.PROBLEM
            yield Finding("--port", "no_address", text + hint, severity)
            return
