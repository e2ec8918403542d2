"""A request that is repeated with its Idempotency-Key is answered with the first job, for 24 hours."""

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.events import FEWER, MODEL, PLAIN, START, History, at, drafts, ids, load_requested, opened

from events import store
from events.accept import Accepted, Decision, Existing, Refused, accept
from events.bodies import from_body
from events.commands import (
    KEPT_S,
    Command,
    KnownKey,
    Record,
    RequestCancel,
    RequestLoad,
    RequestUnload,
    key_of,
)
from events.errors import LogUnavailable, RequestRefused
from events.log import Log, Receipt
from events.schema import connect
from events.state import State
from events.types import (
    SYSTEM,
    CancelRequested,
    Cause,
    Draft,
    Idempotency,
    LoadFailed,
    LoadRequested,
    UnloadRequested,
    recorded,
)
from events.verify import verify

KEY = Idempotency("k", "f")
OTHER_REQUEST = Idempotency("k", "g")
OTHER_KEY = Idempotency("l", "f")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def load(key: Idempotency | None = KEY, model_id: str = MODEL) -> RequestLoad:
    return RequestLoad(model_id, 1, (), "alice", idempotency=key)


def unload(key: Idempotency | None = KEY, model_id: str | None = MODEL) -> RequestUnload:
    return RequestUnload(model_id, "alice", idempotency=key)


def cancel(job_id: str, key: Idempotency | None = KEY) -> RequestCancel:
    return RequestCancel(job_id, "alice", key)


def decide(history: History, command: Command, after_s: float = 0) -> Decision:
    return accept(history.state, command, lambda: "new", at(history.seconds + after_s))


# What is decided, as tables. The first request has the key `k`, in each of the three ways to use one up.


def use_up_by_load(history: History) -> None:
    history.add(replace(load_requested(), idempotency=KEY), "L", by="alice")


def use_up_by_unload(history: History) -> None:
    history.load("M")
    history.add(UnloadRequested(force=False, load_job_id="M", cause=Cause.REQUEST, idempotency=KEY), "U")


def use_up_by_cancel(history: History) -> None:
    history.ask_load("N")
    history.add(CancelRequested(KEY), "N")


FIRST: dict[str, Callable[[History], None]] = {
    "load": use_up_by_load,
    "unload": use_up_by_unload,
    "cancel": use_up_by_cancel,
}
JOBS = {"load": "L", "unload": "U", "cancel": "N"}


def first(kind: str) -> History:
    history = History()
    FIRST[kind](history)
    return history


@pytest.mark.parametrize("kind", FIRST)
@pytest.mark.parametrize("command", [load(), unload(), cancel("X")], ids=["load", "unload", "cancel"])
def test_the_same_key_and_fingerprint_is_the_first_job_whatever_became_of_it(
    kind: str, command: Command
) -> None:
    history = first(kind)
    assert decide(history, command) == Existing(JOBS[kind])
    history.end_cancelled(JOBS[kind])
    history.restart()
    assert decide(history, command) == Existing(JOBS[kind])


@pytest.mark.parametrize("kind", FIRST)
@pytest.mark.parametrize(
    "command",
    [load(OTHER_REQUEST), unload(OTHER_REQUEST), cancel("L", OTHER_REQUEST)],
    ids=["load", "unload", "cancel"],
)
def test_the_same_key_for_another_request_is_refused_with_what_to_do(kind: str, command: Command) -> None:
    decision = decide(first(kind), command)
    assert isinstance(decision, Refused)
    assert decision.code == "idempotency_mismatch"
    assert JOBS[kind] in decision.message
    assert "new key" in decision.message


@pytest.mark.parametrize("key", [None, OTHER_KEY])
def test_another_key_or_none_is_another_request(key: Idempotency | None) -> None:
    history = first("load")
    history.end_load("L")
    assert isinstance(decide(history, unload(key)), Accepted)


@pytest.mark.parametrize(
    ("after_s", "holds"), [(0, True), (KEPT_S - 1e-6, True), (KEPT_S, False), (2 * KEPT_S, False)]
)
@pytest.mark.parametrize("command", [unload(), unload(OTHER_REQUEST)], ids=["same", "other"])
def test_a_key_stands_for_its_request_for_24_hours(
    after_s: float,
    holds: bool,  # noqa: FBT001 - a column of the table
    command: RequestUnload,
) -> None:
    history = first("load")
    history.end_load("L", of=MODEL)
    since_key = history.seconds - 1  # the key was used a second before the load ended
    decision = accept(history.state, command, lambda: "new", at(since_key + after_s))
    assert isinstance(decision, Accepted) is not holds


def test_a_key_that_was_used_again_after_it_was_forgotten_stands_for_the_later_request() -> None:
    history = first("load")
    history.end_load("L")
    history.add(UnloadRequested(False, "L", Cause.REQUEST, None, OTHER_REQUEST), "U", after_s=KEPT_S)
    assert decide(history, unload(OTHER_REQUEST)) == Existing("U")
    assert isinstance(decide(history, load(KEY)), Refused)


