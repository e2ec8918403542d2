"""Inference over HTTP by the Open Inference Protocol v2: tensors, refusals, metadata, where the time goes."""

import asyncio
import io
import json
import math
import struct
import time
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib.metadata import version
from random import Random
from typing import Any

import pytest
import pytest_asyncio
from onnx import ModelProto, TensorProto, helper
from prometheus_client.parser import text_string_to_metric_families as read_metrics
from support import models
from support.http import ENDLESS, ONE, Answer, Json, LocalApi, local_server, when
from support.models import FLOAT, save, save_bytes
from support.workers import computing, until

from events.types import ModelLoaded
from server.appkeys import BODIES
from server.observability.metrics import SCRAPES

LENGTH = "Inference-Header-Content-Length"
MIB = 2**20
LARGEST = 5 * MIB
RAW = {LENGTH: "0"}
LOADED = ["LoadRequested", "LoadStarted", "ModelLoaded"]


@dataclass(frozen=True)
class Binary:
    """A tensor as its bytes on the wire."""

    datatype: str
    shape: tuple[int, ...]
    data: bytes

    def head(self, name: str = "x") -> Json:
        """Return the tensor as an input of a request, without its bytes."""
        size = {"binary_data_size": len(self.data)}
        return {"name": name, "datatype": self.datatype, "shape": self.shape, "parameters": size}


PAIR = Binary("FP32", (2,), struct.pack("<2f", 1, 2))


def texts(*elements: bytes) -> Binary:
    data = b"".join(struct.pack("<I", len(each)) + each for each in elements)
    return Binary("BYTES", (len(elements),), data)


def floats(*values: float, name: str = "x") -> Json:
    return {**ONE, "name": name, "shape": [len(values)], "data": list(values)}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalApi]:
    """One application that takes bodies of 5 MiB, with `y = x` loaded under the name of its datatype."""
    folder = tmp_path_factory.mktemp("shared")
    async with local_server(folder, max_request_size=f"{LARGEST // MIB}MiB") as api:
        for name, element in (("FP32", FLOAT), ("FP16", TensorProto.FLOAT16), ("BYTES", TensorProto.STRING)):
            await load(api, name, models.identity_of_any_shape(element))
        yield api


async def load(api: LocalApi, model_id: str, model: ModelProto, number: int = 1, **parameters: Any) -> None:
    save(model, api.config.repository, model_id, number)
    await api.load(model_id, version=number, **parameters)


async def infer_binary(
    api: LocalApi, model_id: str, *tensors: Binary, names: str = "x", **members: Json
) -> Answer:
    """Send binary tensors; outputs come back binary unless the members say otherwise."""
    inputs = [tensor.head(name) for tensor, name in zip(tensors, names, strict=True)]
    members = {"parameters": {"binary_data_output": True}, **members}
    head = json.dumps({"inputs": inputs, **members}).encode()
    body = io.BytesIO(b"".join([head, *(tensor.data for tensor in tensors)]))
    headers = {LENGTH: str(len(head))}
    return await api.post(f"/v2/models/{model_id}/infer", data=body, headers=headers, roles=("infer",))


def outputs_of(answer: Answer) -> list[Binary]:
    assert answer.status == 200, answer.body
    length = int(answer.headers.get(LENGTH, len(answer.body)))
    rest, found = answer.body[length:], []
    for output in json.loads(answer.body[:length])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        found.append(Binary(output["datatype"], tuple(output["shape"]), rest[:size]))
        rest = rest[size:]
    assert not rest
    return found


# The other datatypes, shapes and values: test_codec.py, the worker's tests, and the contract of the clients.
async def test_json_tensors_come_back_flat_and_complete(shared: LocalApi) -> None:
    one = '{"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [[NaN, -Infinity], [1, 2.5]]}'
    text = f'{{"id": "é: NaN", "inputs": [{one}]}}'.encode()
    answer = await shared.post("/v2/models/FP32/infer", data=io.BytesIO(text), roles=("infer",))
    assert answer.body.decode() == (
        '{"model_name":"FP32","model_version":"1","outputs":[{"name":"y","datatype":"FP32","shape":[2,2],'
        '"data":[NaN,-Infinity,1.0,2.5]}],"id":"é: NaN"}'
    )
    data = ["", "é\0😀"]
    answer = await shared.infer("BYTES", {"name": "x", "datatype": "BYTES", "shape": [2], "data": data})
    assert answer.json["outputs"] == [{"name": "y", "datatype": "BYTES", "shape": [2], "data": data}]
    assert "id" not in answer.json


