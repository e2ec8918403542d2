"""Event types against committed bodies: every release reads and writes the same bytes."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET
from msgspec.structs import fields, replace
from support.history import FEWER, PLAIN
from support.strategies import INTEGERS, TEXTS, any_data, drafts, instances

from events.codec import decode_event, encode_canonical, encode_event
from events.types import SCHEMA, TYPES, Data, Event, Unknown, record_draft

BODIES: dict[str, str] = json.loads(Path(__file__).with_name("bodies.json").read_text(encoding="ascii"))


def change(body: str, **changes: Any) -> str:
    return encode_canonical(json.loads(body) | changes)


def data_of(body: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(body)["data"]
    return data


def test_every_type_has_committed_body() -> None:
    assert BODIES.keys() == TYPES.keys()


@pytest.mark.parametrize("name", sorted(TYPES))
def test_committed_body_reads_and_writes_as_ever(name: str) -> None:
    body, event = BODIES[name], decode_event(BODIES[name])
    assert type(event.data) is TYPES[name]
    at = "2026-01-01T00:00:00.000001Z"
    assert event == Event(7, "e7", event.data, "alice", at, "j1", "digits", 2, "w1")
    assert encode_canonical(json.loads(body)) == body
    assert encode_event(event) == body
    later = change(body, data=data_of(body) | {"added_later": {"deep": [1]}}, also_added="yes")
    assert decode_event(later) == event


@pytest.mark.parametrize("name", sorted(TYPES))
@FEWER
@given(st.data())
def test_event_of_each_type_reads_back(name: str, data: st.DataObject) -> None:
    draft, position, recorded_at = data.draw(drafts()), data.draw(INTEGERS), data.draw(TEXTS)
    written = record_draft(replace(draft, data=data.draw(instances(TYPES[name]))), position, recorded_at)
    read = decode_event(encode_event(written))
    assert read == written
    assert type(read.data) is TYPES[name]
    assert read.type == name


@PLAIN
@given(any_data())
def test_body_has_same_keys_for_every_type(data: Data) -> None:
    raw = json.loads(encode_event(replace(decode_event(BODIES["LoadFailed"]), data=data)))
    assert sorted(raw) == [
        *("actor", "data", "id", "job_id", "model_id", "position", "recorded_at"),
        *("schema", "type", "version", "worker_id"),
    ]
    assert (raw["schema"], raw["type"]) == (SCHEMA, data.TYPE)
    given = {each.encode_name for each in fields(data) if getattr(data, each.name) is not UNSET}
    assert raw["data"].keys() == given


@pytest.mark.parametrize("changes", [{"type": "ModelMoved"}, {"schema": 2}, {"type": "X", "schema": 0}])
def test_unknown_type_or_schema_is_kept_exactly(changes: dict[str, Any]) -> None:
    body = change(BODIES["ModelLoaded"], **changes)
    read = decode_event(body)
    assert isinstance(read.data, Unknown)
    assert read.data.data == data_of(body)
    assert read.type == json.loads(body)["type"]
    assert encode_event(read) == body


@pytest.mark.parametrize("name", sorted(TYPES))
def test_body_without_required_field_is_refused(name: str) -> None:
    for field in fields(TYPES[name]):
        if field.required:
            lacking = {key: value for key, value in data_of(BODIES[name]).items() if key != field.encode_name}
            with pytest.raises(
                msgspec.ValidationError, match=f"missing required field `{field.encode_name}`"
            ):
                decode_event(change(BODIES[name], data=lacking))


def test_event_is_immutable_value() -> None:
    one, other = decode_event(BODIES["ModelLoaded"]), decode_event(BODIES["ModelLoaded"])
    assert one == other
    assert hash(one) == hash(other)
    with pytest.raises(AttributeError):
        one.position = 8  # type: ignore[misc]