@pytest.mark.parametrize("command", [load(), unload(), cancel("L")], ids=["load", "unload", "cancel"])
def test_an_accepted_request_is_recorded_with_its_key(command: Command) -> None:
    history = History()
    if not isinstance(command, RequestLoad):
        history.load("L")
    if isinstance(command, RequestCancel):
        history.ask_unload("U", "L")
        command = cancel("U")
    decision = decide(history, command)
    assert isinstance(decision, Accepted)
    (draft,) = decision.drafts
    assert isinstance(draft.data, LoadRequested | UnloadRequested | CancelRequested)
    assert draft.data.idempotency == KEY
    known = key_of(recorded(draft, 9, at(9)))
    assert known == ("k", KnownKey("f", decision.job_id or "", at(9)))


@dataclass(frozen=True)
class Asked:
    """A request so long after the one before."""

    command: RequestLoad | RequestUnload | RequestCancel
    after_s: float


KEYS = st.builds(Idempotency, st.sampled_from("kl"), st.sampled_from("fg")) | st.none()
MODELS = st.sampled_from(["m", "n"])
COMMANDS = (
    st.builds(load, KEYS, MODELS)
    | st.builds(unload, KEYS, MODELS | st.none())
    | st.builds(cancel, st.sampled_from(["j1", "j2", "j3"]), KEYS)
)
ASKED = st.builds(Asked, COMMANDS, st.sampled_from([0, 1, 3_600, KEPT_S / 2, KEPT_S - 1, KEPT_S, 2 * KEPT_S]))


class Oracle:
    """Who remembers every key that an accepted request used up, and when."""

    def __init__(self) -> None:
        self.used: dict[str, tuple[str, str, float]] = {}

    def expects(self, key: Idempotency | None, seconds: float) -> str | None:
        """Return the job that answers, `idempotency_mismatch`, or None where the key says nothing."""
        if key is None or key.key_hash not in self.used:
            return None
        fingerprint, job_id, then = self.used[key.key_hash]
        if seconds - then >= KEPT_S:
            return None
        return job_id if fingerprint == key.fingerprint else "idempotency_mismatch"


@PLAIN
@given(st.lists(ASKED, max_size=25))
def test_within_24_hours_a_key_always_gives_the_first_job_and_is_used_up_by_nothing_else(
    requests: list[Asked],
) -> None:
    state, oracle, new_id, seconds = State(), Oracle(), ids("j"), 0.0
    for asked in requests:
        seconds += asked.after_s
        key = asked.command.idempotency
        expected = oracle.expects(key, seconds)
        decision = accept(state, asked.command, new_id, at(seconds))
        if expected is not None:
            assert expected in (getattr(decision, "job_id", None), getattr(decision, "code", None))
            assert not isinstance(decision, Accepted)
        elif isinstance(decision, Accepted):
            assert decision.job_id is not None
            if key is not None:
                oracle.used[key.key_hash] = (key.fingerprint, decision.job_id, seconds)
            for draft in decision.drafts:
                state.apply(recorded(draft, state.position + 1, at(seconds)))
        else:
            assert not (isinstance(decision, Refused) and decision.code == "idempotency_mismatch")


# In the log.


async def outcome(log: Log, command: Command) -> str:
    """Return the job that answers, or the code of the refusal."""
    try:
        receipt = await log.submit(command)
    except RequestRefused as refused:
        return refused.code
    return f"{'' if receipt.existing else 'new '}{receipt.job_id}"


