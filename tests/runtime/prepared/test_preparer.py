"""What is offered to be prepared: once for the same files, as often as may be, and nothing is left behind."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support import models
from support.forms import found
from support.prepared import key_in, opened
from support.workers import running_pool, until

from runtime.errors import (
    Exit,
    ForkServerUnavailable,
    InferenceFailed,
    InferenceTimeout,
    RuntimeProblem,
    WorkerDied,
)
from runtime.prepared.blame import is_circumstance
from runtime.prepared.preparation import Candidate
from runtime.prepared.preparing import MAX_ATTEMPTS, Preparer
from runtime.prepared.store import PreparedStore
from runtime.processes.pool import WorkerPool
from runtime.repository import Repository


@pytest.fixture
async def pool() -> AsyncIterator[WorkerPool]:
    async with running_pool() as pool:
        yield pool


@pytest.fixture
def store(tmp_path: Path) -> PreparedStore:
    return opened(tmp_path)


def candidate(root: Path, model_id: str, load_job_id: str, peak_bytes: int = 50 * 10**6) -> Candidate:
    return Candidate(load_job_id, model_id, 1, found(root / model_id / "1"), peak_bytes)


def preparer_of(store: PreparedStore, pool: WorkerPool, root: Path) -> Preparer:
    return Preparer(store, pool, Repository(root), lambda: None)


async def offered(preparer: Preparer, *candidates: Candidate) -> None:
    for each in candidates:  # one by one: whose files are looked at first is offered first
        preparer.offer(each)
        await asyncio.gather(*preparer._looks)


async def test_the_same_files_are_offered_once(
    pool: WorkerPool, store: PreparedStore, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        models.save(models.add(1), tmp_path, name)
    models.save(models.add(2), tmp_path, "three")
    preparer = preparer_of(store, pool, tmp_path)
    await offered(preparer, *(candidate(tmp_path, name, name) for name in ("one", "two", "three")))
    assert set(preparer.preparable) == {"one", "three"}


async def test_what_is_known_by_the_time_that_it_would_be_prepared_is_not(
    pool: WorkerPool, store: PreparedStore, tmp_path: Path
) -> None:
    models.save(models.add(1), tmp_path, "m")
    preparer = preparer_of(store, pool, tmp_path)
    await offered(preparer, candidate(tmp_path, "m", "a1"))
    store.settle_none(key_in(tmp_path, "m"), {}, model_id="other", version=1)
    preparer.begin("a1")
    await until(lambda: preparer.preparation is None)
    [entry] = store.entries()
    assert entry.model_id == "other"


async def test_what_is_stopped_again_and_again_is_given_up_for_now(
    pool: WorkerPool, store: PreparedStore, tmp_path: Path
) -> None:
    models.save(models.slow_to_fold(side=600, depth=20), tmp_path, "m")
    preparer = preparer_of(store, pool, tmp_path)
    await offered(preparer, candidate(tmp_path, "m", "a1"))
    for _ in range(MAX_ATTEMPTS):
        assert set(preparer.preparable) == {"a1"}
        preparer.begin("a1")
        await until(lambda: bool(pool._workers))
        for worker in list(pool._workers):
            worker.kill()
        await until(lambda: preparer.preparation is None)
    assert not preparer.preparable
    entry = store.find(key_in(tmp_path, "m"))
    assert entry is not None
    assert entry.form is None
    assert entry.tried["prepacked"].endswith(f"{MAX_ATTEMPTS} times")
    await offered(preparer, candidate(tmp_path, "m", "a2", peak_bytes=0))
    assert not preparer.preparable


async def test_whenever_it_is_stopped_nothing_is_left_behind(
    pool: WorkerPool, store: PreparedStore, tmp_path: Path
) -> None:
    models.save(models.add(1), tmp_path, "m")
    for turns in range(40):
        preparer = preparer_of(store, pool, tmp_path)
        await offered(preparer, candidate(tmp_path, "m", "a1"))
        preparer.begin("a1")
        for _ in range(turns):
            await asyncio.sleep(0)
        preparer.stop()
        preparer.stop()
        await until(lambda preparer=preparer: preparer.preparation is None)  # type: ignore[misc]
        assert list((tmp_path / "prepared").iterdir()) == []
        assert not store._folder._drafts
        assert not pool._workers


@pytest.mark.parametrize(
    "problem",
    [
        WorkerDied(Exit(None, signal.SIGKILL)),
        WorkerDied(Exit(None, None)),
        InferenceTimeout(),
        ForkServerUnavailable(),
    ],
    ids=["killed", "unknown", "too long", "no fork server"],
)
def test_a_form_is_not_blamed_for_what_somebody_else_may_have_done(problem: RuntimeProblem) -> None:
    assert is_circumstance(problem)


@pytest.mark.parametrize(
    "problem",
    [WorkerDied(Exit(None, signal.SIGSEGV)), WorkerDied(Exit(1, None)), InferenceFailed("no")],
    ids=["crashed", "exited", "failed"],
)
def test_a_form_is_blamed_for_what_its_worker_does_by_itself(problem: RuntimeProblem) -> None:
    assert not is_circumstance(problem)
