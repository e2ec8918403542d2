"""The repository extension: load and unload wait for their end, the index shows the state of each version."""

import asyncio
import io
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from msgspec.structs import replace
from onnx import ModelProto
from support import models
from support.http import Answer, Json, LocalApi, local_server, when
from support.models import FLOAT, save, save_bytes
from support.running import gone

from answers.inference import IndexEntry
from events.jobs import Failure, PendingLoad
from events.models import Model, ModelState
from events.serving import Serving
from events.types import LoadParameters
from features.approvals.rules import ApprovalRule
from features.rules import LoadPolicy
from server.http.validation import MAX_JSON_BYTES
from server.v2 import repository as extension
from server.v2.repository import MAX_INDEX_BYTES


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalApi]:
    """One application in which loads of `asked` need an approval."""
    policy = LoadPolicy(approval=(ApprovalRule(("asked",)),))
    async with local_server(tmp_path_factory.mktemp("shared"), policy=policy) as api:
        yield api


async def load(api: LocalApi, model_id: str, **config: Any) -> Answer:
    """Load as tritonclient does: no Content-Type, the configuration as JSON in a string."""
    body = {"parameters": {"config": json.dumps(config)}} if config else {}
    return await send(api, f"models/{model_id}/load", json.dumps(body).encode())


async def unload(api: LocalApi, model_id: str) -> Answer:
    body = {"parameters": {"unload_dependents": False}}
    return await send(api, f"models/{model_id}/unload", json.dumps(body).encode())


async def send(api: LocalApi, path: str, body: bytes, **options: Any) -> Answer:
    """Send a body without a Content-Type, unless `options` have one."""
    options["skip_auto_headers"] = ["Content-Type"]
    return await api.post(f"/v2/repository/{path}", data=io.BytesIO(body), **options)


def job_of(answer: Answer) -> str:
    """Return the id of the job that an empty 200 names."""
    assert (answer.status, answer.body) == (200, b"")
    return job_id_of(answer)


async def index(api: LocalApi, *names: str, body: bytes = b"") -> list[Json]:
    """Return the entries of these models."""
    answer = await send(api, "index", body, roles=("infer",))
    assert answer.status == 200, answer.body
    return [each for each in answer.json if each["name"] in names]


def entry(name: str, number: int, state: str, **more: str) -> Json:
    return {"name": name, "version": str(number), "state": state, **more}


def version(number: int) -> Json:
    return {"specific": {"versions": [number]}}


async def begin_load(api: LocalApi, model_id: str) -> asyncio.Task[Answer]:
    """Send a load that takes minutes, and wait until the worker has begun it."""
    save_bytes(models.endless_load(), api.config.repository, model_id)
    task = asyncio.create_task(load(api, model_id))

    async def stages() -> list[str]:
        return [job["stage"] for job in await api.jobs(f"?model={model_id}")]

    await when(stages, lambda seen: seen == ["loading"])
    return task


def job_id_of(answer: Answer) -> str:
    return answer.headers["Location"].removeprefix("/api/v1/jobs/")


async def test_load_is_answered_when_the_model_is_ready(shared: LocalApi) -> None:
    save(models.identity(), shared.config.repository, "m")
    answers = await asyncio.gather(*(load(shared, "m") for _ in range(5)))
    [job_id] = {job_of(answer) for answer in answers}
    assert (await shared.get("/v2/models/m/ready")).status == 200
    job = await shared.job(job_id)
    assert (job["status"], job["cause"], job["requested_by"]) == ("completed", "request", "alice")
    types = await shared.types("m")
    assert job_of(await load(shared, "m")) == job_id
    assert await shared.types("m") == types
    assert types.count("LoadRequested") == 1


async def test_content_type_and_preferences_are_ignored(shared: LocalApi) -> None:
    save(models.identity(), shared.config.repository, "typed")
    for body, declared in ((b"", {}), (b'{"parameters": {}}', {"Content-Type": "x"})):
        for verb in ("load", "unload"):
            headers = {"Prefer": "respond-async, wait=0", **declared}
            job_of(await send(shared, f"models/typed/{verb}", body, headers=headers))


