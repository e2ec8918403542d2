"""Waiting for what has to come to its end, whatever becomes of the task that waits for it."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from runtime.processes.workers import Worker

T = TypeVar("T")


async def whole(work: Coroutine[Any, Any, T]) -> T:
    """Wait until this has ended, also if the waiting task is cancelled; only then is it."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()  # seen: who cancels does not ask
        raise cancelled
    return task.result()


def begun(work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
    """Begin what somebody will probably wait for; if nobody does, its problem is nobody's."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task


async def ended(worker: Worker) -> None:
    """End a worker, and wait until it is gone."""
    worker.kill()
    await whole(asyncio.wait({worker.ended}))
