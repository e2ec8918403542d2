"""A model's `loadledger.toml`: what its loads are asked for with where a request does not say.

The file is whatever somebody put into the repository, so it is read with a limit and never followed out of
it. It is looked at when a load is requested; what applied stands in the ledger, so nothing later needs it.
"""

import os
import tomllib
from typing import Any

from runtime.errors import RuntimeProblem
from runtime.repository import Repository, UnsafeFile

DEFAULTS_FILE = "loadledger.toml"
MAX_DEFAULTS_BYTES = 64 * 1024
"""A file that names every key has a few hundred bytes; comments have room."""


class InvalidDefaults(RuntimeProblem):
    """The model's loadledger.toml is not what it has to be."""

    code = "invalid_defaults"


def defaults_name(model_id: str) -> str:
    """Return what the file is called when people are told of it: its path in the repository."""
    return f"{model_id}/{DEFAULTS_FILE}"


def read_defaults(repository: Repository, model_id: str) -> dict[str, Any]:
    """Return what a model's file says, an empty dict if there is none; keys and values are not checked here.

    Raises:
        InvalidDefaults: `invalid_defaults`, it cannot be read, is too large, or is no TOML.
    """
    name = defaults_name(model_id)
    try:
        content = _content(repository, model_id)
        return tomllib.loads(content.decode())
    except UnsafeFile as error:
        raise InvalidDefaults(f"{name} {error}; replace it, or take it away") from None
    except UnicodeDecodeError:
        raise InvalidDefaults(f"{name} is not UTF-8, which TOML has to be") from None
    except ValueError as error:  # of the parser, and of Python for a number of thousands of digits
        raise InvalidDefaults(f"{name} is no TOML: {error}") from None
    except RecursionError:
        raise InvalidDefaults(f"{name} is nested too deeply; it takes keys with plain values") from None


def _content(repository: Repository, model_id: str) -> bytes:
    descriptor = repository.open_beside(model_id, DEFAULTS_FILE)
    if descriptor is None:
        return b""
    with os.fdopen(descriptor, "rb") as file:
        try:
            content = file.read(MAX_DEFAULTS_BYTES + 1)
        except OSError as error:
            raise UnsafeFile(f"cannot be read: {error.strerror}") from None
    if len(content) > MAX_DEFAULTS_BYTES:
        raise UnsafeFile(f"has more than {MAX_DEFAULTS_BYTES} bytes")
    return content
