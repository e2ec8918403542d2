"""What is stored beside the log is what the log says, whatever it says and however it was grouped."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st
from support.events import FEWER, MODEL, History, drafts, load_requested, model_loaded, opened

from events import store
from events.bodies import from_body
from events.commands import Record
from events.jobs import Job, JobStatus
from events.models import Model
from events.state import State
from events.types import SYSTEM, Data, Draft, LoadStarted
from events.verify import verify

GROUPS = st.lists(st.lists(st.lists(drafts(), min_size=1, max_size=3), min_size=1, max_size=6), max_size=6)
"""Groups of commands of facts: each group is handed over at once."""


def rows(path: Path, sql: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        return connection.execute(sql).fetchall()


def rebuild(path: Path) -> tuple[State, dict[str, Job]]:
    """Fold the log from its base, one event at a time, with no other help."""
    state, jobs = State(), dict[str, Job]()
    for (body,) in rows(path, "SELECT body FROM events ORDER BY position"):
        jobs.update(state.apply(from_body(str(body))).jobs)
    return state, jobs


def stored_models(path: Path) -> dict[str, Model]:
    return {str(key): store.as_model(str(body)) for key, body in rows(path, "SELECT id, body FROM models")}


def stored_jobs(path: Path) -> dict[str, Job]:
    return {str(key): store.as_job(str(body)) for key, body in rows(path, "SELECT id, body FROM jobs")}


async def write_groups(path: Path, groups: list[list[list[Draft]]]) -> State:
    async with opened(path) as log:
        for group in groups:
            await asyncio.gather(*(log.submit(Record(tuple(command))) for command in group))
        return log.state


async def reopened(path: Path) -> State:
    async with opened(path) as log:
        return log.state


@FEWER
@given(GROUPS)
def test_stored_tables_are_what_folding_from_the_base_gives(groups: list[list[list[Draft]]]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        live = asyncio.run(write_groups(path, groups))
        state, jobs = rebuild(path)
        assert state.position == sum(len(command) for group in groups for command in group)
        assert rows(path, "SELECT position FROM projected") == [(state.position,)]
        assert stored_models(path) == state.models == live.models
        assert stored_jobs(path) == jobs
        assert live.unended() == state.unended()
        assert live.jobs.keys() == {job.id for job in state.unended()}
        assert asyncio.run(reopened(path)) == live
        assert_queried_by_what_is_said(path)
        verification = verify(path)
        assert verification.verified, verification.finding
        assert verification.events == state.position


def assert_queried_by_what_is_said(path: Path) -> None:
    """The generated columns must be what the bodies say."""
    for body, *queried in rows(path, "SELECT body, type, model_id, job_id, actor, recorded_at FROM events"):
        event = from_body(str(body))
        assert queried == [event.type, event.model_id, event.job_id, event.actor, event.recorded_at]
    columns = rows(path, "SELECT id, created_position, model_id, status FROM jobs")
    assert set(columns) == {
        (job.id, job.created_position, job.model_id, str(job.status)) for job in stored_jobs(path).values()
    }


def test_an_entity_reads_back_from_the_table_as_it_was() -> None:
    history = History()
    history.load("L")
    history.ask_load("L2", version=2)
    history.start_load("L2", version=2)
    history.ask_unload("U", "L", force=True)
    history.fail_load("L2", version=2)
    history.kill_worker("w-L")
    model = history.model()
    assert store.as_model(store.as_text(model)) == model
    for job in history.state.jobs.values():
        assert store.as_job(store.as_text(job)) == job


async def test_a_model_and_its_jobs_are_stored_with_the_events_that_change_them(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    steps: list[tuple[Data, JobStatus]] = [
        (load_requested(), JobStatus.PENDING),
        (LoadStarted(1), JobStatus.IN_PROGRESS),
        (model_loaded(), JobStatus.COMPLETED),
    ]
    async with opened(path) as log:
        for number, (data, status) in enumerate(steps):
            draft = Draft("L" if number == 0 else f"e{number}", data, SYSTEM, "L", MODEL, 1)
            receipt = await log.submit(Record((draft,)))
            assert rows(path, "SELECT position FROM projected") == [(receipt.position,)]
            assert stored_jobs(path)["L"].status is status
            assert stored_jobs(path)["L"].position == receipt.position
        assert stored_models(path)[MODEL] == log.state.models[MODEL]
        assert not log.state.jobs