class Clock:
    """A wall clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.moment = START

    def __call__(self) -> datetime:
        return self.moment


async def outcomes_of(path: Path, groups: list[list[Asked]], *, reopens: bool) -> list[list[str]]:
    """Submit these groups to a log of their own, opened anew for each or not."""
    found, new_id, clock = [], ids("j"), Clock()
    for run in [[group] for group in groups] if reopens else [groups]:
        async with opened(path, new_id=new_id, now=clock, monotonic=float) as log:
            for group in run:
                clock.moment += timedelta(seconds=group[0].after_s)
                found.append(await asyncio.gather(*(outcome(log, asked.command) for asked in group)))
            assert not log.state.keys  # they are in the log
    return found


def outcomes_in_memory(groups: list[list[Asked]]) -> list[list[str]]:
    """Decide the same with a state that forgets nothing."""
    state, new_id, seconds = State(), ids("j"), 0.0
    found = []
    for group in groups:
        seconds += group[0].after_s
        answers = []
        for asked in group:
            decision = accept(state, asked.command, new_id, at(seconds))
            match decision:
                case Accepted(accepted, job_id):
                    for draft in accepted:
                        state.apply(recorded(draft, state.position + 1, at(seconds)))
                    answers.append(f"new {job_id}")
                case Existing(job_id):
                    answers.append(job_id)
                case Refused(code):
                    answers.append(code)
        found.append(answers)
    return found


@FEWER
@given(st.lists(st.lists(ASKED, min_size=1, max_size=4), min_size=1, max_size=6))
@example([[Asked(load(), 0), Asked(load(), 0), Asked(load(OTHER_REQUEST), 0)]])
def test_the_log_answers_as_if_it_held_all_keys_in_memory(groups: list[list[Asked]]) -> None:
    expected = outcomes_in_memory(groups)
    for reopens in (False, True):
        with TemporaryDirectory() as folder:
            path = Path(folder) / "ledger.db"
            assert asyncio.run(outcomes_of(path, groups, reopens=reopens)) == expected
            assert verify(path).verified


async def test_requests_at_once_with_one_key_are_one_job(path: Path) -> None:
    async with opened(path, new_id=ids("j")) as log:
        same = [log.submit(load()) for _ in range(5)]
        others = [log.submit(load(OTHER_REQUEST, "other")) for _ in range(5)]
        results = await asyncio.gather(*same, *others, return_exceptions=True)
        assert results[:5] == [Receipt("j1", existing=number > 0, position=1) for number in range(5)]
        assert {type(result) for result in results[5:]} == {RequestRefused}
        assert log.head.position == 1


async def test_an_ended_job_answers_for_its_key_where_the_request_alone_would_make_a_new_one(
    path: Path,
) -> None:
    async with opened(path, new_id=ids("j")) as log:
        await log.submit(load())
        await log.submit(Record((Draft("e", LoadFailed("x", "y"), SYSTEM, "j1", MODEL, 1),)))
        assert await log.submit(load()) == Receipt("j1", existing=True, position=2)
        assert (await log.submit(load(None))).job_id == "j2"
    async with opened(path) as log:
        assert await log.submit(load()) == Receipt("j1", existing=True, position=3)


async def test_a_refused_or_a_joined_request_does_not_use_its_key_up(path: Path) -> None:
    async with opened(path, new_id=ids("j")) as log:
        assert await outcome(log, unload(KEY)) == "not_loaded"
        assert await outcome(log, load(None)) == "new j1"
        assert await outcome(log, load(KEY)) == "j1"  # joined, so nothing was appended
        assert await outcome(log, load(replace(KEY, fingerprint="other"), "other")) == "new j2"
        assert await outcome(log, load(KEY)) == "idempotency_mismatch"


async def test_a_request_that_was_not_recorded_has_not_used_its_key_up(path: Path) -> None:
    async with opened(path, new_id=ids("j")) as log:
        await log.submit(load(None, "first"))
        assert log._database._connection is not None
        log._database._connection.execute("PRAGMA busy_timeout = 20")
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(LogUnavailable):
                await log.submit(load(KEY))
            other.execute("ROLLBACK")
        assert await outcome(log, load(OTHER_REQUEST, "other")) == "new j3"
        assert await outcome(log, load(KEY)) == "idempotency_mismatch"


async def test_a_log_whose_keys_cannot_be_read_refuses_and_recovers_by_itself(path: Path) -> None:
    async with opened(path, new_id=ids("j")) as log:
        await log.submit(load(KEY))
        assert log._database._connection is not None
        log._database._connection.close()
        with pytest.raises(LogUnavailable):
            await log.submit(load(KEY))
        assert await outcome(log, load(KEY)) == "j1"
        assert log.healthy


@FEWER
@given(st.lists(drafts(), max_size=20), st.data())
def test_what_the_log_knows_of_a_key_is_what_folding_it_gives(
    facts: list[Draft], data: st.DataObject
) -> None:
    keys = st.sampled_from([KEY, OTHER_REQUEST, OTHER_KEY, None])
    given_facts = [
        replace(draft, data=replace(draft.data, idempotency=data.draw(keys)))
        if isinstance(draft.data, LoadRequested | UnloadRequested | CancelRequested)
        else draft
        for draft in facts
    ]

    async def written(path: Path) -> None:
        async with opened(path) as log:
            await asyncio.gather(*(log.submit(Record((draft,))) for draft in given_facts))

    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        asyncio.run(written(path))
        state = State()
        with closing(connect(path)) as connection:
            for (body,) in connection.execute("SELECT body FROM events ORDER BY position"):
                state.apply(from_body(body))
            assert store.read_keys(connection, ["k", "l", "never"]) == state.keys


async def test_keys_are_found_by_an_index_that_holds_no_other_events(path: Path) -> None:
    async with opened(path) as log:
        await log.submit(load(KEY))
        await log.submit(load(None, "other"))
    with closing(sqlite3.connect(path)) as connection:
        plan = connection.execute(
            "EXPLAIN QUERY PLAN SELECT body FROM events WHERE idempotency_key = 'k' ORDER BY position DESC"
        ).fetchall()
        assert [row[3] for row in plan] == [
            "SEARCH events USING INDEX events_by_idempotency_key (idempotency_key=?)"
        ]
        assert connection.execute("SELECT idempotency_key FROM events").fetchall() == [("k",), (None,)]
