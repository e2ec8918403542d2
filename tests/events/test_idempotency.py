"""A request repeated with its Idempotency-Key is answered with the first job, for 24 hours."""

import asyncio
import sqlite3
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example
from hypothesis import given as given_any
from hypothesis import strategies as st
from msgspec.structs import replace
from support.history import FEWER, MODEL, START, History, at, given, ids, load_requested, opened, steady
from support.ledgers import FAST_FOLDER, connection_of, lose_connection

from events.accept import accept
from events.audit.verify import verify
from events.commands import Accepted, Command, Decision, Existing, Refused
from events.errors import LogUnavailable, RequestRefused
from events.jobcommands import RequestCancel, RequestLoad, RequestUnload
from events.log import Log
from events.sqlite.writing import FIND_JOINS, FIND_KEYS
from events.state import KEY_LIFETIME_S, State
from events.types import CancelRequested, Cause, Data, Idempotency, UnloadRequested, record_draft

DAY_S = KEY_LIFETIME_S
KEY = Idempotency("k", "f")
OTHER_REQUEST = Idempotency("k", "g")
OTHER_KEY = Idempotency("l", "f")


def load(key: Idempotency | None = KEY, model_id: str = MODEL, actor: str = "alice") -> RequestLoad:
    return RequestLoad(model_id, 1, None, actor, idempotency=key)


def unload(
    key: Idempotency | None = KEY, model_id: str | None = MODEL, actor: str = "alice"
) -> RequestUnload:
    return RequestUnload(model_id, actor, idempotency=key)


def cancel(job_id: str, key: Idempotency | None = KEY, actor: str = "alice") -> RequestCancel:
    return RequestCancel(job_id, actor, key)


def decide(history: History, command: Command, after_s: float = 0) -> Decision:
    return accept(history.state, command, lambda: "new", at(history.seconds + after_s))


# The decision. The first request, of each kind, has the key `k`.


FIRST: dict[str, tuple[str, str, Data]] = {
    "L": ("", "L", replace(load_requested(), idempotency=KEY)),
    "U": ("load", "U", UnloadRequested(force=False, load_job_id="L", cause=Cause.REQUEST, idempotency=KEY)),
    "cancel": ("request", "L", CancelRequested(KEY)),
}


def first(kind: str = "L") -> History:
    facts, job, data = FIRST[kind]
    history = given(facts)
    history.add(data, job, by="alice")
    return history


@pytest.mark.parametrize("kind", FIRST)
def test_repeated_key_returns_first_job(kind: str) -> None:
    history, (_, job, _) = first(kind), FIRST[kind]
    for command in (load(), unload(), cancel("X")):
        assert decide(history, command) == Existing(job)
    for command in (load(OTHER_REQUEST), unload(OTHER_REQUEST), cancel("L", OTHER_REQUEST)):
        decision = decide(history, command)
        assert isinstance(decision, Refused)
        assert decision.code == "idempotency_mismatch"
        assert job in decision.message
        assert "new key" in decision.message
    history.end_cancelled(job)
    history.restart()
    assert decide(history, load()) == Existing(job)


@pytest.mark.parametrize(
    ("after_s", "holds"), [(0, True), (DAY_S - 1e-6, True), (DAY_S, False), (2 * DAY_S, False)]
)
def test_key_expires_after_24_hours(after_s: float, holds: bool) -> None:  # noqa: FBT001
    history = first()
    history.end_load("L")  # a second after the key was used
    for key in (KEY, OTHER_REQUEST):
        assert isinstance(decide(history, unload(key), after_s - 1), Accepted) is not holds
    for other in (None, OTHER_KEY):
        assert isinstance(decide(history, unload(other), after_s - 1), Accepted)


KEYS = st.builds(Idempotency, st.sampled_from("kl"), st.sampled_from("fg")) | st.none()
MODELS = st.sampled_from(["m", "n"])
ACTORS = st.sampled_from(["alice", "bob"])
COMMANDS = (
    st.builds(load, KEYS, MODELS, ACTORS)
    | st.builds(unload, KEYS, MODELS | st.none(), ACTORS)
    | st.builds(cancel, st.sampled_from(["j1", "j2", "j3"]), KEYS, ACTORS)
)
Group = tuple[list[RequestLoad | RequestUnload | RequestCancel], float]
"""Requests at one moment, so many seconds after those before."""

PAUSES = st.sampled_from([0, 1, 3_600, DAY_S / 2, DAY_S - 1, DAY_S, 2 * DAY_S])