async def test_long_tensors_of_several_instances_come_back(shared: LocalApi) -> None:
    """Each through the memory of the worker that it was received into."""
    await load(shared, "instances", models.identity(), instances=2)
    rng = Random(0)
    lengths = [*[2**16] * 12, 2**20]  # the last is too large for a single write
    sent = [Binary("FP32", (length,), rng.randbytes(4 * length)) for length in lengths]
    for _ in range(2):
        answers = await asyncio.gather(*(infer_binary(shared, "instances", each) for each in sent))
        assert [outputs_of(answer) for answer in answers] == [[each] for each in sent]


async def test_bytes_need_not_be_utf8(shared: LocalApi) -> None:
    """A model that compares strings gets them as they are; one that returns them cannot."""
    equal = helper.make_node("Equal", ["x", "z"], ["y"])
    inputs = [helper.make_tensor_value_info(name, TensorProto.STRING, ["n"]) for name in "xz"]
    outputs = [helper.make_tensor_value_info("y", TensorProto.BOOL, ["n"])]
    graph = helper.make_graph([equal], "equal", inputs, outputs)
    opset = [helper.make_opsetid("", 19)]
    await load(shared, "equal", helper.make_model(graph, opset_imports=opset, ir_version=9))
    for mine, others, expected in (
        ([b"\xff"], [b"\xff"], [True]),
        ([b"\xff"], [b"\xff\0"], [False]),
        ([b"\xff", b"abc", b"\xfe\xfd"], [b"\xfe\xfd", b"abc", b"\xff"], [False, True, False]),
    ):
        answer = await infer_binary(shared, "equal", texts(*mine), texts(*others), names="xz", parameters={})
        assert answer.json["outputs"][0]["data"] == expected
    unlike = texts(b"\xff\0", b"a")
    refused = await infer_binary(shared, "equal", unlike, unlike, names="xz")
    assert "send a request for each" in refused.json["detail"]
    refused = await infer_binary(shared, "BYTES", texts(b"\xff"))
    assert refused.refusal == (400, "inference_failed")
    assert "output 'y' holds a string that is not UTF-8" in refused.json["detail"]


async def test_answer_has_the_type_of_its_outputs(shared: LocalApi) -> None:
    for default, own, is_binary in (({"binary_data_output": True}, False, False), ({}, True, True)):
        outputs = [{"name": "y", "parameters": {"binary_data": own}}]
        answer = await infer_binary(shared, "FP32", PAIR, parameters=default, outputs=outputs)
        assert (LENGTH in answer.headers) is is_binary
        assert answer.media_type == ("application/octet-stream" if is_binary else "application/json")
    refused = await infer_binary(shared, "FP16", Binary("FP16", (1,), b"\0\0"), parameters={})
    assert refused.refusal == (400, "not_representable")


async def test_failed_inference_is_400_and_appends_nothing(shared: LocalApi) -> None:
    await load(shared, "subtract", models.subtract())
    largest = 3.4e38
    answer = await shared.infer("subtract", floats(-largest, name="b"), floats(largest, name="a"))
    assert answer.json["outputs"][0]["data"] == [math.inf]
    refused = await shared.infer("subtract", floats(1, 2, name="a"), floats(1, 2, 3, name="b"))
    assert refused.refusal == (400, "inference_failed")
    assert "the model cannot compute these inputs" in refused.json["error"]
    assert await shared.types("subtract") == LOADED


async def test_answer_names_the_load_behind_it(shared: LocalApi) -> None:
    for number in (1, 2):
        await load(shared, "versions", models.add(number), number)
        events = [event for event in await shared.events("versions") if isinstance(event.data, ModelLoaded)]
        for asked in (None, number):
            answer = await shared.infer("versions", ONE, version=asked)
            assert answer.headers["Loadledger-Model"] == f"versions/{number};position={events[-1].position}"
            assert answer.json["model_version"] == str(number)
            assert answer.json["outputs"][0]["data"] == [1 + number]