async def test_load_goes_on_when_its_client_leaves(shared: LocalApi) -> None:
    save(models.slow_model(side=500), shared.config.repository, "left")
    waiting = asyncio.create_task(load(shared, "left"))
    await when(lambda: shared.jobs("?model=left"), bool)
    waiting.cancel()  # and with it the handler: the tests' server cancels those of clients that left
    [job] = await shared.jobs("?model=left")
    assert (await shared.ended(job["id"]))["status"] == "completed"
    assert job_of(await load(shared, "left")) == job["id"]


@pytest.mark.parametrize(
    ("model", "expected", "reason"),
    [
        (models.unknown_operator, (400, "invalid_model"), "Frobnicate"),
        (models.crash_on_load, (503, "worker_died"), "killed by signal"),
    ],
    ids=["operator", "crash"],
)
async def test_failed_load_has_its_reason(
    shared: LocalApi, model: Callable[[], ModelProto], expected: tuple[int, str], reason: str
) -> None:
    model_id = expected[1]
    save(model(), shared.config.repository, model_id)
    answer = await load(shared, model_id)
    assert answer.refusal == expected
    job = await shared.job(job_id_of(answer))
    assert (job["status"], job["error"]["code"]) == ("failed", expected[1])
    assert reason in job["error"]["message"]
    text = f"load failed for model '{model_id}': version 1: {job['error']['message']}"
    assert answer.json["error"] == text


async def test_refused_requests_append_nothing(shared: LocalApi) -> None:
    save(models.identity(), shared.config.repository, "idle")
    for path, body, expected in (
        ("models/none/load", b"", (404, "unknown_model")),
        ("models/idle/VERB", b"[]", (400, "invalid_body")),
        ("models/idle/VERB", b'{"parameters": {"file:1/model.onnx": "eA=="}}', (400, "not_supported")),
        ("models/idle/VERB", b" " * (MAX_JSON_BYTES + 1), (413, "body_too_large")),
        ("index", b'{"ready": 1}', (400, "invalid_body")),
        ("index", b"nope", (400, "invalid_body")),
        ("index", b'{"ready": true}' + b" " * MAX_INDEX_BYTES, (413, "body_too_large")),
        ("r/index", b"", (404, "not_found")),
        ("r/models/idle/VERB", b"", (404, "not_found")),
    ):
        for verb in ("load", "unload"):
            refused = await send(shared, path.replace("VERB", verb), body)
            assert refused.refusal == expected, (path, verb, body[:50])
    for verb in ("load", "unload"):
        refused = await send(shared, f"models/..%2fm/{verb}", b"")
        assert refused.refusal in {(400, "invalid_parameter"), (404, "not_found")}
    assert await shared.types("idle") == []


async def test_invalid_configuration_is_refused_by_name(shared: LocalApi) -> None:
    save(models.identity(), shared.config.repository, "unset")
    for config, expected, reason in (
        ({"instance_group": [{"count": 65}]}, (400, "invalid_body"), "instances"),
        ({"sequence_batching": {}}, (400, "not_supported"), "sequence_batching"),
        ({"version_policy": version(2)}, (404, "unknown_version"), "2"),
        (
            {"output": [{"name": "none"}]},
            (400, "not_supported"),
            "output: 'none' contradicts version 1 of the model",
        ),
    ):
        answer = await load(shared, "unset", **config)
        assert answer.refusal == expected
        assert reason in answer.json["error"]
    assert await shared.types("unset") == []


