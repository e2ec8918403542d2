"""Rows of batches in a worker: what follows from the graph of a model for its load and its requests."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto
from support import models
from support.models import save
from support.workers import Serve, answer, ask_all, asked_at_once, load, order_of, refusal, tensor

from runtime.errors import InvalidInput
from runtime.process.pool import WorkerPool
from runtime.process.worker import Worker
from runtime.wire import Tensor

HOUR_US = 3600 * 10**6
DEPENDENT = {
    "mean of the batch": (models.less_their_mean(), ("ReduceMean", "y", "axis 0")),
    "one scale": (models.quantised(), ("DynamicQuantizeLinear", "y")),
}


def rows(count: int = 1) -> Tensor:
    return tensor("x", "FP32", np.ones((count, 4)))


async def sizes(worker: Worker, *requests: Tensor, **more: Any) -> list[tuple[int, int]]:
    """Ask a worker at once; returns the size of each request, and of the run that it was counted with."""
    tasks = await asked_at_once(worker, *(ask_all(worker, [each], **more) for each in requests))
    return [((await task)[0].batch_size, (await task)[0].execution_size) for task in tasks]


@pytest.mark.parametrize(("onnx_model", "words"), DEPENDENT.values(), ids=list(DEPENDENT))
async def test_model_with_dependent_rows_is_refused(
    pool: WorkerPool, tmp_path: Path, onnx_model: ModelProto, words: tuple[str, ...]
) -> None:
    save(onnx_model, tmp_path, "m")
    refused = await refusal(pool, order_of(tmp_path, max_batch_size=8))
    assert refused.code == "rows_depend"
    assert [word for word in (*words, "max_batch_size 0", '"allow"') if word not in str(refused)] == []
    for size in (0, 1):
        _, report = await load(pool, order_of(tmp_path, max_batch_size=size))
        assert report.rows is None


async def test_reload_of_dependent_rows_joins_nothing(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.less_their_mean(), tmp_path, "m")
    worker, report = await load(pool, order_of(tmp_path, max_batch_size=8, rows_required=False))
    assert report.rows is not None
    assert (report.rows.verdict, "ReduceMean" in report.rows.reason) == ("dependent", True)
    assert await sizes(worker, rows(), rows()) == [(1, 1), (1, 1)]


@pytest.mark.parametrize("has_priorities", [False, True])
async def test_requests_of_unknown_rows_are_not_joined(
    pool: WorkerPool, tmp_path: Path, *, has_priorities: bool
) -> None:
    """Nor does one wait for others; its own rows run at once, up to the limit."""
    save(models.unfamiliar_rows(), tmp_path, "m")
    order = order_of(tmp_path, max_batch_size=5, max_queue_delay_us=HOUR_US, has_priorities=has_priorities)
    worker, report = await load(pool, order)
    assert report.rows is not None
    assert (report.rows.verdict, "MaxpoolWithMask" in report.rows.reason) == ("unknown", True)
    assert await sizes(worker, rows(), rows(), rows(5), rows(0)) == [(1, 1), (1, 1), (5, 5), (0, 0)]
    with pytest.raises(InvalidInput, match="the batch size is 6, and of this model at most 5"):
        await answer(worker, rows(6))


@pytest.mark.parametrize(
    "onnx_model", [models.less_their_mean(), models.unfamiliar_rows()], ids=["dependent", "unknown"]
)
async def test_allowed_rows_are_joined(serve: Serve, onnx_model: ModelProto) -> None:
    worker = await serve(onnx_model, max_batch_size=8, dependent_rows=True)
    assert await sizes(worker, rows(), rows(2)) == [(1, 3), (2, 0)]