# test_codec.py and the worker's tests have the other refusals
async def test_invalid_request_is_refused_with_the_reason(shared: LocalApi) -> None:
    pid, wrong = shared.worker("FP32").pid, {**ONE, "data": ["1"]}
    for body, headers, reason in (
        (b"[" * 100_000, {}, "not an inference request"),
        (json.dumps({"inputs": [wrong]}).encode(), {}, "Expected `float`, got `str`"),
        (b"{}", {LENGTH: "9" * 5000}, LENGTH),
        (b"{}", {LENGTH: "3"}, "but the body has 2 bytes"),
    ):
        answer = await shared.post("/v2/models/FP32/infer", data=body, headers=headers)
        assert answer.refusal == (400, "invalid_input")
        assert reason in answer.json["error"]
        assert answer.json["error"] == answer.json["detail"]
        assert len(answer.body) < 5_000
    assert (await shared.infer("FP32", ONE)).status == 200
    assert shared.worker("FP32").pid == pid


async def test_too_large_body_is_refused(shared: LocalApi) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(LARGEST // MIB + 1):
            yield b" " * MIB

    bomb, packed = zlib.compress(bytes(LARGEST + MIB)), {"Content-Encoding": "deflate"}
    for body, headers in ((chunks(), {}), (bomb, packed), (chunks(), RAW), (bomb, packed | RAW)):
        answer = await shared.post("/v2/models/FP32/infer", data=body, headers=headers)
        assert answer.refusal == (413, "body_too_large")
    head = f"POST /v2/models/FP32/infer HTTP/1.1\r\nHost: a\r\nContent-Length: {2**30}\r\n"
    reader, writer = await asyncio.open_connection(shared.client.host, shared.client.port)
    writer.write(f"{head}Authorization: Bearer {shared.token('infer')}\r\n\r\n0123456789".encode())
    assert b" 413 " in await reader.readline()  # before the rest has come
    writer.close()
    await writer.wait_closed()


NOT_LOADED, UNKNOWN = (503, "model_not_loaded"), (404, "unknown_model")
INVALID = (400, "invalid_parameter")


async def test_model_or_version_that_is_not_loaded_is_refused(shared: LocalApi) -> None:
    save(models.identity(), shared.config.repository, "idle")
    await load(shared, "one", models.identity())
    for path, expected in (
        ("idle", NOT_LOADED),
        ("one/versions/2", NOT_LOADED),
        ("nope/versions/1", UNKNOWN),
    ):
        answer = await shared.post(f"/v2/models/{path}/infer", json={"inputs": [ONE]})
        assert answer.refusal == expected, path
        assert answer.media_type == "application/json"
        for rest in ("/config", "/stats"):
            assert (await shared.get(f"/v2/models/{path}{rest}")).refusal == expected, path
        assert (await shared.get(f"/v2/models/{path}/ready")).refusal == (400, "not_ready"), path
    for text in ("0", "-1", "01x", "1v", "1.0", "9999999999999999999", "%00", "+1", "%2B1"):
        assert (await shared.get(f"/v2/models/one/versions/{text}/ready")).refusal == INVALID, text
    idle = await shared.infer("idle", ONE)
    assert "POST /api/v1/models/idle/load" in idle.json["error"]
    assert "Retry-After" in idle.headers
    other = await shared.infer("one", ONE, version=2)
    assert "version 2 of model 'one' is not loaded, version 1 is" in other.json["error"]
    assert [await shared.types(name) for name in ("idle", "one", "nope")] == [[], LOADED, []]


async def test_server_metadata_lists_extensions(shared: LocalApi) -> None:
    extensions = [
        *("model_repository", "model_configuration", "binary_tensor_data", "parameters", "statistics"),
        "schedule_policy",
    ]
    for path in ("/v2", "/v2/"):
        answer = await shared.get(path, roles=("audit",))
        expected = {"name": "loadledger", "version": version("loadledger"), "extensions": extensions}
        assert answer.json == expected


async def test_metadata_and_configuration_of_a_loaded_model(shared: LocalApi) -> None:
    batching = {"max_batch_size": 8, "max_queue_delay_us": 100, "instances": 2}
    await load(shared, "seven", models.identity(FLOAT, (None, 4)), 7, **batching)
    example = {"shape": [1, 4], "values": "zeros"}
    for path in ("/v2/models/seven", "/v2/models/seven/versions/7"):
        assert (await shared.get(path)).json == {
            "name": "seven", "versions": ["7"], "platform": "onnxruntime_onnx",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4], "example": example}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
        }  # fmt: skip
        assert (await shared.get(f"{path}/ready")).json == {"name": "seven", "ready": True}
        assert (await shared.get(f"{path}/config", roles=("infer",))).json == {
            "name": "seven",
            "platform": "onnxruntime_onnx",
            "backend": "onnxruntime",
            "version_policy": {"specific": {"versions": [7]}},
            "max_batch_size": 8,
            "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [4], "optional": False}],
            "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [4]}],
            "instance_group": [{"name": "seven_0", "kind": "KIND_CPU", "count": 2}],
            "default_model_filename": "model.onnx",
            "dynamic_batching": {"max_queue_delay_microseconds": 100},
            "model_transaction_policy": {"decoupled": False},
        }


