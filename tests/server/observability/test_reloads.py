"""Thrash: reloads after evictions and waits for loads, of the last hour, in the API and in the metrics."""

import asyncio
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as read_metrics
from support import models
from support.http import ONE, LocalApi, local_server
from support.models import save, save_bytes
from support.workers import until

from answers.resources import LoadUsage, Reloads
from features.ondemand.app import DEMAND
from server.observability.metrics import SCRAPES
from server.observability.reloads import LastHour, WaitCounts, describe_reloads, find_tight_limits

MB = 1_000_000


def use(model_id: str, memory_bytes: int = 10 * MB, reserved_bytes: int = 0) -> LoadUsage:
    return LoadUsage(
        model_id=model_id, version=1, job_id=f"job-{model_id}", phase="serving", workers=1,
        reserved_bytes=reserved_bytes, memory_bytes=memory_bytes, memory_at_load_bytes=None, device=None,
        device_bytes=0, in_flight=0, last_used_at=None, pinned=False, keep_alive_s=None,
    )  # fmt: skip


def test_hour_slides_over_the_readings() -> None:
    hour = LastHour(600)
    assert hour.since(WaitCounts(2, 1.5, 3.0)) == (2, 1.5, 3.0)  # before the first reading
    for reading in range(1, 8):
        hour.add(WaitCounts(10 * reading, reading, 2 * reading))
    assert hour.since(WaitCounts(75, 8.0, 15.0)) == (75 - 10, 8.0 - 1, 15.0 - 2)  # an hour ago is the first


@pytest.mark.parametrize(
    ("loaded", "free_bytes", "max_loaded", "limits"),
    [
        ("abcdefgh", 500 * MB, 8, ["max_loaded"]),
        ("abcdefg", 500 * MB, 8, ["max_loaded"]),  # one is evicted just now
        ("abcdefgh", 500 * MB, 20, []),
        ("abcdefgh", 500 * MB, None, []),
        ("abcdefgh", 5 * MB, None, ["memory"]),
        ("abcdefg", 5 * MB, 8, ["memory"]),
        ("abcdefgh", 5 * MB, 8, ["memory", "max_loaded"]),
        ("abcdefgh", -5 * MB, 20, ["memory"]),
        ("", 0, None, []),
    ],
)
def test_tight_limit_has_no_room_for_another_model(
    loaded: str, free_bytes: int, max_loaded: int | None, limits: list[str]
) -> None:
    assert find_tight_limits([use(each) for each in loaded], free_bytes, max_loaded) == limits


def test_room_is_short_for_what_a_load_reserves() -> None:
    uses = [use("a"), use("b", 0, reserved_bytes=90 * MB)]
    assert find_tight_limits(uses, 50 * MB, None) == ["memory"]


@pytest.mark.parametrize(
    ("hour", "described"),
    [
        (WaitCounts(0, 5.0, 9.0), None),
        (WaitCounts(3, 4.1, 10.0), Reloads(last_hour=3, waited_s=4.1, share=0.41, limits=[])),
        (WaitCounts(3, 10.1, 10.0), Reloads(last_hour=3, waited_s=10.1, share=1.0, limits=[])),
        (WaitCounts(1), Reloads(last_hour=1, waited_s=0.0, share=0.0, limits=[])),  # a person's load
    ],
)
def test_reloads_are_described_with_their_share(hour: WaitCounts, described: Reloads | None) -> None:
    assert describe_reloads(hour, [], 0, None) == described


async def read_samples(api: LocalApi, name: str) -> dict[str, float]:
    """Return the values of a counter by its only label, past what a scrape before may have left."""
    api.app[SCRAPES]._kept_until_s.clear()
    text = (await api.get("/metrics")).body.decode()
    samples = [each for family in read_metrics(text) for each in family.samples if each.name == name]
    return {"".join(each.labels.values()): each.value for each in samples}


async def test_twelve_models_in_room_for_eight_reload(tmp_path: Path) -> None:
    names = [f"m{number:02}" for number in range(12)]
    small = {"max_loaded": 8, "evict": "idle", "min_residency_s": 0, "on_demand": "on"}
    async with local_server(tmp_path, **small) as api:
        for name in names:
            save(models.add(), api.config.repository, name)
        for name in names:
            assert (await api.infer(name, ONE)).status == 200
        assert "reloads" not in (await api.get("/api/v1/resources")).json
        for name in names:
            assert (await api.infer(name, ONE)).status == 200
        jobs = await api.jobs("?limit=1000")
        loads = [job for job in jobs if job["kind"] == "load"]
        assert {job["cause"] for job in jobs if job["kind"] == "unload"} == {"eviction"}
        seen = (await api.get("/api/v1/resources")).json["reloads"]
        assert seen["last_hour"] == len(loads) - len(names) >= len(names) - 8
        assert seen["limits"] == ["max_loaded"]
        by_model = await read_samples(api, "loadledger_reloads_after_eviction_total")
        assert sum(by_model.values()) == seen["last_hour"]
        assert by_model.keys() == set(names)
        waited = await read_samples(api, "loadledger_inference_load_wait_seconds_total")
        assert waited == {
            "completed": pytest.approx(seen["waited_s"], abs=0.001),
            "forwarded": 0,
            "failed": 0,
        }
        took = await read_samples(api, "loadledger_inference_duration_seconds_sum")
        assert seen["share"] == pytest.approx(waited["completed"] / sum(took.values()), abs=0.001)
        assert 0 < seen["share"] <= 1


async def test_wait_of_an_inference_that_gave_up_is_counted(tmp_path: Path) -> None:
    async with local_server(tmp_path, on_demand="on") as api:
        save_bytes(models.endless_load(), api.config.repository, "slow")
        late = await api.infer("slow", ONE, parameters={"timeout": 50_000})
        assert late.refusal == (504, "inference_timeout")
        asking = asyncio.create_task(api.infer("slow", ONE))
        await until(lambda: api.app[DEMAND].count_waiting("slow") == 1)
        await api.unload("slow", force=True)
        assert (await asking).refusal == (503, "load_failed")
        waited = await read_samples(api, "loadledger_inference_load_wait_seconds_total")
        assert waited["failed"] > 0.05
        assert waited["completed"] == 0
        assert await read_samples(api, "loadledger_inference_duration_seconds_sum") == {"slow": 0}
