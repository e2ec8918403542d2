"""Recorded histories of real servers fold to the recorded states; a change of the folds has to say so."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.history import opened

from events.audit.verify import verify
from events.codec import GENESIS, decode_event, encode_canonical, encode_event, hash_body
from events.sqlite import queries, storage
from events.sqlite.history import state_at
from events.sqlite.queries import as_text
from events.sqlite.schema import connect
from events.sqlite.storage import FOLDS
from events.state import State
from events.storage import Row
from events.types import TYPES, ClockStepped, EventsDiscarded, RollbackAccepted, UnloadFailed

VERSIONS = {"VersionAdded", "VersionRemoved"}
"""Events of the repository, which change no model and no job."""
FOLDER = Path(__file__).parents[1] / "histories"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jsonl"))


def bodies(name: str) -> list[str]:
    return (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()


def test_recorded_histories_have_every_event_type_and_cause() -> None:
    events = [decode_event(body) for name in NAMES for body in bodies(name)]
    rare = {UnloadFailed.TYPE, ClockStepped.TYPE, RollbackAccepted.TYPE, EventsDiscarded.TYPE, *VERSIONS}
    assert {event.type for event in events} >= set(TYPES) - rare
    causes = {cause for event in events if (cause := getattr(event.data, "cause", None)) is not None}
    assert causes >= {"request", "swap", "eviction", "recovery", "restart", "drain"}


@pytest.mark.parametrize("name", NAMES)
def test_recorded_history_folds_to_its_recorded_states(name: str) -> None:
    told, state = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")), State()
    assert told["folds"] == FOLDS, (
        "with a new number of the folds, tests/histories/record.py --refold makes the recorded states anew"
    )
    for body, expected in zip(bodies(name), told["changes"], strict=True):
        assert encode_event(decode_event(body)) == with_added_members(body)
        changes = state.apply(decode_event(body))
        where = f"{name} at {state.position}: other texts are stored now: change events.sqlite.storage.FOLDS"
        assert {key: as_text(model) for key, model in changes.models.items()} == texts(expected["models"]), (
            where
        )
        assert {key: as_text(job) for key, job in changes.jobs.items()} == texts(expected["jobs"]), where
        tokens = {key: as_text(token) for key, token in changes.tokens.items() if token is not None}
        assert tokens == texts(expected.get("tokens", {})), where
        nodes = {key: as_text(node) for key, node in changes.nodes.items() if node is not None}
        assert nodes == texts(expected.get("nodes", {})), where


def with_added_members(body: str) -> str:
    """Return an earlier release's body with the members that its type got since, which are null or 0."""
    now, raw = json.loads(encode_event(decode_event(body))), json.loads(body)
    return encode_canonical({**raw, "data": with_empty_members(raw["data"], now["data"])})


def with_empty_members(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    added = {member: now[member] for member in now.keys() - before.keys()}
    assert not any(added.values())
    inner = {
        member: with_empty_members(value, now[member])
        for member, value in before.items()
        if isinstance(value, dict) and isinstance(now.get(member), dict)
    }
    return before | inner | added


def texts(entities: dict[str, Any]) -> dict[str, str]:
    return {key: encode_canonical(entity) for key, entity in entities.items()}


@pytest.mark.parametrize("name", NAMES)
async def test_recorded_history_is_a_ledger_that_opens_and_verifies(name: str, tmp_path: Path) -> None:
    path, state, digest = tmp_path / "ledger.db", State(), GENESIS
    with closing(connect(path)) as connection:
        for position, body in enumerate(bodies(name), 1):
            digest = hash_body(digest, body)
            queries.write_group(connection, [Row(position, body, digest)], state.apply(decode_event(body)))
        storage.rebuild(connection)
        assert state_at(connection, state.position).models == state.models
    verification = verify(path)
    assert verification.verified, verification.finding
    assert verification.compared
    async with opened(path) as log:
        assert log.state.models == state.models
        assert (log.state.tokens, log.state.nodes) == (state.tokens, state.nodes)
        await log.server_started()