async def test_metadata_of_a_model_that_is_not_loaded_is_its_files(shared: LocalApi) -> None:
    root = shared.config.repository
    for number, rank in ((1, 1), (2, 2)):
        save(models.identity(FLOAT, (None, *[4] * rank)), root, "unread", number)
    save(models.identity(FLOAT, (None,)), root, "half", 1)
    await shared.load("half")
    save(models.identity(FLOAT, (3,)), root, "half", 2)
    save_bytes(b"<!DOCTYPE html>", root, "page")
    for path, number, shape in (
        ("unread", 2, [-1, 4, 4]),
        ("unread/versions/1", 1, [-1, 4]),
        ("half", 1, [-1]),
        ("half/versions/2", 2, [3]),
    ):
        tensors = [{"name": name, "datatype": "FP32", "shape": shape} for name in ("x", "y")]
        described = (await shared.get(f"/v2/models/{path}", roles=("infer",))).json
        assert (described["inputs"][0].pop("example", None) is not None) is (path == "half")
        assert described == {
            "name": path.partition("/")[0], "versions": [str(number)], "platform": "onnxruntime_onnx",
            "inputs": tensors[:1], "outputs": tensors[1:],
        }  # fmt: skip
    for path, expected in (
        ("unread/versions/3", (404, "unknown_version")),
        ("half/versions/3", (404, "unknown_version")),
        ("page", (400, "invalid_model")),
        ("nope", (404, "unknown_model")),
    ):
        assert (await shared.get(f"/v2/models/{path}")).refusal == expected
    shown = [await shared.model(model_id) for model_id in ("unread", "half", "page")]
    assert [each.get("inputs_of_version") for each in shown] == [2, 1, None]
    assert {"inputs", "outputs", "inputs_of_version"}.isdisjoint(shown[2])
    assert [shown[0]["inputs"][0]["shape"], shown[1]["inputs"][0]["shape"]] == [[-1, 4, 4], [-1]]
    listed = (await shared.get("/api/v1/models")).json["models"]
    assert not any("inputs" in each for each in listed)


PHASES = ("queue", "compute_input", "compute_infer", "compute_output", "transport")
STAGES = ("queue", "input", "infer", "output", "transport")


async def stats(api: LocalApi, path: str = "stats") -> list[Json]:
    answer = await api.get(f"/v2/models/{path}", roles=("audit",))
    assert answer.status == 200, answer.body
    found: list[Json] = answer.json["model_stats"]
    return found


async def spent_ns(api: LocalApi, model_id: str) -> dict[str, int]:
    """Return where the time of a model went, which its statistics divide without a rest; so does /metrics."""
    [of_model] = await stats(api, f"{model_id}/stats")
    counts, spent = of_model["inference_stats"], {}
    for name in ("success", *PHASES):
        assert counts[name]["count"] == counts["success"]["count"]
        spent[name] = counts[name]["ns"]
    assert sum(spent[name] for name in PHASES) == spent["success"]
    api.app[SCRAPES]._kept_until_s.clear()
    text = (await api.get("/metrics")).body.decode()
    seconds = {
        sample.labels["stage"]: sample.value
        for family in read_metrics(text)
        for sample in family.samples
        if sample.name == "loadledger_inference_stage_seconds_total" and sample.labels["model"] == model_id
    }
    assert seconds == {stage: spent[name] / 1e9 for stage, name in zip(STAGES, PHASES, strict=True)}
    return spent


async def pass_some_time(api: LocalApi) -> int:
    """Have the server work for others meanwhile, and return for how many nanoseconds it did."""
    begun_ns = time.monotonic_ns()
    for _ in range(5):  # to tell the time from noise
        await api.get("/v2")
    return time.monotonic_ns() - begun_ns


