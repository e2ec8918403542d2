"""What a load is asked for with: the request over the model's loadledger.toml over the server's settings."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from aiohttp import web
from marshmallow import RAISE, ValidationError

from events.accept import FileStat, RequestLoad
from events.jobs import LoadParameters
from runtime.defaults import InvalidDefaults, defaults_name, read_defaults
from runtime.errors import RuntimeProblem
from runtime.repository import ModelVersion, Repository
from server.appkeys import CONFIG, REPOSITORY
from server.errors import ServerProblem
from server.schemas import LoadBodySchema
from server.validation import InvalidBody

_PARAMETERS = tuple(field.name for field in fields(LoadParameters))
_UNSUPPORTED = ("priority", "keep_alive_s", "strategy", "pinned")
_AS_BODY = LoadBodySchema()
_AS_DEFAULTS = LoadBodySchema(only=_PARAMETERS)
_NO_BATCHING = "max_queue_delay_us takes a max_batch_size of at least 1: without one nothing is batched"
_MAX_REPORTED = 10


class NotSupported(ServerProblem):
    """This release does not do that yet."""

    code = "not_supported"


async def requested_load(
    app: web.Application, model_id: str, asked: Mapping[str, Any], subject: str
) -> RequestLoad:
    """Return the command for a load that a request asks for.

    Args:
        app: whose repository and settings count.
        model_id: as the request names it.
        asked: the members of a load's body, no more than the request gave.
        subject: who asks.

    Raises:
        InvalidBody: `invalid_body`, what is asked for is not what a load takes.
        NotSupported: `not_supported`, rather than record what would not be done.
        InvalidDefaults: `invalid_defaults`, the model's loadledger.toml is not what it has to be.
        RuntimeProblem: `invalid_model_id`, `unknown_model`, `unknown_version`.
    """
    asked = _checked(_AS_BODY, asked, "body", InvalidBody)
    wanted = {name: value for name, value in asked.items() if name != "version"}
    version = asked.get("version")
    found, written = await asyncio.to_thread(_look_up, app[REPOSITORY], model_id, version)
    defaults = _checked(_AS_DEFAULTS, written, defaults_name(found.model_id), InvalidDefaults)
    parameters = _merged(wanted, defaults, defaults_name(found.model_id), app[CONFIG].timeout_s)
    files = tuple(FileStat(file.path, file.bytes, file.mtime_ns) for file in found.files)
    return RequestLoad(found.model_id, found.version, files, subject, parameters, asked=frozenset(wanted))


def _look_up(
    repository: Repository, model_id: str, version: int | None
) -> tuple[ModelVersion, dict[str, Any]]:
    return repository.resolve(model_id, version), read_defaults(repository, model_id)


def _checked(
    schema: LoadBodySchema,
    given: Mapping[str, Any],
    where: str,
    refusal: type[ServerProblem | RuntimeProblem],
) -> dict[str, Any]:
    """Return what is given if it is what `schema` takes and this release does."""
    try:
        values: dict[str, Any] = schema.load(given, unknown=RAISE)
    except ValidationError as error:
        raise refusal(_told(schema, error, where)) from None
    usual = LoadParameters()
    for name in _UNSUPPORTED:
        if name in values and values[name] != getattr(usual, name):
            raise NotSupported(f"{where}: {name}: {values[name]!r} is not supported yet; leave it out")
    return values


def _told(schema: LoadBodySchema, error: ValidationError, where: str) -> str:
    mistakes: dict[str, list[str]] = error.normalized_messages()  # type: ignore[no-untyped-call]
    told = [f"{where}: {name}: {' '.join(mistakes[name])}" for name in sorted(mistakes)[:_MAX_REPORTED]]
    if len(mistakes) > _MAX_REPORTED:
        told.append(f"and {len(mistakes) - _MAX_REPORTED} more")
    if mistakes.keys() - schema.fields.keys():
        told.append(f"known are {', '.join(sorted(schema.fields))}")
    return "; ".join(told)


def _merged(
    wanted: Mapping[str, Any], defaults: Mapping[str, Any], file: str, timeout_s: int
) -> LoadParameters:
    """Lay one over the other; the delay is that of a batch, so who turns batching off turns both off."""
    merged = {"timeout_s": timeout_s, **defaults, **wanted}
    if merged.get("max_queue_delay_us") and not merged.get("max_batch_size"):
        if wanted.get("max_queue_delay_us"):
            raise InvalidBody(f"body: {_NO_BATCHING}")
        if not defaults.get("max_batch_size"):
            raise InvalidDefaults(f"{file}: {_NO_BATCHING}")
        merged["max_queue_delay_us"] = 0
    return LoadParameters(**merged)
