"""Mutated files of prepared models: a worker that loads one ends with a reason, and takes no other along."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from pathlib import Path
from random import Random

from hostile.mutations import mutate_bytes, mutate_model
from msgspec.structs import replace
from support import models
from support.fleet import as_text, new_dice, of_both, tell
from support.optimised import describe, optimised
from support.workers import LIMIT_S, answer, ask, floats, load, order_of, tensor

from runtime.errors import LoadRefused, RuntimeProblem, WorkerDied
from runtime.process.pool import WorkerPool
from runtime.wire import Load, Tensor

ROUNDS = of_both(short=15, long=1000)
SIDE = 20
LIMIT_BYTES = 100_000_000
ROW = tensor("x", "FP32", [[1.0] * SIDE])


async def test_mutated_prepared_files_end_their_own_worker_only(pool: WorkerPool, tmp_path: Path) -> None:
    dice, outcomes, root = new_dice(), Counter[str](), tmp_path / "repository"
    models.save(models.add(), root, "good")
    models.save(models.misaligned(side=SIDE), root, "m")
    good, _ = await load(pool, order_of(root, "good"))
    made = await optimised(pool, root)
    for _ in range(ROUNDS):
        rng = Random(dice.randrange(2**32))
        folder = Path(shutil.copytree(made.folder, tmp_path / "mutated"))
        _mutate_one(rng, folder)
        order = replace(order_of(root), memory_limit_bytes=LIMIT_BYTES, optimised=describe(folder))
        async with asyncio.timeout(LIMIT_S):
            outcomes[await _load_and_ask(pool, order, ROW)] += 1
            assert await answer(good, floats("x", 1)) == [2]
        shutil.rmtree(folder)
    tell(f"mutated prepared files: {as_text(outcomes)}")


def _mutate_one(rng: Random, folder: Path) -> None:
    path = rng.choice(sorted(folder.iterdir()))
    mutate = mutate_model if path.suffix == ".onnx" else mutate_bytes
    path.write_bytes(mutate(rng, path.read_bytes()))


async def _load_and_ask(pool: WorkerPool, order: Load, asked: Tensor) -> str:
    """Load a model, ask it if it loads, and return what came of it."""
    worker = await pool.start("w")
    try:
        await worker.load(order, lambda _: None)
        await ask(worker, [asked])
    except LoadRefused as refused:
        return refused.code
    except WorkerDied as died:
        return f"{died.code} {died.end}"
    except RuntimeProblem as problem:
        return f"loaded, {problem.code}"
    finally:
        await worker.stop(LIMIT_S)
    return "loaded, answers"