async def test_statistics_count_each_phase_of_a_load_s_inferences(shared: LocalApi) -> None:
    await load(shared, "counted", models.subtract(), 3)
    path, b = "counted/versions/3/stats", floats(1, 2, name="b")
    [before] = await stats(shared, path)
    assert (before["name"], before["version"]) == ("counted", "3")
    assert (before["inference_count"], before["execution_count"], before["last_inference"]) == (0, 0, 0)
    answers = [await shared.infer("counted", floats(*a, name="a"), b) for a in ((1, 2), (5,), (1, 2, 3))]
    assert [answer.status for answer in answers] == [200, 200, 400]
    [after] = await stats(shared, path)
    assert (after["inference_count"], after["execution_count"]) == (2, 2)
    assert after["last_inference"] > 1_600_000_000_000
    counts = after["inference_stats"]
    assert [counts[each]["count"] for each in ("fail", "success", *PHASES)] == [1, 2, 2, 2, 2, 2, 2]
    assert counts["success"]["ns"] >= counts["compute_infer"]["ns"] > 0
    memory_bytes = (await shared.model("counted"))["memory_at_load_bytes"]
    assert after["memory_usage"] == [{"type": "CPU", "id": 0, "byte_size": memory_bytes}]
    await load(shared, "counted", models.subtract(), 4)
    [fresh] = await stats(shared, "counted/stats")
    assert (fresh["version"], fresh["inference_count"]) == ("4", 0)
    shared.worker("counted").kill()
    await when(lambda: stats(shared), lambda seen: "counted" in [each["name"] for each in seen])


async def test_statistics_list_loaded_models_by_name(shared: LocalApi) -> None:
    for name in ("stats", "a"):
        await load(shared, name, models.add())
    names = [each["name"] for each in await stats(shared)]
    assert names == sorted(names)
    assert {"a", "stats"} <= set(names)
    await shared.unload("a")
    assert "a" not in [each["name"] for each in await stats(shared)]
    # The one model whose metadata without a version cannot be read: its name is the route's.
    assert (await shared.get("/v2/models/stats/versions/1")).json["name"] == "stats"
    assert (await shared.infer("stats", ONE)).status == 200
    [own] = await stats(shared, "stats/stats")
    assert own["inference_count"] == 1


async def test_wait_for_another_request_is_queue_time(shared: LocalApi) -> None:
    await load(shared, "busy", models.counting_loop())
    worker = shared.worker("busy")
    is_busy = computing(worker.pid)
    first = asyncio.create_task(shared.infer("busy", ENDLESS))
    await until(lambda: worker.in_flight == 1 and is_busy())
    second = asyncio.create_task(shared.infer("busy", {**ENDLESS, "data": [1]}))
    await until(lambda: worker.in_flight == 2)
    waited_ns = await pass_some_time(shared)
    first.cancel()
    assert (await second).status == 200
    spent = await spent_ns(shared, "busy")
    assert waited_ns <= spent["queue"] <= spent["success"]
    assert spent["compute_infer"] > 0


async def test_reading_of_a_large_body_is_transport_time(shared: LocalApi) -> None:
    await load(shared, "large", models.identity())
    half, bodies, receiving_ns = bytes(2 * MIB), shared.app[BODIES], 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal receiving_ns
        yield half
        await until(lambda: bodies.taken_bytes > 0)
        receiving_ns = await pass_some_time(shared)
        yield half

    answer = await shared.post("/v2/models/large/infer", data=pieces(), headers=RAW, roles=("infer",))
    assert answer.status == 200
    spent = await spent_ns(shared, "large")
    assert receiving_ns < spent["transport"] < spent["success"]
    assert spent["queue"] < spent["transport"]


async def test_answer_counts_before_its_client_has_received_it(shared: LocalApi) -> None:
    await load(shared, "unfinished", models.identity())
    reader, writer = await asyncio.open_connection(shared.client.host, shared.client.port, limit=1024)
    body = bytes(4 * MIB)
    head = (
        "POST /v2/models/unfinished/infer HTTP/1.1", "Host: a", "Connection: close",
        f"Content-Length: {len(body)}", f"{LENGTH}: 0", f"Authorization: Bearer {shared.token('infer')}",
        "", "",
    )  # fmt: skip
    writer.write("\r\n".join(head).encode() + body)
    await reader.readexactly(1)
    assert (await spent_ns(shared, "unfinished"))["success"] > 0
    assert len(await reader.read()) > len(body)
    writer.close()
    await writer.wait_closed()
