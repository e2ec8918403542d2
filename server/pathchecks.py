"""What refuses the paths of a configuration: those at which no system call could look for anything."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from server.config import Config, settings
from server.settingchecks import path_refusal, shown_path
from server.settings import ConfigError


def check_paths(config: Config) -> None:
    """Check that all paths can be looked at; whether something is there, others say.

    Raises:
        ConfigError: a line for each that cannot, naming its option.
    """
    refusals = list(_refusals(config))
    if refusals:
        raise ConfigError("\n".join(refusals))


def _refusals(config: Config) -> Iterator[str]:
    for setting in settings():
        path = getattr(config, setting.name) if setting.kind is Path else None
        refusal = None if path is None else path_refusal(path)
        if refusal is not None:
            yield f"{setting.flag}: {refusal}"
        elif setting.name == "repository" and not _is_utf8(config.repository):
            told = "is not UTF-8, which ONNX Runtime cannot open; rename it or name another"
            yield f"{setting.flag}: {shown_path(config.repository)} {told}"


def _is_utf8(path: Path) -> bool:
    try:
        os.path.realpath(path).encode()
    except UnicodeEncodeError:
        return False
    return True
