"""Statistics over HTTP: of what is loaded, counted since it was."""

from pathlib import Path

from support import models
from support.http import Json, LocalApi, when
from support.models import save

ONE = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}
PHASES = ("queue", "compute_input", "compute_infer", "compute_output")


async def stats(api: LocalApi, path: str = "/v2/models/stats") -> list[Json]:
    answer = await api.get(path, roles=("audit",))
    assert answer.status == 200, answer.body
    told: list[Json] = answer.json["model_stats"]
    return told


async def test_a_model_s_inferences_are_counted_in_every_phase(api: LocalApi, repository: Path) -> None:
    save(models.add(), repository, "m", 3)
    await api.load("m")
    [before] = await stats(api, "/v2/models/m/stats")
    assert (before["name"], before["version"]) == ("m", "3")
    assert (before["inference_count"], before["execution_count"], before["last_inference"]) == (0, 0, 0)
    for _ in range(3):
        assert (await api.infer("m", ONE)).status == 200
    [after] = await stats(api, "/v2/models/m/versions/3/stats")
    assert (after["inference_count"], after["execution_count"]) == (3, 3)
    assert after["last_inference"] > 1_600_000_000_000
    counts = after["inference_stats"]
    assert {counts[phase]["count"] for phase in ("success", *PHASES)} == {3}
    assert counts["fail"] == {"count": 0, "ns": 0}
    assert counts["success"]["ns"] >= counts["compute_infer"]["ns"] > 0
    [batch] = after["batch_stats"]
    assert (batch["batch_size"], batch["compute_infer"]["count"]) == (1, 3)
    memory_bytes = (await api.model("m"))["memory_bytes"]
    assert after["memory_usage"] == [{"type": "CPU", "id": 0, "byte_size": memory_bytes}]


async def test_an_inference_that_the_model_could_not_answer_is_a_failure(
    api: LocalApi, repository: Path
) -> None:
    save(models.subtract(), repository, "m")
    await api.load("m")
    a = {"name": "a", "shape": [2], "datatype": "FP32", "data": [1, 2]}
    b = {"name": "b", "shape": [3], "datatype": "FP32", "data": [1, 2, 3]}
    assert (await api.infer("m", a, b)).status == 400
    [told] = await stats(api, "/v2/models/m/stats")
    assert told["inference_stats"]["fail"]["count"] == 1
    assert {told["inference_stats"][phase]["count"] for phase in ("success", *PHASES)} == {0}


async def test_all_that_can_be_asked_have_an_entry_by_name_and_nothing_else_has(
    api: LocalApi, repository: Path
) -> None:
    assert await stats(api) == []
    for name in ("b", "a", "stats"):
        save(models.add(), repository, name)
        await api.load(name)
    save(models.add(), repository, "idle")
    assert [told["name"] for told in await stats(api)] == ["a", "b", "stats"]
    await api.unload("a")
    assert [told["name"] for told in await stats(api)] == ["b", "stats"]


async def test_a_model_called_stats_is_reached_all_the_same_but_for_its_metadata(
    api: LocalApi, repository: Path
) -> None:
    save(models.add(), repository, "stats")
    await api.load("stats")
    assert "model_stats" in (await api.get("/v2/models/stats")).json
    assert (await api.get("/v2/models/stats/versions/1")).json["name"] == "stats"
    assert (await api.infer("stats", ONE)).status == 200
    [told] = await stats(api, "/v2/models/stats/stats")
    assert told["inference_count"] == 1


async def test_another_load_begins_at_nothing(api: LocalApi, repository: Path) -> None:
    save(models.add(), repository, "m", 1)
    await api.load("m")
    assert (await api.infer("m", ONE)).status == 200
    save(models.add(2.0), repository, "m", 2)
    await api.load("m")
    [told] = await stats(api)
    assert (told["version"], told["inference_count"]) == ("2", 0)


async def test_a_model_whose_worker_died_has_none_until_it_is_back(api: LocalApi, repository: Path) -> None:
    save(models.add(), repository, "m")
    await api.load("m")
    assert (await api.infer("m", ONE)).status == 200
    api.worker("m").kill()

    async def told() -> list[Json]:
        return await stats(api)

    back = await when(told, lambda seen: bool(seen) and seen[0]["inference_count"] == 0)
    assert back[0]["name"] == "m"
