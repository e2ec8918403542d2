"""`PUT` and `DELETE …/labels/{label}`, loads with a label, and requests that name a version by it."""

import asyncio
from typing import Any

from support import models
from support.http import ONE, LocalApi, when

from events.types import ModelLoaded
from features.labels.facts import LabelRemoved, LabelSet

INVALID = (400, "invalid_parameter")
NOT_LOADED = (503, "model_not_loaded")


def save(api: LocalApi, model_id: str, *versions: int) -> None:
    """Save versions of `y = x + version`."""
    for version in versions:
        api.save(models.add(version), model_id, version)


def path(model_id: str, label: str = "champion") -> str:
    return f"/api/v1/models/{model_id}/labels/{label}"


async def put(api: LocalApi, model_id: str, version: object, label: str = "champion", **options: Any) -> Any:
    return await api.send("PUT", path(model_id, label), json={"version": version}, **options)


async def answered(api: LocalApi, model_id: str, version: int | str | None) -> Any:
    answer = await api.infer(model_id, ONE, version=version)
    assert answer.status == 200, answer.body
    return answer.json["model_version"], answer.headers["Loadledger-Model"].partition(";")[0]


async def test_label_names_version_until_it_is_removed(shared: LocalApi) -> None:
    save(shared, "m", 1, 2)
    assert "labels" not in await shared.model("m")
    for version, head in ((1, 1), (1, 0), (2, 1)):
        before = await shared.events("m")
        assert (await put(shared, "m", version, subject="Ann")).status == 204
        appended = len(await shared.events("m")) - len(before)
        assert appended == head  # what is set already appends nothing
    await put(shared, "m", 1, "shadow")
    assert (await shared.model("m"))["labels"] == {"champion": 2, "shadow": 1}
    assert (await shared.send("DELETE", path("m"), subject="Bob")).status == 204
    assert (await shared.send("DELETE", path("m"))).refusal == (404, "unknown_label")
    [listed] = [model for model in (await shared.get("/api/v1/models")).json["models"] if model["id"] == "m"]
    assert listed["labels"] == {"shadow": 1}
    events = [(event.data, event.version, event.actor, event.job_id) for event in await shared.events("m")]
    assert events == [
        (LabelSet("champion"), 1, "Ann", None),
        (LabelSet("champion"), 2, "Ann", None),
        (LabelSet("shadow"), 1, "alice", None),
        (LabelRemoved("champion"), 2, "Bob", None),
    ]


REFUSALS: list[tuple[dict[str, Any], tuple[int, str]]] = [
    ({"model_id": "nobody"}, (404, "unknown_model")),
    ({"version": 3}, (404, "unknown_version")),
    ({"version": 0}, (400, "invalid_body")),
    ({"version": "1"}, (400, "invalid_body")),
    ({"version": None}, (400, "invalid_body")),
    ({"label": "1"}, INVALID),
    ({"label": "a%2Fb"}, INVALID),
    ({"roles": ("infer", "audit", "approve")}, (403, "forbidden")),
]


async def test_refused_label_records_nothing(shared: LocalApi) -> None:
    save(shared, "refused", 1)
    head = shared.position
    for given, refusal in REFUSALS:
        answer = await put(shared, **{"model_id": "refused", "version": 1, **given})
        assert answer.refusal == refusal, given
        assert ("begin with a letter" in answer.json["detail"]) is (refusal == INVALID)
    assert shared.position == head


