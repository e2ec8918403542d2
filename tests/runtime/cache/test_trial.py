"""The trial of a cached model: made-up inputs, equal answers, and a verdict on its durations."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from onnx import ModelProto
from support import models
from support.cache import describe, found, made, prepare_order, prepared, written_by_the_runtime
from support.history import PLAIN
from support.models import save
from support.workers import Serve, array, ask, order_of

from runtime.cache.trial import (
    MAX_SAMPLE_BYTES,
    Pair,
    Trial,
    TrialImpossible,
    TrialInterrupted,
    least_of_each,
    make_samples,
    verdict,
)
from runtime.errors import LoadRefused, WorkerDied
from runtime.process.pool import WorkerPool
from runtime.wire import DATATYPES, CachedCopy, Tensor, TensorSpec


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
def test_verdict_needs_faster_loads_and_inference_as_quick(pairs: list[Pair], why_not: str | None) -> None:
    assert verdict(pairs) == why_not


def test_figures_are_the_least_of_each() -> None:
    assert least_of_each([pair(load=7), pair(infer=9), pair(bare_load=8)]) == {
        "bare_load_us": 8,
        "load_us": 7,
        "bare_infer_ns": 100,
        "infer_ns": 9,
        "bare_bytes": 5,
        "bytes": 4,
    }


async def of_other_answers(pool: WorkerPool, root: Path) -> CachedCopy:
    """Prepare `x + 1`, and give it out for a form of `m`, which is `x + 2`."""
    save(models.add(1), root.parent / "other", "m")
    order = prepare_order(root.parent / "other")
    own = (await made(pool, order)).files
    return describe(order.target, order.form, own, found(root / "m" / "1"))


async def test_trial_compares_three_pairs_with_the_bare_model(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.weights(4), tmp_path / "models", "m")
    form = await prepared(pool, tmp_path / "models")
    why_not, pairs = await Trial(pool, order_of(tmp_path / "models", "m"), ()).run(form)
    assert len(pairs) == 3
    assert why_not == verdict(pairs)
    assert all(min(pair.load_us, pair.infer_ns, pair.bare_infer_ns, pair.bytes) > 0 for pair in pairs)


@pytest.mark.parametrize(
    ("model", "why_not"),
    [
        (models.add(2), "its answers differ"),
        (models.subtract(), "its inputs or outputs are declared otherwise"),
    ],
    ids=["answers", "declared"],
)
async def test_form_that_differs_is_of_no_use(
    pool: WorkerPool, tmp_path: Path, model: ModelProto, why_not: str
) -> None:
    save(model, tmp_path / "models", "m")
    form = await of_other_answers(pool, tmp_path / "models")
    assert await Trial(pool, order_of(tmp_path / "models", "m"), ()).run(form) == (why_not, [])


async def test_form_of_a_random_model_is_of_no_use(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.random_numbers(), tmp_path / "models", "m")
    form = await prepared(pool, tmp_path / "models")
    outcome = await Trial(pool, order_of(tmp_path / "models", "m"), ()).run(form)
    assert outcome == ("its answers differ", [])


async def test_trial_finds_a_crash_with_several_rows(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.misaligned(), tmp_path / "models", "m")
    order = written_by_the_runtime(tmp_path / "models")
    assert order.prepared is not None
    with pytest.raises(WorkerDied):
        await Trial(pool, replace(order, prepared=None), ()).run(order.prepared)
    assert not pool._workers


async def test_trial_of_changed_files_is_refused(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.add(2), tmp_path / "models", "m")
    form = await prepared(pool, tmp_path / "models")
    save(models.add(3), tmp_path / "models", "m")
    with pytest.raises(LoadRefused) as refused:
        await Trial(pool, order_of(tmp_path / "models", "m"), ()).run(form)
    assert refused.value.code == "model_changed"


@pytest.mark.parametrize(
    ("model", "given", "limit_bytes", "words"),
    [
        (models.weights(30), (), 20 * 10**6, "the limit is 20000000 bytes"),
        (models.crash_on_zeros(), (), None, "signal 8"),
        (models.add(2), (Tensor("other", "FP32", (), b"1", text=True),), None, "bare as it is"),
    ],
    ids=["memory", "crash", "given inputs"],
)
async def test_bare_model_that_fails_ends_the_trial(
    pool: WorkerPool,
    tmp_path: Path,
    model: ModelProto,
    given: tuple[Tensor, ...],
    *,
    limit_bytes: int | None,
    words: str,
) -> None:
    save(model, tmp_path / "models", "m")
    form = await prepared(pool, tmp_path / "models")
    order = order_of(tmp_path / "models", "m", memory_limit_bytes=limit_bytes)
    with pytest.raises(TrialInterrupted if limit_bytes else TrialImpossible, match=words):
        await Trial(pool, order, given).run(form)


async def test_trial_uses_given_inputs(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.reshape(6), tmp_path / "models", "m")
    form = await prepared(pool, tmp_path / "models")
    order = order_of(tmp_path / "models", "m")
    with pytest.raises(TrialImpossible):
        await Trial(pool, order, ()).run(form)
    given = (
        Tensor("x", "FP32", (6,), b"[1, 2, 3, 4, 5, 6]", text=True),
        Tensor("sides", "INT64", (2,), b"[2, 3]", text=True),
    )
    _, pairs = await Trial(pool, order, given).run(form)
    assert len(pairs) == 3


# Made-up inputs


SPECS = st.lists(
    st.builds(
        TensorSpec,
        st.text(max_size=5),
        st.sampled_from(sorted(DATATYPES)),
        st.lists(st.integers(-1, 3), max_size=3).map(tuple),
        st.booleans(),
    ),
    max_size=3,
    unique_by=lambda spec: spec.name,
)


@PLAIN
@given(SPECS)
def test_samples_match_declared_inputs_and_repeat(specs: list[TensorSpec]) -> None:
    required = [spec for spec in specs if not spec.optional]
    sampled = list(make_samples(specs))
    assert sampled
    assert sampled == list(make_samples(specs))
    for tensors in sampled:
        assert [(each.name, each.datatype) for each in tensors] == [(s.name, s.datatype) for s in required]
        for spec, tensor in zip(required, tensors, strict=True):
            assert len(tensor.shape) == len(spec.shape)
            for declared, length in zip(spec.shape, tensor.shape, strict=True):
                assert length == declared or (declared == -1 and length in {1, 2, 8, 64})
            if spec.datatype != "BYTES":
                array(tensor)  # which checks the size of the data


async def test_model_of_texts_accepts_samples(serve: Serve) -> None:
    worker = await serve(models.strings())
    for tensors in make_samples([TensorSpec("x", "BYTES", (-1,))]):
        assert await ask(worker, tensors)


@pytest.mark.parametrize("datatype", sorted(set(DATATYPES) - {"BYTES"}))
def test_samples_are_noise_within_one_and_zeros(datatype: str) -> None:
    noise, zeros = list(make_samples([TensorSpec("x", datatype, (100,))]))
    if datatype != "BF16":  # which numpy has no name for
        found = array(noise[0]).astype(float)
        assert abs(found).max() <= 1
    assert len({bytes(noise[0].data)[i : i + 2] for i in range(0, len(noise[0].data), 2)}) > 1
    assert not any(zeros[0].data)


@pytest.mark.parametrize(
    ("declared", "shapes"),
    [
        ((-1, 3, -1), [(1, 3, 8), (8, 3, 8), (2, 3, 8), (1, 3, 64)]),
        ((2, 3), [(2, 3)]),
        ((-1, 3, 640, 640), [(1, 3, 640, 640), (2, 3, 640, 640)]),
        ((math.isqrt(MAX_SAMPLE_BYTES // 4) + 1,) * 2, []),
        ((2**60, 2**60), []),
    ],
    ids=["open", "declared", "large rows", "too large", "far too large"],
)
def test_samples_have_several_lengths_within_the_limit(
    declared: tuple[int, ...], shapes: list[tuple[int, ...]]
) -> None:
    found = [tensors[0].shape for tensors in make_samples([TensorSpec("x", "FP32", declared)])]
    assert found[::2] == found[1::2] == shapes  # noise and zeros of each


@pytest.mark.parametrize("datatype", sorted(set(DATATYPES) - {"BYTES"}))
def test_rows_of_a_long_sample_differ(datatype: str) -> None:
    [noise], _ = make_samples([TensorSpec("x", datatype, (64, 1024))])
    row = len(noise.data) // 64
    assert len({bytes(noise.data[start : start + row]) for start in range(0, len(noise.data), row)}) == 64


def test_input_that_is_no_tensor_has_no_samples() -> None:
    assert list(make_samples([TensorSpec("x", "seq(tensor(float))", ())])) == []
