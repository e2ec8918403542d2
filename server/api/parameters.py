"""What a load is asked for with: the request over the model's loadledger.toml over the server's settings."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from events.commands import FileStat, RequestLoad
from events.jobs import LoadParameters
from events.types import Idempotency
from runtime.defaults import InvalidDefaults, defaults_name, read_defaults
from runtime.repository import ModelVersion, Repository
from server.api.schemas import LoadBodySchema
from server.appkeys import CONFIG, REPOSITORY
from server.config import Config
from server.validation import InvalidBody, load_with

_PARAMETERS = LoadParameters.__struct_fields__
_AS_BODY = LoadBodySchema()
_AS_DEFAULTS = LoadBodySchema(only=_PARAMETERS)
_NO_BATCHING = "max_queue_delay_us takes a max_batch_size of at least 1: without one nothing is batched"
NEVER = -1
"""The `keep_alive_s` of a model that stays, however long nobody asks it."""


async def requested_load(
    app: web.Application,
    model_id: str,
    asked: Mapping[str, Any],
    subject: str,
    idempotency: Idempotency | None = None,
) -> RequestLoad:
    """Return the command for a load that a request asks for.

    Args:
        app: whose repository and settings count.
        model_id: as the request names it.
        asked: the members of a load's body, no more than the request gave.
        subject: who asks.
        idempotency: the request's key, if it has one.

    Raises:
        InvalidBody: `invalid_body`, what is asked for is not what a load takes.
        InvalidDefaults: `invalid_defaults`, the model's loadledger.toml is not what it has to be.
        RuntimeProblem: `invalid_model_id`, `unknown_model`, `unknown_version`.
    """
    asked = load_with(_AS_BODY, asked, "body", InvalidBody)
    wanted = {name: value for name, value in asked.items() if name != "version"}
    version = asked.get("version")
    found, written = await asyncio.to_thread(_look_up, app[REPOSITORY], model_id, version)
    defaults = load_with(_AS_DEFAULTS, written, defaults_name(found.model_id), InvalidDefaults)
    parameters = _merged(wanted, defaults, defaults_name(found.model_id), app[CONFIG])
    return RequestLoad(
        found.model_id,
        found.version,
        tuple(FileStat(file.path, file.bytes, file.mtime_ns) for file in found.files),
        subject,
        parameters,
        asked=frozenset(wanted),
        idempotency=idempotency,
    )


def default_parameters(repository: Repository, model_id: str, config: Config) -> LoadParameters:
    """Return what a model is loaded with when a request asks for nothing.

    Raises:
        InvalidDefaults: `invalid_defaults`, the model's loadledger.toml is not what it has to be.
    """
    file = defaults_name(model_id)
    defaults = load_with(_AS_DEFAULTS, read_defaults(repository, model_id), file, InvalidDefaults)
    return _merged({}, defaults, file, config)


def _look_up(
    repository: Repository, model_id: str, version: int | None
) -> tuple[ModelVersion, dict[str, Any]]:
    return repository.resolve(model_id, version), read_defaults(repository, model_id)


def _merged(
    wanted: Mapping[str, Any], defaults: Mapping[str, Any], file: str, config: Config
) -> LoadParameters:
    """Lay one over the other; the delay is that of a batch, so who turns batching off turns both off."""
    merged = {"timeout_s": config.timeout_s, "strategy": config.strategy, **defaults, **wanted}
    if merged.get("keep_alive_s") is None:  # null stands for the server's setting, whoever says it
        merged["keep_alive_s"] = None if config.keep_alive_s == NEVER else config.keep_alive_s
    if merged.get("max_queue_delay_us") and not merged.get("max_batch_size"):
        if wanted.get("max_queue_delay_us"):
            raise InvalidBody(f"body: {_NO_BATCHING}")
        if not defaults.get("max_batch_size"):
            raise InvalidDefaults(f"{file}: {_NO_BATCHING}")
        merged["max_queue_delay_us"] = 0
    return LoadParameters(**merged)