async def test_configuration_and_model_file_set_the_parameters(shared: LocalApi) -> None:
    for number in (1, 2):
        save(models.identity(FLOAT, (None, 4)), shared.config.repository, "set", number)
    file = shared.config.repository / "set" / "loadledger.toml"
    file.write_text('priority = "high"\nkeep_alive_s = 600\nstrategy = "auto"\npinned = true')
    batching = {"max_batch_size": 8, "dynamic_batching": {"max_queue_delay_microseconds": "250"}}
    group = [{"name": "set_0", "count": 2, "kind": "KIND_CPU"}]
    answer = await load(shared, "set", **batching, instance_group=group, version_policy=version(1))
    parameters = (await shared.job(job_of(answer)))["parameters"]
    expected: Json = {"instances": 2, "max_batch_size": 8, "max_queue_delay_us": 250}
    expected |= {"priority": "high", "keep_alive_s": 600, "strategy": "auto", "pinned": True}
    assert parameters | expected == parameters
    assert (await shared.model("set"))["version"] == 1


async def test_load_without_configuration_keeps_what_is_loaded(shared: LocalApi) -> None:
    save(models.identity(FLOAT, (None, 4)), shared.config.repository, "kept")
    first = job_of(await load(shared, "kept", max_batch_size=4))
    second = job_of(await load(shared, "kept", max_batch_size=8))
    assert second != first
    assert job_of(await load(shared, "kept")) == second


def as_protobuf(value: Any) -> Any:
    """Return a configuration as protobuf's `MessageToDict` does: names, no defaults, integers as text."""
    if isinstance(value, list):
        return [as_protobuf(each) for each in value]
    if not isinstance(value, dict):
        return value
    named = {re.sub("_(.)", lambda found: found[1].upper(), name): value[name] for name in value}
    texts = {"dims", "versions", "shape"} & named.keys()
    named |= {name: [str(each) for each in named[name]] for name in texts}
    return {
        name: as_protobuf(each) for name, each in named.items() if each not in ("", 0, [], "TYPE_INVALID")
    }


async def test_reported_configuration_can_be_sent_back(shared: LocalApi) -> None:
    without_output_shape = models.identity(FLOAT, (None, 4))
    without_output_shape.graph.output[0].type.tensor_type.ClearField("shape")
    made: dict[str, tuple[ModelProto, Json]] = {
        "batches": (models.identity(FLOAT, (None, 4)), {"max_batch_size": 4}),
        "scalars": (models.counting_loop(), {}),
        "maps": (models.zip_map(), {}),
        "default": (models.with_default(), {}),
        "optional": (models.optional_input(), {}),
        "texts": (models.strings(), {}),
        "any-shape": (models.identity_of_any_shape(FLOAT), {}),
        "no-output-shape": (without_output_shape, {}),
    }
    for model_id, (model, given) in made.items():
        save(model, shared.config.repository, model_id)
        job = job_of(await load(shared, model_id, **given))
        config = (await shared.get(f"/v2/models/{model_id}/config")).json
        for reported in (config, as_protobuf(config)):
            assert job_of(await load(shared, model_id, **reported)) == job, model_id


async def test_unload_is_answered_when_the_process_is_gone(shared: LocalApi) -> None:
    save(models.identity(), shared.config.repository, "over")
    job_of(await load(shared, "over"))
    pid = shared.worker("over").pid
    job = await shared.job(job_of(await unload(shared, "over")))
    assert gone(pid)
    assert (job["kind"], job["status"], job["parameters"]["force"]) == ("unload", "completed", False)
    types = await shared.types("over")
    for name in ("over", "none"):
        answer = await unload(shared, name)
        assert (answer.status, answer.body, "Location" in answer.headers) == (200, b"", False)
    assert await shared.types("over") == types


async def test_unload_cancels_a_first_load(shared: LocalApi) -> None:
    waiting = await begin_load(shared, "first")
    pid = shared.worker("first").pid
    assert await index(shared, "first") == [entry("first", 1, "LOADING")]
    job_of(await unload(shared, "first"))
    assert gone(pid)
    answer = await waiting
    assert answer.refusal == (400, "cancelled")
    assert answer.json["error"] == "load failed for model 'first': version 1: an unload cancelled it"
    assert await index(shared, "first") == [entry("first", 1, "UNAVAILABLE", reason="unloaded")]