async def test_load_moves_its_label_in_the_append_of_its_outcome(shared: LocalApi) -> None:
    save(shared, "moved", 1, 2)
    await put(shared, "moved", 1)
    await shared.load("moved", version=1)
    options = {"json": {"version": 2, "label": "champion"}, "subject": "Ann", "wait": 60}
    loading = asyncio.create_task(shared.post("/api/v1/models/moved/load", **options))
    seen = [await answered(shared, "moved", "champion")]
    while not loading.done():  # the label always answers
        seen.append(await answered(shared, "moved", "champion"))
    assert {version for version, _ in seen} <= {"1", "2"}
    job = (await loading).json
    assert (job["status"], job["label"]) == ("completed", "champion")
    events = await shared.events("moved")
    [loaded] = [each for each in events if isinstance(each.data, ModelLoaded) and each.version == 2]
    [label] = [each for each in events if isinstance(each.data, LabelSet) and each.version == 2]
    assert (label.position, label.recorded_at) == (loaded.position + 1, loaded.recorded_at)
    assert (label.data, label.actor, label.job_id) == (LabelSet("champion", loaded.id), "Ann", job["id"])
    assert loaded.actor == "system"
    assert await answered(shared, "moved", "champion") == ("2", "moved/2")
    await when(lambda: shared.types("moved"), lambda types: "ModelUnloaded" in types)  # version 1
    recorded = await shared.events("moved")  # a model of another test may be unloaded meanwhile
    assert (await shared.post("/api/v1/models/moved/load", **options)).json["id"] == job["id"]
    assert await shared.events("moved") == recorded


async def test_label_of_another_version_is_refused_with_advice(shared: LocalApi) -> None:
    save(shared, "other", 1, 2)
    await put(shared, "other", 2)
    await shared.load("other", version=1)
    refused = await shared.infer("other", ONE, version="champion")
    assert refused.refusal == NOT_LOADED
    assert refused.json["error"] == (
        "label 'champion' of model 'other' names version 2, version 1 is loaded; load it with "
        'POST /api/v1/models/other/load and body {"version": 2}'
    )
    unknown = await shared.infer("other", ONE, version="nobody")
    assert unknown.refusal == (404, "unknown_label")
    assert "GET /api/v1/models/other shows" in unknown.json["error"]


async def test_reads_of_a_label_are_those_of_its_version(shared: LocalApi) -> None:
    save(shared, "read", 1)
    await shared.load("read", label="v1.stable")
    of = "/v2/models/read/versions"
    for end in ("", "/ready", "/config", "/stats"):
        by_label, by_number = [await shared.get(f"{of}/{each}{end}") for each in ("v1.stable", 1)]
        assert (by_label.status, by_label.json) == (200, by_number.json)
        assert (await shared.get(f"{of}/nobody{end}")).refusal == (404, "unknown_label")
        for text in ("-a", "a%2Fb", "a%20", "%C3%A4", "a" * 64, "1a"):
            assert (await shared.get(f"{of}/{text}{end}")).refusal == INVALID, text


async def test_metadata_of_a_label_is_of_its_file_before_a_load(shared: LocalApi) -> None:
    save(shared, "unloaded", 1, 2)
    await put(shared, "unloaded", 1)
    answer = await shared.get("/v2/models/unloaded/versions/champion")
    assert (answer.status, answer.json["versions"]) == (200, ["1"])
    assert (await shared.infer("unloaded", ONE, version="champion")).refusal == NOT_LOADED


async def test_past_has_the_labels_of_then(shared: LocalApi) -> None:
    save(shared, "past", 1, 2)
    await put(shared, "past", 1)
    await shared.load("past", version=2, label="champion")
    await shared.send("DELETE", path("past"))
    events = [each for each in await shared.events("past") if isinstance(each.data, LabelSet | LabelRemoved)]
    first, second, removed = (each.position for each in events)
    for position, labels in (
        *((first - 1, None), (first, 1), (second - 1, 1)),
        *((second, 2), (removed - 1, 2), (removed, None)),
    ):
        listed = (await shared.get(f"/api/v1/models?at={position}")).json["models"]
        [then] = [model for model in listed if model["id"] == "past"] or [{}]
        assert then.get("labels") == (labels and {"champion": labels})
        shown = await shared.get(f"/api/v1/models/past?at={position}")
        assert shown.json.get("labels") == then.get("labels")
