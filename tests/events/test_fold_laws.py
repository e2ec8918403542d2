"""What holds of folding whatever is folded: replays agree, and what is not known yet changes nothing."""

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.events import FEWER, History, any_data, as_event, drafts, instances, opened, values

from events import rebuild, snapshots, store
from events.bodies import from_body, to_body
from events.canonical import GENESIS, canonical, chain
from events.history import state_at
from events.rebuild import FOLDS
from events.schema import connect
from events.state import Changes, State
from events.store import Row
from events.types import SCHEMA, TYPES, Event, Unknown
from events.verify import verify

HISTORIES = st.lists(drafts(), max_size=30).map(
    lambda told: [as_event(draft, number, number) for number, draft in enumerate(told, 1)]
)


def write_ledger(path: Path, bodies: Sequence[str], snapshots_at: frozenset[int] = frozenset()) -> State:
    """Write a ledger of these events, each in a group of its own, with snapshots at these positions."""
    state, digest = State(), GENESIS
    with closing(connect(path)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("UPDATE projected SET folds = ?", (FOLDS,))
        for position, body in enumerate(bodies, 1):
            digest = chain(digest, body)
            changes = state.apply(from_body(body))
            write_one(connection, Row(position, body, digest), changes)
            if position in snapshots_at:
                snapshots.write(connection, position)
    return state


def write_one(connection: sqlite3.Connection, row: Row, changes: Changes) -> None:
    store.write_group(connection, [row], changes, entities=0)


def fold(events: Sequence[Event]) -> State:
    state = State()
    for event in events:
        state.apply(event)
    return state


def texts(state: State) -> list[str]:
    return [*sorted(map(store.as_text, state.models.values())), *map(store.as_text, state.unended())]


@FEWER
@given(HISTORIES, st.frozensets(st.integers(1, 30), max_size=5))
def test_replay_from_a_snapshot_is_replay_from_zero(events: list[Event], at: frozenset[int]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        write_ledger(path, list(map(to_body, events)), at)
        with closing(connect(path)) as connection:
            for position in range(len(events) + 1):
                zero = state_at(connection, position, from_base=True)
                near = state_at(connection, position)
                assert near.models == zero.models == fold(events[:position]).models
                assert near.unended() == zero.unended() == fold(events[:position]).unended()
                assert (near.position, near.recorded_at) == (zero.position, zero.recorded_at)
                assert near.position == position


@FEWER
@given(HISTORIES, st.frozensets(st.integers(1, 30), max_size=5))
def test_snapshots_made_anew_tell_the_same_past(events: list[Event], at: frozenset[int]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        write_ledger(path, list(map(to_body, events)), at)
        with closing(connect(path)) as connection:
            before = [texts(state_at(connection, position)) for position in range(len(events) + 1)]
            rebuild.rebuild(connection)
            after = [texts(state_at(connection, position)) for position in range(len(events) + 1)]
        assert before == after
        assert verify(path).verified


@FEWER
@given(HISTORIES)
def test_a_fold_gives_the_same_each_time(events: list[Event]) -> None:
    assert fold(events) == fold(events)
    assert texts(fold(events)) == texts(fold([from_body(to_body(event)) for event in events]))


LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=5)
JSONS = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)
NEW_NAMES = st.text(min_size=1, max_size=8).map(lambda name: f"new_{name}")
NEW_FIELDS = st.dictionaries(NEW_NAMES, JSONS, max_size=3)


@FEWER
@given(any_data(), NEW_FIELDS, NEW_FIELDS)
def test_fields_of_a_later_release_are_kept_and_skipped(
    data: Any, inside: dict[str, Any], beside: dict[str, Any]
) -> None:
    event = Event(7, "e", data, "alice", "2026-01-01T00:00:00.000000Z", "e", "m", 1)
    raw = json.loads(to_body(event))
    later = canonical({**raw, **beside, "data": {**raw["data"], **inside}})
    assert from_body(later) == event
    assert fold([from_body(later)]) == fold([event])


@FEWER
@given(HISTORIES, st.data())
def test_events_of_a_later_release_are_kept_and_skipped(events: list[Event], draws: st.DataObject) -> None:
    known = draws.draw(st.lists(st.booleans(), min_size=len(events), max_size=len(events)))
    told = [
        event if is_known else replace(event, data=draws.draw(UNKNOWN))
        for event, is_known in zip(events, known, strict=True)
    ]
    without = [event for event, is_known in zip(events, known, strict=True) if is_known]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        bodies = list(map(to_body, told))
        state = write_ledger(path, bodies)
        assert state.models == fold(without).models
        assert state.unended() == fold(without).unended()
        verification = verify(path)
        assert verification.verified, verification.finding
        with closing(connect(path)) as connection:
            stored = [body for (body,) in connection.execute("SELECT body FROM events ORDER BY position")]
        assert stored == bodies


OBJECTS = st.dictionaries(st.text(max_size=5), JSONS, max_size=3)
UNKNOWN = st.builds(Unknown, NEW_NAMES, st.integers(1, 3), OBJECTS) | st.builds(
    Unknown, st.sampled_from(sorted(TYPES)), st.integers(SCHEMA + 1, SCHEMA + 3), OBJECTS
)


async def test_a_ledger_with_events_of_a_later_release_is_opened_and_goes_on(tmp_path: Path) -> None:
    history = History()
    history.load("L")
    history.add(Unknown("ModelBlessed", 1, {"by": "somebody"}), "L")
    history.add(Unknown("ModelLoaded", 2, {"files": "elsewhere"}), "L")
    path = tmp_path / "ledger.db"
    write_ledger(path, list(map(to_body, history.facts)))
    async with opened(path) as log:
        assert log.state.models == history.state.models
        await log.server_started()
    assert verify(path).verified


@pytest.mark.parametrize("kind", sorted(TYPES))
@FEWER
@given(draws=st.data())
def test_an_event_reads_back_as_it_was_written(kind: str, draws: st.DataObject) -> None:
    data = draws.draw(instances(TYPES[kind]))
    event = Event(1, "e", data, draws.draw(values(str)), "2026-01-01T00:00:00.000000Z")
    assert from_body(to_body(event)) == event