SERVING = Serving("job", 2, 9, "", "alice", ("worker",), (), 1, 1, LoadParameters())
READY = Model("m", ModelState.LOADED, serving=SERVING, last_version=2)
LOST = replace(READY, phase=ModelState.LOST)
BROKEN = Failure("invalid_model", "broken")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Model("m"), []),
        (Model("m", loads=(PendingLoad("j", 1),)), [(1, "LOADING", None)]),
        (Model("m", last_version=1), [(1, "UNAVAILABLE", "unloaded")]),
        (Model("m", ModelState.FAILED, last_version=1, error=BROKEN), [(1, "UNAVAILABLE", "broken")]),
        (Model("m", last_version=1, error=Failure("worker_died", "")), [(1, "UNAVAILABLE", None)]),
        (READY, [(2, "READY", None)]),
        (replace(READY, phase=ModelState.UNLOADING), [(2, "UNLOADING", None)]),
        (replace(READY, loads=(PendingLoad("j", 3),)), [(2, "READY", None), (3, "LOADING", None)]),
        (replace(READY, loads=(PendingLoad("j", 2),)), [(2, "READY", None)]),
        (replace(READY, last_version=3, error=BROKEN), [(2, "READY", None), (3, "UNAVAILABLE", "broken")]),
        (replace(LOST, error=BROKEN), [(2, "UNAVAILABLE", "lost, and being reloaded: broken")]),
        (LOST, [(2, "UNAVAILABLE", "lost, and being reloaded: the server was restarted")]),
        (replace(LOST, loads=(PendingLoad("j", 2),)), [(2, "LOADING", None)]),
        (
            Model("m", last_version=2, previous=SERVING, loads=(PendingLoad("j", 3),)),
            [(2, "UNAVAILABLE", "it was replaced by another version"), (3, "LOADING", None)],
        ),
    ],
)
def test_index_shows_the_state_of_each_version(
    model: Model, expected: list[tuple[int, str, str | None]]
) -> None:
    entries = extension.index({"m": model}, ["m"])
    versions = [each for each in entries if each != IndexEntry(name="m")]
    found = [(int(each.version or 0), each.state, each.reason) for each in versions]
    assert found == expected
    ready = extension.index({"m": model}, ["m"], only_ready=True)
    assert ready == [each for each in entries if each.state == "READY"]


def test_index_is_sorted_and_leaves_out_models_that_are_gone() -> None:
    loads = tuple(PendingLoad("j", number) for number in (10, 9))
    entries = extension.index({"b": Model("b", loads=loads)}, ["c", "b", "a"])
    found = [(each.name, each.version) for each in entries]
    assert found == [("a", None), ("b", "9"), ("b", "10"), ("c", None)]
    assert extension.index({"m": Model("m", last_version=1)}, []) == []
    assert extension.index({"m": READY}, []) == extension.index({"m": READY}, [], only_ready=True)


async def test_index_lists_ready_and_other_models(shared: LocalApi) -> None:
    names = ("deleted", "never", "ready")
    for name in names:
        save(models.identity(), shared.config.repository, name, 3)
    (shared.config.repository / "empty").mkdir()
    for name in ("deleted", "ready"):
        job_of(await load(shared, name))
    (shared.config.repository / "deleted" / "3" / "model.onnx").unlink()
    expected = [entry("deleted", 3, "READY"), {"name": "never"}, entry("ready", 3, "READY")]
    assert await index(shared, *names, "empty") == expected
    assert await index(shared, *names, body=b'{"ready": false}') == expected
    assert await index(shared, *names, body=b'{"ready": true}') == [expected[0], expected[2]]
    job_of(await unload(shared, "deleted"))
    assert await index(shared, "deleted") == []


async def test_load_of_unapproved_bytes_is_refused_at_once(shared: LocalApi) -> None:
    save(models.identity(), shared.config.repository, "asked")
    answer = await load(shared, "asked")
    assert answer.refusal == (400, "not_approved")
    assert "`loadledger approve asked/1`" in answer.json["error"]
    assert (await shared.job(job_id_of(answer)))["error"]["code"] == "not_approved"
