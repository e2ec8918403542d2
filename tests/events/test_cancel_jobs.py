"""Which jobs may still be cancelled, as a table, and what that leaves in a ledger.

`L…` are loads and `U` an unload of the model `digits`; the new event is called `new`.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.events import MODEL, History, at, ids, model_loaded, opened

from events.accept import Accepted, Decision, Existing, Refused, accept
from events.commands import Record, RequestCancel, RequestLoad
from events.errors import RequestRefused
from events.jobs import JobStatus
from events.log import Receipt
from events.reader import open_reader
from events.types import SYSTEM, CancelRequested, Cause, Draft, Idempotency, JobCancelled
from events.verify import verify

Told = Callable[[History], object]

STEPS: dict[str, Told] = {
    "ask": lambda h: h.ask_load("L"),
    "start": lambda h: h.start_load("L"),
    "load": lambda h: h.load("L"),
    "end": lambda h: h.end_load("L"),
    "fail": lambda h: h.fail_load("L"),
    "swap": lambda h: h.load("L2", version=2),
    "ask_end_of_old": lambda h: h.ask_unload("S", "L", cause=Cause.SWAP),
    "start_end_of_old": lambda h: h.start_unload("S"),
    "ask_unload": lambda h: h.ask_unload("U", "L"),
    "force": lambda h: h.ask_unload("U", "L", force=True),
    "evict": lambda h: h.ask_unload("U", "L", cause=Cause.EVICTION),
    "start_unload": lambda h: h.start_unload("U"),
    "end_unload": lambda h: h.end_unload("U"),
    "cancel": lambda h: h.ask_cancel("L"),
    "cancel_unload": lambda h: h.ask_cancel("U"),
    "cancelled": lambda h: h.end_cancelled("L"),
    "restart": lambda h: h.restart(),
}

LATE = "already_started"

CANCELS: list[tuple[str, str, str, str]] = [
    # facts, the job to cancel, then: `new`, `existing`, or the code of a refusal
    ("a pending load", "ask", "L", "new"),
    ("a load under way", "ask start", "L", "new"),
    ("a load that is tried again after a start of the server", "ask start restart", "L", "new"),
    ("a load that is loaded", "load", "L", "already_finished"),
    ("a load that failed", "ask start fail", "L", "already_finished"),
    ("a load that was cancelled", "ask cancelled", "L", "already_finished"),
    ("a load that is being cancelled", "ask cancel", "L", "existing"),
    ("a load that is being cancelled, and began", "ask cancel start", "L", "existing"),
    ("a load that is being cancelled, and the server died", "ask start cancel restart", "L", "existing"),
    ("a load that was to be cancelled, too late", "ask start cancel end", "L", "already_finished"),
    ("a pending unload", "load ask_unload", "U", "new"),
    ("a pending unload with force", "load force", "U", "new"),
    ("a pending eviction", "load evict", "U", "new"),
    ("an unload that is being cancelled", "load ask_unload cancel_unload", "U", "existing"),
    ("an unload under way", "load ask_unload start_unload", "U", "already_started"),
    (
        "an unload that was to be cancelled, too late",
        "load ask_unload cancel_unload start_unload",
        "U",
        "already_started",
    ),
    ("an unload under way when the server died", "load ask_unload start_unload restart", "U", LATE),
    ("an unload that is pending again", "load ask_unload restart", "U", "new"),
    ("an unload that has ended", "load ask_unload start_unload end_unload", "U", "already_finished"),
    ("the end of what was swapped out", "load swap ask_end_of_old", "S", "already_started"),
    ("the end of what was swapped out, under way", "load swap ask_end_of_old start_end_of_old", "S", LATE),
    ("a job that there never was", "load", "X", "already_finished"),
]  # fmt: skip


def told(words: str) -> History:
    history = History()
    for word in words.split():
        STEPS[word](history)
    return history


def decide(history: History, job_id: str, key: Idempotency | None = None) -> Decision:
    return accept(history.state, RequestCancel(job_id, "bob", key), lambda: "new", at(9_999))


@pytest.mark.parametrize(
    ("facts", "job", "outcome"), [row[1:] for row in CANCELS], ids=[row[0] for row in CANCELS]
)
def test_outcome_of_cancelling(facts: str, job: str, outcome: str) -> None:
    match decide(told(facts), job):
        case Accepted((Draft(id="new", data=CancelRequested()),), job_id):
            assert (outcome, job_id) == ("new", job)
        case Existing(job_id):
            assert (outcome, job_id) == ("existing", job)
        case Refused(code, message):
            assert code == outcome
            assert job in message
        case decision:
            pytest.fail(f"{decision}")


def test_an_accepted_cancel_is_one_event_about_the_job_to_cancel() -> None:
    history = History()
    history.ask_load("L", version=3)
    key = Idempotency("5f" * 32, "c0" * 32)
    draft = Draft("new", CancelRequested(key), "bob", "L", MODEL, 3)
    assert decide(history, "L", key) == Accepted((draft,), "L")


def test_a_cancel_is_taken_when_the_queue_is_full() -> None:
    history = History()
    for number in range(300):
        history.ask_load(f"Q{number}", of=f"model{number}")
    assert isinstance(decide(history, "Q7"), Accepted)


async def test_a_cancelled_job_is_answered_for_with_its_own_id(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with opened(path, new_id=ids("j")) as log, open_reader(path) as reader:
        await log.submit(RequestLoad(MODEL, 1, (), "alice"))
        assert await log.submit(RequestCancel("j1", "bob")) == Receipt("j1", existing=False, position=2)
        assert await log.submit(RequestCancel("j1", "eve")) == Receipt("j1", existing=True, position=2)
        assert log.state.jobs["j1"].cancelling
        job = await reader.job("j1")
        assert job is not None
        assert (job.status, job.cancel_requested, job.position) == (JobStatus.PENDING, True, 2)
        await log.submit(Record((Draft("e3", JobCancelled(), SYSTEM, "j1", MODEL, 1),)))
        with pytest.raises(RequestRefused) as raised:
            await log.submit(RequestCancel("j1", "bob"))
        assert raised.value.code == "already_finished"
        job = await reader.job("j1")
        assert job is not None
        assert job.status is JobStatus.CANCELLED
    assert verify(path).verified


async def test_a_cancel_that_is_asked_after_a_reopen_finds_that_it_was_asked_before(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with opened(path, new_id=ids("j")) as log:
        await log.submit(RequestLoad(MODEL, 1, (), "alice"))
        await log.submit(RequestCancel("j1", "bob"))
    async with opened(path) as log:
        assert (await log.submit(RequestCancel("j1", "bob"))).existing
        await log.submit(Record((Draft("late", model_loaded(), SYSTEM, "j1", MODEL, 1),)))
        assert MODEL in log.state.models
        assert not log.state.unended()
    assert verify(path).verified
