"""Event types against committed bodies: every release reads and writes the same bytes."""

import json
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import fields, replace
from support.history import FEWER, INTEGERS, PLAIN, TEXTS, any_data, drafts, instances

from events.codec import decode_event, encode_canonical, encode_event
from events.types import (
    SCHEMA,
    TYPES,
    AccessDenied,
    CancelRequested,
    Cause,
    Data,
    Durations,
    Event,
    Idempotency,
    JobCancelled,
    LoadedFile,
    LoadFailed,
    LoadRequested,
    LoadStarted,
    ModelLoaded,
    ModelUnloaded,
    Prepared,
    ServerStarted,
    ServerStopped,
    Unknown,
    UnloadFailed,
    UnloadRequested,
    UnloadStarted,
    WorkerExited,
    record_draft,
)

KEYS = Idempotency("aa" * 32, "bb" * 32)

DECODED: dict[str, Data] = {
    "LoadRequested": LoadRequested(
        priority="high",
        timeout_s=300,
        keep_alive_s=60,
        memory_limit_bytes=1_073_741_824,
        strategy="beside",
        pinned=True,
        instances=2,
        cause=Cause.RECOVERY,
        cause_event_id="e7",
        idempotency=KEYS,
    ),
    "LoadStarted": LoadStarted(2),
    "ModelLoaded": ModelLoaded(
        (
            LoadedFile("model.onnx", 209_715, 1_767_225_600_123_456_789, "cc" * 32),
            LoadedFile("weights/é.bin", 0, -1, "dd" * 32),
        ),
        ("w1", "w2"),
        Prepared("optimized", "ee" * 32),
        51_200_000,
        91_200_000,
        Durations(10, 20, 30, 40, None, 50, 150),
    ),
    "LoadFailed": LoadFailed("worker_died", 'killed by signal 9\nlast line: "é" \x1b[0m'),
    "UnloadRequested": UnloadRequested(True, "j1", Cause.SWAP, "e3", KEYS),
    "UnloadStarted": UnloadStarted(),
    "ModelUnloaded": ModelUnloaded(51_200_000, 3, 1),
    "UnloadFailed": UnloadFailed("stuck", "the process does not end"),
    "CancelRequested": CancelRequested(KEYS),
    "JobCancelled": JobCancelled(),
    "AccessDenied": AccessDenied("POST /api/v1/models/{id}/load", 12),
    "WorkerExited": WorkerExited(None, 11, ("one", "", "three\ttabs")),
    "ServerStarted": ServerStarted(True, "2026-01-01T00:00:00.000001Z"),
    "ServerStopped": ServerStopped(),
}
"""What the bodies of `bodies.json` say. Add to this; a line that has to change is a broken promise."""

BODIES: dict[str, str] = json.loads(Path(__file__).with_name("bodies.json").read_text(encoding="ascii"))


def event(data: Data | Unknown) -> Event:
    return Event(7, "e7", data, "alice", "2026-01-01T00:00:00.000001Z", "j1", "digits", 2, "w1")


def change(body: str, **changes: Any) -> str:
    return encode_canonical(json.loads(body) | changes)


def test_every_type_has_committed_body() -> None:
    assert BODIES.keys() == TYPES.keys() == DECODED.keys()


@pytest.mark.parametrize("name", sorted(TYPES))
def test_committed_body_reads_and_writes_as_ever(name: str) -> None:
    assert decode_event(BODIES[name]) == event(DECODED[name])
    assert encode_canonical(json.loads(BODIES[name])) == BODIES[name]
    written, committed = json.loads(encode_event(event(DECODED[name]))), json.loads(BODIES[name])
    assert written.pop("data").items() >= committed.pop("data").items()
    assert written == committed


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
    raw = json.loads(encode_event(event(data)))
    assert sorted(raw) == [
        *("actor", "data", "id", "job_id", "model_id", "position", "recorded_at"),
        *("schema", "type", "version", "worker_id"),
    ]
    assert raw["schema"] == SCHEMA
    assert raw["type"] == data.TYPE
    assert sorted(raw["data"]) == sorted(data.__struct_fields__)


@pytest.mark.parametrize("changes", [{"type": "ModelMoved"}, {"schema": 2}, {"type": "X", "schema": 0}])
def test_unknown_type_or_schema_is_kept_exactly(changes: dict[str, Any]) -> None:
    body = change(BODIES["ModelLoaded"], **changes)
    read = decode_event(body)
    assert isinstance(read.data, Unknown)
    assert read.data.data == json.loads(body)["data"]
    assert read.type == json.loads(body)["type"]
    assert encode_event(read) == body


@pytest.mark.parametrize("name", sorted(TYPES))
def test_field_of_later_release_is_skipped(name: str) -> None:
    data = json.loads(BODIES[name])["data"] | {"added_later": {"deep": [1]}}
    body = change(BODIES[name], data=data, also_added="yes")
    assert decode_event(body) == event(DECODED[name])


@pytest.mark.parametrize("name", sorted(TYPES))
def test_field_missing_in_earlier_release_takes_default(name: str) -> None:
    kind = TYPES[name]
    later = {
        "cause_event_id": None,
        "idempotency": None,
        "down_since": None,
        "max_batch_size": 0,
        "max_queue_delay_us": 0,
    }
    optional = {key: value for key, value in later.items() if key in get_type_hints(kind)}
    data = {key: value for key, value in json.loads(BODIES[name])["data"].items() if key not in optional}
    whole: Any = DECODED[name]
    expected = replace(whole, **optional)
    assert decode_event(change(BODIES[name], data=data)) == event(expected)


@pytest.mark.parametrize("name", sorted(TYPES))
def test_body_without_required_field_is_refused(name: str) -> None:
    data = json.loads(BODIES[name])["data"]
    for field in fields(TYPES[name]):
        if field.required:
            lacking = {key: value for key, value in data.items() if key != field.name}
            with pytest.raises(msgspec.ValidationError, match=f"missing required field `{field.name}`"):
                decode_event(change(BODIES[name], data=lacking))


def test_event_is_immutable_value() -> None:
    one = event(DECODED["ModelLoaded"])
    assert one == event(DECODED["ModelLoaded"])
    assert hash(one) == hash(event(DECODED["ModelLoaded"]))
    with pytest.raises(AttributeError):
        one.position = 8  # type: ignore[misc]
