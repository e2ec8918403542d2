"""The trial of an optimised model: made-up inputs, equal answers, and a verdict on its durations."""

import asyncio
import math
import os
import signal
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto
from support import models
from support.history import PLAIN
from support.models import save
from support.optimised import optimised
from support.workers import Serve, array, ask, fork_server_of, order_of, trips, until

from runtime.errors import ForkServerUnavailable
from runtime.optimised.pacing import Pacer
from runtime.optimised.store import Useless
from runtime.optimised.trial import (
    LENGTHS,
    MAX_SAMPLE_BYTES,
    Figures,
    make_samples,
    try_optimised,
    verdict,
)
from runtime.process.pool import WorkerPool
from runtime.wire import DATATYPES, OptimisedModel, Tensor, TensorSpec


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "models"


def figures(load: int = 10, bare_load: int = 30, infer: int = 100, bare_infer: int = 100) -> Figures:
    return Figures(bare_load, load, bare_infer, infer)


VERDICTS: dict[str, tuple[Figures, str | None]] = {
    "quick": (figures(), None),
    "as quick": (
        figures(load=30_000, bare_load=30_000), "it loads no faster: 30.0 ms, bare 30.0 ms",
    ),
    "slower": (
        figures(load=31_000, bare_load=30_000), "it loads no faster: 31.0 ms, bare 30.0 ms",
    ),
    "nearly as quick": (figures(infer=105), None),
    "slower in inference": (figures(infer=106), "its inferences are slower: 0.94 of the bare rate"),
    "too quick to be told": (figures(infer=0, bare_infer=0), None),
}  # fmt: skip


@pytest.mark.parametrize("case", VERDICTS)
def test_verdict_needs_faster_load_and_inference_as_quick(case: str) -> None:
    measured, why_not = VERDICTS[case]
    assert verdict(measured) == why_not


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.optimised.trial.RUN_S", 0.01)


async def tried(
    pool: WorkerPool, root: Path, model: OptimisedModel, *given: Tensor, limit_bytes: int | None = None
) -> Figures:
    """Try an optimised model of the model `m`."""
    order = order_of(root, memory_limit_bytes=limit_bytes)
    measured, placed = await try_optimised(Pacer(pool, lambda: False), order, model, given)
    assert placed == ()
    return measured


@pytest.fixture
def _all_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have any measurement pass: this machine may be busy."""
    monkeypatch.setattr("runtime.optimised.trial.verdict", lambda _: None)


@pytest.mark.usefixtures("_all_pass")
async def test_trial_times_one_pair_with_equal_answers(pool: WorkerPool, root: Path) -> None:
    save(models.weights(1), root, "m")
    measured = await tried(pool, root, await optimised(pool, root))
    assert min(measured.bare_load_us, measured.load_us, measured.infer_ns, measured.bare_infer_ns) > 0
    assert not pool._workers


async def test_trial_raises_its_verdict(
    pool: WorkerPool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(models.add(), root, "m")
    monkeypatch.setattr("runtime.optimised.trial.MIN_RATE", 1000.0)
    with pytest.raises(Useless, match=r"slower|no faster"):
        await tried(pool, root, await optimised(pool, root))


@pytest.mark.parametrize(
    ("model", "why_not"),
    [
        (models.add(2), "its answers differ: 'y'"),
        (models.subtract(), "it declares 'x' FP32 [-1], and the model 'a' FP32 [-1]"),
    ],
    ids=["answers", "declared"],
)
async def test_optimised_model_that_differs_is_useless(
    pool: WorkerPool, root: Path, model: ModelProto, why_not: str
) -> None:
    save(model, root, "m")
    with pytest.raises(Useless) as refused:
        await tried(pool, root, await made_of(pool, root, models.add(1)))
    assert str(refused.value) == why_not


async def made_of(pool: WorkerPool, root: Path, model: ModelProto) -> OptimisedModel:
    """Optimise another model, which is given out for one of the model."""
    other = root.parent / "other" / "models"
    save(model, other, "m")
    return await optimised(pool, other)


async def test_model_with_random_answers_is_not_optimised(pool: WorkerPool, root: Path) -> None:
    save(models.random_numbers(), root, "m")
    with pytest.raises(Useless, match="otherwise each time"):
        await tried(pool, root, await optimised(pool, root))


async def test_trial_finds_a_crash_with_several_rows(pool: WorkerPool, root: Path) -> None:
    save(models.identity(models.INT64), root, "m")
    with pytest.raises(Useless, match="prepared: the worker was killed"):
        await tried(pool, root, await made_of(pool, root, models.crash_on_rows(LENGTHS[1][0])))
    assert not pool._workers


@pytest.mark.usefixtures("_all_pass")
async def test_weights_of_odd_sizes_are_used_or_found_to_crash(pool: WorkerPool, root: Path) -> None:
    """ONNX Runtime before 1.32 writes packed weights where it cannot use them: it dies on two rows."""
    save(models.misaligned(), root, "m")
    is_aligned = tuple(map(int, version("onnxruntime").split(".")[:2])) >= (1, 32)
    with nullcontext() if is_aligned else pytest.raises(Useless, match="signal 11"):
        await tried(pool, root, await optimised(pool, root))


@pytest.mark.parametrize(
    ("model", "given", "limit_bytes", "words"),
    [
        (models.weights(8), (), 5 * 10**6, "its memory_limit_bytes are 5000000"),
        (models.crash_on_zeros(), (), None, "signal 8"),
        (models.add(2), (Tensor("other", "FP32", (), b"1", text=True),), None, "other"),
    ],
    ids=["memory", "crash", "given inputs"],
)
async def test_original_that_fails_is_not_optimised(
    pool: WorkerPool,
    root: Path,
    model: ModelProto,
    given: tuple[Tensor, ...],
    *,
    limit_bytes: int | None,
    words: str,
) -> None:
    save(model, root, "m")
    made = await optimised(pool, root)
    with pytest.raises(Useless, match=f"bare as it is: .*{words}"):
        await tried(pool, root, made, *given, limit_bytes=limit_bytes)


@pytest.mark.usefixtures("_all_pass")
async def test_trial_uses_given_inputs(pool: WorkerPool, root: Path) -> None:
    save(models.reshape(6), root, "m")
    made = await optimised(pool, root)
    with pytest.raises(Useless, match="nothing is known"):
        await tried(pool, root, made)
    given = (
        Tensor("x", "FP32", (6,), b"[1, 2, 3, 4, 5, 6]", text=True),
        Tensor("sides", "INT64", (2,), b"[2, 3]", text=True),
    )
    await tried(pool, root, made, *given)


async def test_workers_that_die_with_the_fork_server_prove_nothing(pool: WorkerPool, root: Path) -> None:
    save(models.counting_loop(), root, "m")
    made = await optimised(pool, root)
    given = (trips(models.ENDLESS),)
    trial = asyncio.ensure_future(tried(pool, root, made, *given))
    await until(lambda: any(worker.in_flight for worker in pool._workers))
    os.kill(fork_server_of(pool).pid, signal.SIGKILL)
    with pytest.raises(ForkServerUnavailable):
        await trial


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
    (noise,), (zeros,) = make_samples([TensorSpec("x", datatype, (64, 1024))])
    if datatype != "BF16":  # which numpy has no name for
        assert abs(array(noise).astype(float)).max() <= 1
    row = len(noise.data) // 64
    assert len({bytes(noise.data[start : start + row]) for start in range(0, len(noise.data), row)}) == 64
    assert not any(zeros.data)


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
