"""Recorded inferences over HTTP: what a line says of each, who may read and erase them, and their files."""

import asyncio
import base64
import json
import re
import struct
import threading
from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import models
from support.http import ONE, Answer, Json, LocalApi, local_server

from events.types import ModelLoaded
from features.records.app import RECORDING
from features.records.facts import RecordsClosed, RecordsErased
from features.records.files import FOLDER
from features.records.rules import Failures, RecordRule, What, is_chosen

Start = Callable[..., Awaitable[LocalApi]]

AUDIT, INFER = ("audit",), ("infer",)
LENGTH = "Inference-Header-Content-Length"
LONG = np.arange(20_000, dtype="<f4")
"""80 KB, which the thread hashes."""
UNEQUAL = [
    {"name": name, "shape": [count], "datatype": "FP32", "data": [1] * count}
    for name, count in (("a", 2), ("b", 3))
]
"""Inputs with which `models.subtract` fails."""
NO_FILE = "01980b5c-7e2f-7c1a-9a52-6a1f0a4d3c11"


def rules(*tables: RecordRule) -> dict[str, Any]:
    """Return settings of a server that records; by default all of every model, with tensors."""
    return {"tables": {"record": tables or (RecordRule(models=("*",), what=What.TENSORS),)}}


async def list_lines(api: LocalApi, query: str = "") -> list[Json]:
    """Return one page of the recorded lines."""
    answer = await api.get(f"/api/v1/records{query}", roles=AUDIT)
    assert answer.status == 200, answer.body
    lines: list[Json] = answer.json["records"]
    return lines


async def list_files(api: LocalApi, query: str = "") -> list[Json]:
    answer = await api.get(f"/api/v1/records/files{query}", roles=AUDIT)
    assert answer.status == 200, answer.body
    files: list[Json] = answer.json["files"]
    return files


def stored(api: LocalApi) -> list[Path]:
    """Return the files on the disk."""
    return sorted((api.config.data / FOLDER).glob("*/*"))


async def send_binary(api: LocalApi, array: Any, **headers: str) -> Answer:
    """Ask `m` with a binary tensor, for a binary output."""
    data = array.tobytes()
    size = {"binary_data_size": len(data)}
    tensor = {"name": "x", "shape": list(array.shape), "datatype": "FP32", "parameters": size}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {LENGTH: str(len(head)), "Content-Type": "application/octet-stream", **headers}
    return await api.post("/v2/models/m/infer", roles=INFER, data=head + data, headers=headers)


def tensor_line(name: str, data: bytes, shape: Sequence[int], form: str = "binary") -> Json:
    return {
        "name": name,
        "datatype": "FP32",
        "shape": list(shape),
        "form": form,
        "bytes": len(data),
        "sha256": sha256(data).hexdigest(),
        "data": base64.b64encode(data).decode(),
    }


