"""Replay: the state at any moment comes from the events alone."""

import json
from pathlib import Path

import pytest
from support import ledgers

from events.audit.replay import replay
from events.sqlite.queries import as_text
from events.sqlite.readonly import open_read_only
from events.sqlite.timetravel import BeforeFirst, BeyondHead, Moment

LEDGER = ledgers.sound_ledger(3, seconds=0.5)
"""At most two of its events have the same time."""


def replayed(path: Path, until: object) -> tuple[Moment, list[str], list[str]]:
    with open_read_only(path) as ledger:
        moment, state = replay(ledger, None if until is None else str(until))
        return moment, sorted(map(as_text, state.models.values())), list(map(as_text, state.unended()))


with ledgers.copy_of(LEDGER) as _path:
    ROWS = ledgers.rows_of(_path)
    HEAD = len(ROWS)
    TIMES = [json.loads(body)["recorded_at"] for _, body, _ in ROWS]
    PAST = {moment: replayed(_path, moment) for moment in (None, *range(HEAD + 1), *TIMES)}


def test_time_replays_the_last_event_by_then() -> None:
    for position, time in enumerate(TIMES, 1):
        last = max(each for each in range(position, HEAD + 1) if TIMES[each - 1] == time)
        assert PAST[time][1:] == PAST[last][1:]
        assert PAST[time][0].position == last
    assert PAST[None][1:] == PAST[HEAD][1:]


def test_moment_outside_the_log_is_refused() -> None:
    with ledgers.copy_of(LEDGER) as path:
        with pytest.raises(BeyondHead):
            replayed(path, HEAD + 1)
        with pytest.raises(BeforeFirst, match="2025-12-31T23:59:59Z is before the first event"):
            replayed(path, "2025-12-31T23:59:59Z")


def test_replay_ignores_forged_history() -> None:
    with ledgers.copy_of(LEDGER) as path:
        ledgers.change_ledger(
            path, "DELETE FROM model_history", "UPDATE presence SET state = 'running', seen_at = at"
        )
        for moment, past in PAST.items():
            assert replayed(path, moment) == past, moment
