"""When a prepared form is of use: its loads are faster, and its inferences not slower."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from support import models
from support.forms import describe, found, made, prepare_order, prepared, written_by_the_runtime
from support.models import save
from support.workers import order_of, running_pool

from runtime.errors import LoadRefused, WorkerDied
from runtime.prepared.blame import NotTried, Stopped
from runtime.prepared.trial import Pair, Trial, told, verdict
from runtime.processes.pool import WorkerPool
from runtime.wire import Prepared, Tensor


def pair(load: int = 10, bare_load: int = 30, infer: int = 100, bare_infer: int = 100) -> Pair:
    return Pair(bare_load, load, bare_infer, infer, 5, 4)


@pytest.mark.parametrize(
    ("pairs", "why_not"),
    [
        ([pair()] * 3, None),
        ([pair(load=30_000, bare_load=30_000)] * 3, "it loads no faster: at best 30.0 ms, bare 30.0 ms"),
        ([pair(load=31_000, bare_load=30_000)] * 3, "it loads no faster: at best 31.0 ms, bare 30.0 ms"),
        ([pair(), pair(), pair(load=90)], None),
        (
            [pair(load=20), pair(load=20), pair(load=90, bare_load=15)],
            "it loads no faster: at best 0.0 ms, bare 0.0 ms",
        ),
        ([pair(), pair(load=90), pair(load=90)], "it loads no faster: at best 0.0 ms, bare 0.0 ms"),
        ([pair(infer=103)] * 3, None),
        ([pair(infer=104)] * 3, "its inferences are slower: at best 0.96 of the bare rate"),
        ([pair(infer=200), pair(infer=200), pair(infer=103)], None),
        (
            [pair(infer=200), pair(infer=125), pair(infer=150)],
            "its inferences are slower: at best 0.80 of the bare rate",
        ),
        ([pair(infer=0, bare_infer=0)] * 3, None),
    ],
    ids=[
        "quick", "as quick", "slower", "slow once", "slower at its best", "slow twice", "nearly as quick",
        "slower in inference", "slower in inference but once", "at its best", "too quick to be told",
    ],
)  # fmt: skip
def test_a_form_is_of_use_if_it_loads_faster_in_most_pairs_and_is_not_slower_in_all(
    pairs: list[Pair], why_not: str | None
) -> None:
    assert verdict(pairs) == why_not


def test_what_is_kept_of_a_trial_is_the_least_of_each() -> None:
    assert told([pair(load=7), pair(infer=9), pair(bare_load=8)]) == {
        "bare_load_us": 8,
        "load_us": 7,
        "bare_infer_ns": 100,
        "infer_ns": 9,
        "bare_bytes": 5,
        "bytes": 4,
    }


@pytest.fixture
async def pool() -> AsyncIterator[WorkerPool]:
    async with running_pool() as pool:
        yield pool


async def of_other_answers(pool: WorkerPool, root: Path) -> Prepared:
    """Prepare `x + 1`, and give it out for a form of `m`, which is `x + 2`."""
    save(models.add(1), root.parent / "other", "m")
    order = prepare_order(root.parent / "other")
    own = (await made(pool, order)).files
    return describe(order.target, order.form, own, found(root / "m" / "1"))


async def test_a_form_that_answers_the_same_is_held_against_the_bare_model_in_three_pairs(
    pool: WorkerPool, tmp_path: Path
) -> None:
    save(models.weights(4), tmp_path / "models", "m")
    form = await prepared(pool, tmp_path / "models")
    why_not, pairs = await Trial(pool, order_of(tmp_path / "models", "m"), ()).of(form)
    assert len(pairs) == 3
    assert why_not == verdict(pairs)
    assert all(min(pair.load_us, pair.infer_ns, pair.bare_infer_ns, pair.bytes) > 0 for pair in pairs)


async def test_a_form_that_answers_otherwise_is_of_no_use(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.add(2), tmp_path / "models", "m")
    form = await of_other_answers(pool, tmp_path / "models")
    assert await Trial(pool, order_of(tmp_path / "models", "m"), ()).of(form) == ("its answers differ", [])


async def test_a_form_that_is_declared_otherwise_is_of_no_use(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.subtract(), tmp_path / "models", "m")
    form = await of_other_answers(pool, tmp_path / "models")
    why_not, _ = await Trial(pool, order_of(tmp_path / "models", "m"), ()).of(form)
    assert why_not == "its inputs or outputs are declared otherwise"


async def test_a_form_that_kills_its_process_with_several_rows_but_not_with_one_is_found_out(
    pool: WorkerPool, tmp_path: Path
) -> None:
    save(models.misaligned(), tmp_path / "models", "m")
    order = written_by_the_runtime(tmp_path / "models")
    assert order.prepared is not None
    with pytest.raises(WorkerDied):
        await Trial(pool, replace(order, prepared=None), ()).of(order.prepared)
    assert not pool._workers


async def test_files_that_are_others_by_now_are_no_reason_against_a_form(
    pool: WorkerPool, tmp_path: Path
) -> None:
    save(models.add(2), tmp_path / "models", "m")
    form = await prepared(pool, tmp_path / "models")
    save(models.add(3), tmp_path / "models", "m")
    with pytest.raises(LoadRefused) as refused:
        await Trial(pool, order_of(tmp_path / "models", "m"), ()).of(form)
    assert refused.value.code == "model_changed"


async def test_that_the_bare_model_has_too_little_memory_says_nothing_of_the_form(
    pool: WorkerPool, tmp_path: Path
) -> None:
    save(models.weights(100), tmp_path / "models", "m")
    form = await prepared(pool, tmp_path / "models")
    with pytest.raises(Stopped, match="the limit is 20000000 bytes"):
        await Trial(pool, order_of(tmp_path / "models", "m", memory_limit_bytes=20 * 10**6), ()).of(form)


async def test_a_bare_model_that_dies_of_what_is_made_up_is_not_tried(
    pool: WorkerPool, tmp_path: Path
) -> None:
    save(models.crash_on_zeros(), tmp_path / "models", "m")
    form = await prepared(pool, tmp_path / "models")
    with pytest.raises(NotTried, match="signal 8"):
        await Trial(pool, order_of(tmp_path / "models", "m"), ()).of(form)


async def test_a_bare_model_that_refuses_what_is_given_is_not_tried(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.add(2), tmp_path / "models", "m")
    form = await prepared(pool, tmp_path / "models")
    given = (Tensor("other", "FP32", (), b"1", text=True),)
    with pytest.raises(NotTried, match="bare as it is"):
        await Trial(pool, order_of(tmp_path / "models", "m"), given).of(form)


async def test_inputs_that_are_given_are_what_a_model_is_tried_on(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.reshape(6), tmp_path / "models", "m")
    form = await prepared(pool, tmp_path / "models")
    order = order_of(tmp_path / "models", "m")
    with pytest.raises(NotTried):
        await Trial(pool, order, ()).of(form)
    given = (
        Tensor("x", "FP32", (6,), b"[1, 2, 3, 4, 5, 6]", text=True),
        Tensor("sides", "INT64", (2,), b"[2, 3]", text=True),
    )
    _, pairs = await Trial(pool, order, given).of(form)
    assert len(pairs) == 3
