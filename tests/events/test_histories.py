"""Recorded histories of real servers fold to the recorded states; a change of the folds has to say so."""

import json
from contextlib import closing
from pathlib import Path

import pytest
from support.folding import fold_steps
from support.history import opened

from events.audit.replay import replay
from events.audit.verify import verify
from events.codec import GENESIS, decode_event, encode_event, hash_body
from events.models import TRANSITIONS, ModelState
from events.sqlite import storage
from events.sqlite.schema import connect
from events.sqlite.storage import FOLDS
from events.sqlite.writing import WRITE_GROUP, group_of
from events.state import State, Transaction
from events.storage import LogHead, Row
from events.types import TYPES, ClockStepped, EventsDiscarded, RollbackAccepted

VERSIONS = {"VersionAdded", "VersionRemoved"}
"""Events of the repository, which change no model and no job."""
LABELS = {"LabelSet", "LabelRemoved"}
"""Newer than the recorded histories; `tests/events/test_versions.py` folds them."""
RECORDS = {"RecordsClosed", "RecordsErased"}
"""Events of files, which change no model and no job."""
FOLDER = Path(__file__).parents[1] / "histories"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jsonl"))


def bodies(name: str) -> list[str]:
    return (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()


def test_recorded_histories_have_every_event_type_and_cause() -> None:
    events = [decode_event(body) for name in NAMES for body in bodies(name)]
    rare = {ClockStepped.TYPE, RollbackAccepted.TYPE, EventsDiscarded.TYPE, *VERSIONS, *LABELS, *RECORDS}
    assert {event.type for event in events} >= set(TYPES) - rare
    causes = {cause for event in events if (cause := getattr(event.data, "cause", None)) is not None}
    assert causes >= {"request", "swap", "eviction", "recovery", "restart", "drain", "copy"}


@pytest.mark.parametrize("name", NAMES)
def test_recorded_history_folds_to_its_recorded_states(name: str) -> None:
    recorded = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert recorded["folds"] == FOLDS, (
        "with a new version of the folds, tests/histories/record.py --refold makes the recorded states anew"
    )
    for body in bodies(name):
        assert encode_event(decode_event(body)) == body
    steps, last = fold_steps(bodies(name))
    changed = f"{name}: other texts are stored now; change events.sqlite.storage.FOLDS"
    assert last == recorded["last"], changed
    for position, (digest, expected) in enumerate(zip(steps, recorded["steps"], strict=True), 1):
        assert digest == expected, f"{changed}, which differ first at {position}"


def test_models_of_recorded_histories_move_as_the_table_says() -> None:
    moves, known = set(), {(before, after) for row in TRANSITIONS.values() for before, after in row.items()}
    for name in NAMES:
        state, phases = State(), dict[str, ModelState]()
        for body in bodies(name):
            for model_id, model in state.apply(decode_event(body)).models.items():
                moves.add((phases.get(model_id, ModelState.UNLOADED), model.phase))
                phases[model_id] = model.phase
    moves = {(before, after) for before, after in moves if before is not after}
    assert moves <= known
    assert {after for _, after in moves} == {*ModelState} - {ModelState.LOADING}


@pytest.mark.parametrize("name", NAMES)
async def test_recorded_history_is_a_ledger_that_opens_and_verifies(name: str, tmp_path: Path) -> None:
    path, state, digest = tmp_path / "ledger.db", State(), GENESIS
    with closing(connect(path)) as connection:
        for position, body in enumerate(bodies(name), 1):
            head, digest = LogHead(state.position, digest), hash_body(digest, body)
            attempt = Transaction(state)
            attempt.apply(decode_event(body))
            connection.execute(WRITE_GROUP, group_of([Row(position, body, digest)], attempt.changes, head))
            attempt.commit()
        storage.rebuild(connection)
        assert replay(connection, None)[1].models == state.models
    verification = verify(path)
    assert verification.verified, verification.finding
    assert verification.compared
    async with opened(path) as log:
        assert log.state.models == state.models
        assert log.state.registers == state.registers
        await log.server_started()
