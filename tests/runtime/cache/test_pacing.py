"""When a preparation computes: its workers are stopped while others compute, and continued in gaps."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import models
from support.workers import FOR_EVER_S, computing, is_stopped, order_of, trips, until

from runtime.cache.trial import QUIET_S, STOPPED_S, TICK_S, TURN_S, Pace, Pacer, next_pace
from runtime.process.pool import WorkerPool

LOOKS = st.lists(st.tuples(st.floats(TICK_S, 0.3), st.booleans()), max_size=200)
"""Seconds since the look before, and whether others compute then."""


TRIPS = 500_000
"""Of a loop: a fifth of a second or so, and much longer in the background of a busy machine."""
PAUSE_S = 0.5
"""Duration of a stop, which the clock of the stopped process does not count."""


def paces(looks: Sequence[tuple[float, bool]]) -> list[tuple[float, bool, Pace]]:
    """Return the time, whether others compute, and the pace after each look."""
    now_s, pace = 100.0, Pace()
    found = []
    for after_s, is_busy in looks:
        now_s += after_s
        pace = next_pace(pace, now_s, is_busy=is_busy)
        found.append((now_s, is_busy, pace))
    return found


@given(LOOKS)
def test_preparation_stops_for_others_except_in_its_turns(looks: list[tuple[float, bool]]) -> None:
    stopped_at_s = turn_at_s = float("-inf")
    was_stopped = False
    for now_s, is_busy, pace in paces(looks):
        if pace.is_stopped and not was_stopped:
            assert is_busy
            assert now_s - turn_at_s >= TURN_S
            stopped_at_s = now_s
        elif was_stopped and not pace.is_stopped:
            is_gap = now_s - pace.busy_s >= QUIET_S
            assert is_gap or now_s - stopped_at_s >= STOPPED_S
            turn_at_s = float("-inf") if is_gap else now_s
        elif is_busy:
            assert pace.is_stopped or now_s - turn_at_s < TURN_S
        was_stopped = pace.is_stopped


@given(st.integers(1, 10))
def test_preparation_never_stands_still_for_longer_than_its_pause(turns: int) -> None:
    count = int(turns * (STOPPED_S + TURN_S) / TICK_S)
    running = [pace for _, _, pace in paces([(TICK_S, True)] * count) if not pace.is_stopped]
    share = TURN_S / (STOPPED_S + TURN_S)
    assert len(running) / count == pytest.approx(share, abs=2 * turns / count)


async def test_workers_are_stopped_while_others_compute(pool: WorkerPool) -> None:
    is_busy = True
    pacer = Pacer(pool, lambda: is_busy)
    pacing = asyncio.create_task(pacer.run())
    async with pacer.worker() as first:
        await until(lambda: is_stopped(first.pid))
        async with pacer.worker() as second:
            await until(lambda: is_stopped(second.pid))
            is_busy = False
            await until(lambda: not is_stopped(first.pid) and not is_stopped(second.pid))
            is_busy = True
            await until(lambda: is_stopped(second.pid))
        assert second.ended.done()  # although it was stopped
        pacing.cancel()
        await asyncio.wait([pacing])
        await until(lambda: not is_stopped(first.pid))


async def test_run_in_the_background_is_timed_without_its_stops(pool: WorkerPool, tmp_path: Path) -> None:
    models.save(models.counting_loop(), tmp_path, "m")
    worker = await pool.start("w")
    await worker.load(order_of(tmp_path, warm_up=False, background=True), lambda _: None)
    began_ns, has_computed = time.monotonic_ns(), computing(worker.pid)
    run = asyncio.ensure_future(worker.infer([trips(TRIPS)], timeout_s=FOR_EVER_S))
    await until(has_computed)
    worker.suspend()
    await until(lambda: is_stopped(worker.pid))
    assert not run.done()
    await asyncio.sleep(PAUSE_S)
    worker.resume()
    outcome, _ = await run
    assert 0 < outcome.infer_ns <= time.monotonic_ns() - began_ns - PAUSE_S * 1e9