async def test_answered_inference_is_recorded_with_its_load(start: Start) -> None:
    api = await start(**rules())
    api.save(models.add(1), "m")
    await api.load("m")
    [loaded] = [event for event in await api.events("m") if isinstance(event.data, ModelLoaded)]
    answer = await api.infer("m", {**ONE, "data": [1.5]}, id="ours")
    assert answer.status == 200
    [line] = await list_lines(api)
    times = {name: line.pop(name) for name in ("time", "total_us", "waited_us", "queue_us", "compute_us")}
    assert line == {
        "type": "loadledger.inference",
        "id": answer.headers["X-Request-Id"],
        "source": "",
        "model": "m",
        "version": 1,
        "position": loaded.position,
        "subject": "pia",
        "request": "ours",
        "status": 200,
        "code": None,
        "share": 1.0,
        "inputs": [tensor_line("x", b"[1.5]", [1], "json")],
        "outputs": [tensor_line("y", b"[2.5]", [1], "json")],
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", times.pop("time"))
    assert times["total_us"] >= times["queue_us"] + times["compute_us"] > 0


@pytest.mark.parametrize("array", [LONG[:3], LONG], ids=["short", "long"])
async def test_binary_inference_is_recorded_under_client_id(start: Start, array: Any) -> None:
    api = await start(**rules())
    api.save(models.add(1), "m")
    await api.load("m")
    answer = await send_binary(api, array, **{"X-Request-Id": "theirs-7"})
    assert (answer.status, answer.headers["X-Request-Id"]) == (200, "theirs-7")
    [line] = await list_lines(api, "?id=theirs-7")
    assert line["inputs"] == [tensor_line("x", array.tobytes(), array.shape)]
    assert line["outputs"] == [tensor_line("y", (array + 1).tobytes(), array.shape)]
    assert answer.body.endswith((array + 1).tobytes())


async def test_raw_body_is_recorded_as_tensor(start: Start) -> None:
    api = await start(**rules())
    api.save(models.identity(shape=[2]), "raw")
    await api.load("raw")
    data = struct.pack("<2f", 3, 4)
    headers = {LENGTH: "0", "Content-Type": "application/octet-stream"}
    answer = await api.post("/v2/models/raw/infer", roles=INFER, data=data, headers=headers)
    assert answer.status == 200
    [line] = await list_lines(api)
    assert (line["id"], line["request"]) == (answer.headers["X-Request-Id"], None)
    assert line["inputs"] == [tensor_line("x", data, [2])]


async def test_failed_inferences_are_recorded_with_their_codes(start: Start) -> None:
    """Each line has the id, status and code of the answer; a model that was never loaded leaves no line."""
    api = await start(**rules(RecordRule(models=("*",))))
    api.save(models.subtract(), "s")
    api.save(models.add(), "idle")
    await api.load("s")
    own = {"X-Request-Id": "theirs-8"}
    answers = [
        await api.infer("s", *UNEQUAL),
        await api.infer("s", ONE),
        await api.post("/v2/models/s/infer", roles=INFER, data=b'{"inputs": [', headers=own),
        await api.infer("s", *UNEQUAL, version=9),
    ]
    for never_loaded in ("idle", "none"):
        assert (await api.infer(never_loaded, ONE)).status in (404, 503)
    refused = {answer.headers["X-Request-Id"]: (answer.status, answer.json["code"]) for answer in answers}
    assert len(refused) == len(answers)
    assert answers[2].headers["X-Request-Id"] == "theirs-8"
    lines = await list_lines(api)
    assert {line["id"]: (line["status"], line["code"]) for line in lines} == refused
    [failed] = await list_lines(api, f"?id={answers[0].headers['X-Request-Id']}")
    assert (failed["version"], failed["compute_us"], failed["outputs"]) == (1, None, [])
    assert [tensor["shape"] for tensor in failed["inputs"]] == [[2], [3]]
    assert not any("data" in tensor for line in lines for tensor in line["inputs"])


async def test_all_failures_are_recorded_beside_a_share(start: Start) -> None:
    """The share is a function of the request's id: a client can tell which of its requests are recorded."""
    share = 0.2
    api = await start(**rules(RecordRule(models=("s",), share=share, failures=Failures.ALL)))
    api.save(models.subtract(), "s")
    api.save(models.add(), "other")
    await api.load("s")
    await api.load("other")
    equal = [{**each, "shape": [1], "data": [1]} for each in UNEQUAL]
    names = [f"request-{number}" for number in range(16)]
    chosen = {name for name in names if is_chosen(name, share)}
    assert 0 < len(chosen) < len(names)
    for name in names:
        for model_id, inputs, status in (("s", equal, 200), ("other", [ONE], 200)):
            answer = await ask_as(api, name, model_id, *inputs)
            assert (answer.status, answer.headers["X-Request-Id"]) == (status, name)
        assert (await ask_as(api, f"failed-{name}", "s", *UNEQUAL)).status == 400
    lines = {line["id"]: line for line in await list_lines(api)}
    assert lines.keys() == chosen | {f"failed-{name}" for name in names}
    assert {lines[name]["share"] for name in chosen} == {share}
    assert {lines[f"failed-{name}"]["share"] for name in names} == {1.0}


async def ask_as(api: LocalApi, request_id: str, model_id: str, *inputs: Json) -> Answer:
    headers = {"X-Request-Id": request_id}
    return await api.post(
        f"/v2/models/{model_id}/infer", roles=INFER, json={"inputs": inputs}, headers=headers
    )


async def test_pages_of_records_and_files_are_complete(start: Start) -> None:
    api = await start(**rules())
    for model_id in ("a", "b"):
        api.save(models.add(), model_id)
        await api.load(model_id)
    wanted = [f"{model_id}-{number}" for model_id in ("a", "b") for number in range(3)]
    for name in reversed(wanted):
        assert (await ask_as(api, name, name[0], ONE)).status == 200
    lines = await read_pages(api, "/api/v1/records", "records")
    assert sorted(line["id"] for line in lines) == wanted
    assert [line["model"] for line in lines] == ["a"] * 3 + ["b"] * 3
    assert len(await list_lines(api, "?model=b")) == 3
    files = await read_pages(api, "/api/v1/records/files", "files")
    assert [file["model_id"] for file in files] == ["a", "b"]
    assert {(file["state"], file["position"], file["sha256"]) for file in files} == {("open", None, None)}
    last = lines[-1]["time"]
    assert [line["id"] for line in await list_lines(api, f"?since={last}")] == [
        line["id"] for line in lines if line["time"] >= last
    ]
    assert await list_lines(api, "?since=2999-01-01T00:00:00Z") == []


async def read_pages(api: LocalApi, path: str, member: str) -> list[Json]:
    """Read a list in pages of one."""
    found, cursor = list[Json](), ""
    while True:
        answer = await api.get(f"{path}?limit=1{cursor}", roles=AUDIT)
        assert answer.status == 200, answer.body
        assert len(answer.json[member]) <= 1
        found += answer.json[member]
        if answer.json["next_cursor"] is None:
            return found
        cursor = f"&cursor={answer.json['next_cursor']}"


async def test_closed_file_is_announced_read_and_erased(start: Start) -> None:
    api = await start(**rules())
    api.save(models.add(), "m")
    await api.load("m")
    answers = [await api.infer("m", ONE) for _ in range(3)]
    [opened] = await list_files(api)
    name = opened["file"]
    path = f"/api/v1/records/files/{name}?reason=a%20request%20of%20pia"
    assert (await api.send("DELETE", path)).refusal == (409, "record_file_open")
    await api.app[RECORDING].close()
    [closed] = await list_files(api)
    [file] = stored(api)
    content = file.read_bytes()
    [event] = [event for event in await api.events("m") if isinstance(event.data, RecordsClosed)]
    assert (event.id, event.actor) == (name, "system")
    assert closed == opened | {
        "state": "closed",
        "position": event.position,
        "records": len(answers),
        "dropped": 0,
        "sha256": sha256(content).hexdigest(),
        "bytes": len(content),
    }
    assert file.name == f"{name}.jsonl"
    lines = [json.loads(line) for line in content.splitlines()]
    assert [line["id"] for line in lines] == [answer.headers["X-Request-Id"] for answer in answers]
    assert lines == await list_lines(api)
    assert (await api.send("DELETE", path, subject="carol")).status == 204
    [erased] = [event for event in await api.events("m") if isinstance(event.data, RecordsErased)]
    assert (erased.actor, erased.data) == ("carol", RecordsErased(file=name, reason="a request of pia"))
    assert stored(api) == []
    assert await list_lines(api) == []
    assert (await api.send("DELETE", path)).refusal == (404, "unknown_record_file")


FILE = f"/api/v1/records/files/{NO_FILE}"


@pytest.mark.parametrize(
    ("method", "path", "roles", "refusal"),
    [
        ("GET", "/api/v1/records", INFER, (403, "forbidden")),
        ("GET", "/api/v1/records/files", INFER, (403, "forbidden")),
        ("DELETE", f"{FILE}?reason=x", INFER, (403, "forbidden")),
        ("DELETE", f"{FILE}?reason=x", AUDIT, (403, "forbidden")),
        ("DELETE", f"{FILE}?reason=x", ("admin",), (404, "unknown_record_file")),
        ("DELETE", FILE, ("admin",), (400, "invalid_parameter")),
        ("DELETE", "/api/v1/records/files/ledger.db?reason=x", ("admin",), (400, "invalid_parameter")),
        ("GET", "/api/v1/records?cursor=../../keys/x:0", AUDIT, (400, "invalid_parameter")),
        ("GET", "/api/v1/records?since=2026-01-31T14:02:00", AUDIT, (400, "invalid_parameter")),
        ("GET", "/api/v1/records?since=noon", AUDIT, (400, "invalid_parameter")),
        ("GET", "/api/v1/records?id=", AUDIT, (400, "invalid_parameter")),
        ("GET", "/api/v1/records/files?limit=0", AUDIT, (400, "invalid_parameter")),
    ],
)
async def test_records_request_is_refused(
    shared: LocalApi, method: str, path: str, roles: tuple[str, ...], refusal: tuple[int, str]
) -> None:
    assert (await shared.send(method, path, roles=roles)).refusal == refusal


async def test_readers_that_leave_lose_no_record(start: Start) -> None:
    """Requests whose clients leave are cancelled, also while they have the queue written."""
    api = await start(**rules())
    api.save(models.add(), "m")
    await api.load("m")
    recording, disk_answers = api.app[RECORDING], threading.Event()
    waiting = asyncio.create_task(recording.call(disk_answers.wait))
    assert (await api.infer("m", ONE)).status == 200
    reader = asyncio.create_task(recording.flush())
    for _ in range(5):  # steps of the loop, until the reader has the queue
        await asyncio.sleep(0)
    reader.cancel()
    disk_answers.set()
    await waiting
    assert len(await list_lines(api)) == 1


@pytest.mark.parametrize("roles", [AUDIT, ("admin",)])
async def test_records_are_read_with_role(shared: LocalApi, roles: tuple[str, ...]) -> None:
    assert (await shared.get("/api/v1/records", roles=roles)).json["records"] == []
    assert (await shared.get("/api/v1/records/files", roles=roles)).json["files"] == []


async def test_server_without_rules_records_nothing(tmp_path: Path) -> None:
    async with local_server(tmp_path, metrics="open") as api:
        api.save(models.add(), "m")
        await api.load("m")
        assert (await api.infer("m", ONE)).status == 200
        assert (await api.infer("m")).status == 400
        assert b"loadledger_records_total 0.0" in (await api.get("/metrics", roles=())).body
        assert not (api.config.data / FOLDER).exists()
        data = api.config.data
    assert not (data / FOLDER).exists()


async def test_metrics_count_records(start: Start) -> None:
    api = await start(metrics="open", **rules())
    api.save(models.add(), "m")
    await api.load("m")
    for _ in range(3):
        assert (await api.infer("m", ONE)).status == 200
    assert len(await list_lines(api)) == 3
    said = (await api.get("/metrics", roles=())).body.decode().splitlines()
    assert {line for line in said if line.startswith("loadledger_records")} == {
        "loadledger_records_total 3.0",
        'loadledger_records_dropped_total{reason="queue_full"} 0.0',
        'loadledger_records_dropped_total{reason="not_writable"} 0.0',
        'loadledger_records_dropped_total{reason="too_long"} 0.0',
        'loadledger_records_dropped_total{reason="failed"} 0.0',
        "loadledger_records_stopped 0.0",
    }
    assert "notices" not in (await api.get("/api/v1/resources")).json
