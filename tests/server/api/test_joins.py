"""Who requests what is there already, or under way, is answered with its job and is in the ledger once."""

from support import models
from support.http import LocalApi


async def joined(api: LocalApi, model_id: str) -> list[tuple[str, str, str | None]]:
    """Return who joined which job of a model, in order."""
    events = await api.events(model_id)
    return [(event.type, event.actor, event.job_id) for event in events if event.type.endswith("Joined")]


async def test_load_of_loaded_model_records_each_actor_once(shared: LocalApi) -> None:
    shared.save(models.add(1), "loaded")
    path, job = "/api/v1/models/loaded/load", (await shared.load("loaded"))["id"]
    for subject in ("alice", "Bob", "Bob", "alice", "Bob"):
        answer = await shared.post(path, subject=subject)
        assert (answer.status, answer.json["id"]) == (200, job)
    for _ in range(2):
        assert (await shared.post("/v2/repository/models/loaded/load", subject="Carol")).status == 200
    assert await joined(shared, "loaded") == [("LoadJoined", "Bob", job), ("LoadJoined", "Carol", job)]


async def test_key_holds_the_answer_of_a_load_that_changed_nothing(shared: LocalApi) -> None:
    shared.save(models.add(1), "held")
    path, job = "/api/v1/models/held/load", (await shared.load("held"))["id"]
    for key in ("one", "one", "two"):
        answer = await shared.post(path, headers={"Idempotency-Key": key})
        assert (answer.status, answer.json["id"]) == (200, job)
    assert await joined(shared, "held") == [("LoadJoined", "alice", job)] * 2
    await shared.unload("held")
    head = shared.position
    answer = await shared.post(path, headers={"Idempotency-Key": "two"})
    assert (answer.status, answer.json["id"], shared.position) == (200, job, head)
    other = await shared.post(path, headers={"Idempotency-Key": "two"}, json={"pinned": True})
    assert other.refusal == (422, "idempotency_mismatch")
