"""What becomes of preparing models is counted, whether it comes to an end or is stopped."""

import asyncio
from pathlib import Path

from support import models
from support.forms import found
from support.prepared import opened
from support.workers import running_pool, until

from runtime.prepared.counts import KEPT, LEFT_OUT, STOPPED
from runtime.prepared.preparation import FORMS, Candidate
from runtime.prepared.preparing import Preparer
from runtime.repository import Repository


async def prepare(preparer: Preparer, root: Path, model_id: str, *, killed: bool = False) -> None:
    preparer.offer(Candidate("job", model_id, 1, found(root / model_id / "1"), 50 * 10**6))
    await asyncio.gather(*preparer._looks)
    preparer.begin("job")
    if killed:
        await until(lambda: bool(preparer._pool._workers))
        for worker in list(preparer._pool._workers):
            worker.kill()
    await until(lambda: preparer.preparation is None)


async def test_forms_are_counted_by_what_became_of_them(tmp_path: Path) -> None:
    models.save(models.slow_to_fold(side=600, depth=20), tmp_path, "killed")
    models.save(models.add(), tmp_path, "tried")
    async with running_pool() as pool:
        store = opened(tmp_path)
        preparer = Preparer(store, pool, Repository(tmp_path), lambda: None)
        await prepare(preparer, tmp_path, "killed", killed=True)
        assert preparer.counts.tried == {(FORMS[0], STOPPED): 1}
        await preparer.close()
        other = Preparer(store, pool, Repository(tmp_path), lambda: None)
        await prepare(other, tmp_path, "tried")
        assert {outcome for _, outcome in other.counts.tried} <= {KEPT, LEFT_OUT}
        took = other.counts.took_s.observed()
        assert (sum(took.counts), took.total_s > 0) == (1, True)
        forms, size = store.kept
        assert forms == sum(count for (_, outcome), count in other.counts.tried.items() if outcome == KEPT)
        assert (size > 0) == (forms > 0)
        await other.close()
