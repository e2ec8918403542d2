"""Events as they are stored and hashed: the canonical JSON of the whole event, and back."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from events.canonical import canonical
from events.errors import NotEncodable
from events.types import SCHEMA, TYPES, Data, Event, Unknown


def to_body(event: Event) -> str:
    """Return the canonical JSON of the whole event, which is what is stored and hashed.

    Raises:
        NotEncodable: a value that the canonical form does not have.
    """
    unknown = event.data if isinstance(event.data, Unknown) else None
    try:
        data = unknown.data if unknown else msgspec.to_builtins(event.data)
    except TypeError as error:
        raise NotEncodable(f"$.data: {error}") from None
    return canonical(
        {
            "position": event.position,
            "id": event.id,
            "type": event.type,
            "schema": unknown.schema if unknown else SCHEMA,
            "job_id": event.job_id,
            "model_id": event.model_id,
            "version": event.version,
            "worker_id": event.worker_id,
            "actor": event.actor,
            "recorded_at": event.recorded_at,
            "data": data,
        },
    )


def from_body(body: str) -> Event:
    """Return the event whose body this is; what this release does not know becomes `Unknown`."""
    raw = json.loads(body)
    return Event(
        position=raw["position"],
        id=raw["id"],
        data=_data(raw["type"], raw["schema"], raw["data"]),
        actor=raw["actor"],
        recorded_at=raw["recorded_at"],
        job_id=raw["job_id"],
        model_id=raw["model_id"],
        version=raw["version"],
        worker_id=raw["worker_id"],
    )


def _data(name: str, schema: int, raw: dict[str, Any]) -> Data | Unknown:
    kind = TYPES.get(name)
    if kind is None or schema != SCHEMA:
        return Unknown(name, schema, raw)
    return msgspec.convert(raw, kind)