def outcomes_in_memory(groups: list[Group]) -> list[list[str]]:
    """Decide these with a state that forgets nothing; an oracle remembers the first job of each key."""
    state, new_id, seconds = State(), ids("j"), 0.0
    used: dict[str, tuple[str, str, float]] = {}
    found: list[list[str]] = []
    for group, pause_s in groups:
        seconds += pause_s
        found.append([])
        for command in group:
            decision = accept(state, command, new_id, at(seconds))
            answer = code_of(decision)
            found[-1].append(answer)
            key = command.idempotency
            fingerprint, job, then = used.get(key.key_hash, ("", "", -DAY_S)) if key else ("", "", -DAY_S)
            if key and seconds - then < DAY_S:
                assert answer == (job if fingerprint == key.fingerprint else "idempotency_mismatch")
                continue
            assert answer != "idempotency_mismatch"
            if isinstance(decision, Accepted):
                if key:
                    used[key.key_hash] = (key.fingerprint, answer.removeprefix("new "), seconds)
                for draft in decision.drafts:
                    state.apply(record_draft(draft, state.position + 1, at(seconds)))
        found[-1].append(f"{state.position} events")
    return found


def code_of(decision: Decision) -> str:
    match decision:
        case Accepted(_, job_id, is_join):
            return f"{'' if is_join else 'new '}{job_id}"
        case Existing(job_id):
            return str(job_id)
        case Refused(code):
            return code


# The log.


async def outcome(log: Log, command: Command) -> str:
    try:
        receipt = await log.submit(command)
    except RequestRefused as refused:
        return refused.code
    return f"{'' if receipt.existing else 'new '}{receipt.job_id}"


async def outcomes_of(path: Path, groups: list[Group], *, reopens: bool) -> list[list[str]]:
    """Submit these groups to a log of their own, opened anew for each or not."""
    moment, found, new_id = START, [], ids("j")

    def now() -> datetime:
        return moment

    for run in [[group] for group in groups] if reopens else [groups]:
        async with opened(path, new_id=new_id, **steady(now)) as log:
            for group, pause_s in run:
                moment += timedelta(seconds=pause_s)
                found.append(await asyncio.gather(*(outcome(log, command) for command in group)))
                found[-1].append(f"{log.head.position} events")
            assert not log.state.keys  # they are in the log
            assert not log.state.joins
    return found


@FEWER
@given_any(st.lists(st.tuples(st.lists(COMMANDS, min_size=1, max_size=4), PAUSES), min_size=1, max_size=6))
@example([([load(), load(), load(OTHER_REQUEST)], 0)])
@example([([load()], 0), ([load(OTHER_REQUEST, "n")], DAY_S), ([load(OTHER_REQUEST, "n"), load()], 0)])
def test_log_answers_as_if_keys_were_in_memory(groups: list[Group]) -> None:
    expected = outcomes_in_memory(groups)
    for reopens in (False, True):
        with TemporaryDirectory(dir=FAST_FOLDER) as folder:
            path = Path(folder) / "ledger.db"
            assert asyncio.run(outcomes_of(path, groups, reopens=reopens)) == expected
            assert verify(path).verified


async def test_failed_write_leaves_key_unused(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with opened(path, new_id=ids("j")) as log:
        await log.submit(load(None, "first"))
        await connection_of(log).execute_fetchall("PRAGMA busy_timeout = 20")
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(LogUnavailable):
                await log.submit(load(KEY))
            other.execute("ROLLBACK")
        assert await outcome(log, load(OTHER_REQUEST, "other")) == "new j3"
        assert await outcome(log, load(KEY)) == "idempotency_mismatch"
        await lose_connection(log)  # the keys cannot be read: the log refuses, and recovers
        caplog.clear()
        with pytest.raises(LogUnavailable, match="the ledger cannot be read: interrupted"):
            await log.submit(load(OTHER_REQUEST))
        [said] = [each for each in caplog.records if each.levelname == "ERROR"]
        assert "the ledger cannot be read" in said.getMessage()
        assert said.exc_info is None
        assert await outcome(log, load(OTHER_REQUEST)) == "j3"
        assert log.healthy


async def test_keys_and_joins_have_indexes_of_their_own(path: Path) -> None:
    async with opened(path, new_id=ids("j")) as log:
        await log.submit(load(KEY))
        for actor in ("bob", "carol", "bob"):
            await log.submit(load(None, actor=actor))
        await log.submit(cancel("j1", None, "bob"))
    with closing(sqlite3.connect(path)) as connection:

        def plan(sql: str) -> list[str]:
            steps = connection.execute(f"EXPLAIN QUERY PLAN {sql}", ("[]",)).fetchall()
            return [step for *_, step in steps if "events" in step]

        joins = connection.execute(FIND_JOINS, ('[["j1", "bob"], ["j1", "alice"]]',)).fetchall()
        assert sorted(joins) == [("j1", "bob", kind) for kind in ("CancelRequested", "LoadJoined")]
        assert plan(FIND_JOINS) == ["SEARCH events USING INDEX events_by_join (job_id=? AND actor=?)"]
        by_key = "SEARCH events USING INDEX events_by_idempotency_key (idempotency_key=?)"
        assert plan(FIND_KEYS) == [by_key]
        keys = connection.execute("SELECT idempotency_key FROM events").fetchall()
        assert keys == [("k",), (None,), (None,), (None,)]
