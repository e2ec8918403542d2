"""The image and the files of `deploy/`, as values."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from features.nodes.cli import drain
from loadledger.cli.main import main
from server.config import Config
from server.configsources import read_settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
DRAIN_S = Config(repository=Path(), data=Path()).drain_timeout_s
"""A stop waits for handlers and then for connections, half of this each, and then ends the workers."""
LEDGER_URL = "postgresql://loadledger@db.example/loadledger"


def read_valid(flags: Mapping[str, Any], environment: Mapping[str, str]) -> Config:
    """Return the configuration of options and variables that have no mistake."""
    values, mistakes = read_settings(flags, environment)
    assert not mistakes
    return Config(**values)


def instructions(name: str) -> list[str]:
    """Return what follows an instruction of the Dockerfile, wherever it stands."""
    return re.findall(rf"^{name} +(.*)$", DOCKERFILE, re.MULTILINE)


def image_environment() -> dict[str, str]:
    """Return the variables of the image."""
    return dict(pair.split("=", 1) for line in instructions("ENV") for pair in shlex.split(line))


def drain_options(command: Sequence[str]) -> dict[str, Any]:
    """Return the parameters of `loadledger drain` in a hook's command line; there must be no mistake."""
    program, name, *arguments = command
    assert (Path(program).name, name) == ("loadledger", "drain")
    return drain.make_context(name, arguments, **main.context_settings).params
