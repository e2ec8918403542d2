"""Projections that other folds made are rebuilt from the log before anything uses them."""

import logging
from contextlib import closing
from pathlib import Path

import pytest
from support.history import History, opened, write
from support.ledgers import change_ledger, sample_history, store_events, stored

from events.audit.verify import verify
from events.errors import LogUnavailable
from events.sqlite import storage
from events.sqlite.queries import EVENTS_PER_READ
from events.sqlite.schema import connect
from events.sqlite.storage import FOLDS, is_current
from events.state import State
from events.types import Event

HISTORY = sample_history()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def write_outdated(path: Path, facts: list[Event]) -> None:
    """Write a ledger whose stored jobs and models are of folds that knew less."""
    with closing(connect(path)) as connection:
        store_events(connection, facts)
        connection.execute("UPDATE jobs SET body = json_remove(body, '$.cancel_requested')")
        connection.execute("UPDATE models SET body = json_remove(body, '$.incidents')")
        connection.execute("UPDATE projected SET folds = 0")


def projections(path: Path) -> dict[str, list[tuple[object, ...]]]:
    return stored(path, "jobs", "models", "projected")


async def open_once(path: Path) -> None:
    async with opened(path):
        pass


@pytest.mark.parametrize("facts", [HISTORY, []], ids=["history", "empty"])
async def test_outdated_projections_are_rebuilt_once(
    path: Path, facts: list[Event], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    write_outdated(path, facts)
    before, state = verify(path), State()
    assert before.verified
    assert not before.compared  # nothing is reported before, and nothing is claimed either
    for event in facts:
        state.apply(event)
    async with opened(path) as log:
        assert (f"{len(facts)} events are folded anew" in caplog.text) == bool(caplog.text) == bool(facts)
        assert log.state.models == state.models
        assert log.state.unended() == state.unended()
        await write(log, 1)
    after = verify(path)
    assert after.verified, after.finding
    assert after.compared
    caplog.clear()
    async with opened(path) as log:
        assert log.head.position == len(facts) + 1
    assert not caplog.text


async def test_projections_are_rebuilt_for_other_folds_only(path: Path) -> None:
    with closing(connect(path.with_name("new.db"))) as connection:
        assert is_current(connection)
    write_outdated(path, HISTORY)
    await open_once(path)
    sound = projections(path)
    for folds in (0, FOLDS + 1):
        change_ledger(
            path,
            f"UPDATE projected SET folds = {folds}",
            "DELETE FROM models",
            "DELETE FROM jobs WHERE id = 'L0'",
            keeps_triggers=True,
        )
        assert not verify(path).compared
        await open_once(path)
        assert projections(path) == sound
    with closing(connect(path)) as connection:
        assert is_current(connection)
        storage.rebuild(connection)
    assert projections(path) == sound
    change_ledger(path, "DELETE FROM models WHERE id = 'other'")
    await open_once(path)
    finding = verify(path).finding  # what somebody changed is not mended in passing
    assert finding is not None
    assert finding.problem == "the stored models lack 'other'"
    change_ledger(path, "DELETE FROM projected")
    with pytest.raises(LogUnavailable, match="position of the stored projections is missing"):
        await open_once(path)


async def test_log_longer_than_a_page_is_folded_to_its_end(path: Path) -> None:
    history = History()
    for number in range(EVENTS_PER_READ):
        history.ask_load(f"L{number}", of=f"m{number % 7}")
        history.start_load(f"L{number}", of=f"m{number % 7}")
        if number % 3:
            history.fail_load(f"L{number}", of=f"m{number % 7}")
    write_outdated(path, history.facts)
    await open_once(path)
    verification = verify(path)
    assert verification.verified, verification.finding
    assert verification.compared


async def test_failed_rebuild_changes_nothing_and_names_the_event(path: Path) -> None:
    write_outdated(path, HISTORY)
    before = stored(path, "jobs", "models")
    change_ledger(
        path,
        "UPDATE events SET body = json_set(body, '$.data', 7, '$.type', 'LoadStarted') WHERE position = 3",
    )
    with pytest.raises(LogUnavailable, match="its event 3 is not valid"):
        await open_once(path)
    assert stored(path, "jobs", "models") == before


@pytest.mark.parametrize(("table", "key"), [("models", "digits"), ("jobs", "L0")])
async def test_rebuild_names_keys_that_became_bytes(path: Path, table: str, key: str) -> None:
    write_outdated(path, HISTORY)
    await open_once(path)
    sound = projections(path)
    change_ledger(path, f"UPDATE {table} SET id = CAST(id AS BLOB)", keeps_triggers=True)
    differences = storage.rebuild_file(path).differences
    assert f"the stored {table} lacked {key!r}" in differences
    assert f"the stored {table} had, and the log does not give, {key.encode()!r}" in differences
    assert projections(path) == sound
    assert verify(path).verified


@pytest.mark.parametrize(
    ("statement", "difference"),
    [
        ("UPDATE model_history SET body = '{}' WHERE position = 3", "model_history differed at position 3"),
        ("DELETE FROM model_history WHERE position > 2", "model_history differed at position 3"),
        (
            "INSERT INTO model_history VALUES (9999, 'zoo', 0, '{}')",
            "model_history differed at position 9999",
        ),
        ("UPDATE presence SET state = 'stopped' WHERE position = 1", "presence differed at position 1"),
        ("UPDATE jobs SET landmark = landmark + 1 WHERE id = 'L0'", "jobs differed at 'L0'"),
    ],
)
async def test_rebuild_names_the_history_that_differed(path: Path, statement: str, difference: str) -> None:
    write_outdated(path, HISTORY)
    await open_once(path)
    assert storage.rebuild_file(path).differences == []
    assert change_ledger(path, statement, keeps_triggers=True) > 0
    assert not verify(path).verified
    assert storage.rebuild_file(path).differences == [f"the stored {difference}"]
    assert verify(path).verified
