"""Inference over HTTP by the Open Inference Protocol v2: JSON and binary tensors, refusals, metadata."""

import asyncio
import io
import json
import math
import struct
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from random import Random
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper
from support import models
from support.history import PLAIN
from support.http import ONE, Answer, Json, LocalApi, when
from support.models import FLOAT, save, save_bytes
from yarl import URL

from events.types import ModelLoaded

LENGTH = "Inference-Header-Content-Length"
MIB = 2**20
LOADED = ["LoadRequested", "LoadStarted", "ModelLoaded"]
SIZES = {
    "BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8, "INT8": 1, "INT16": 2, "INT32": 4,
    "INT64": 8, "FP16": 2, "BF16": 2, "FP32": 4, "FP64": 8,
}  # fmt: skip
ONNX = {"FP16": "FLOAT16", "BF16": "BFLOAT16", "FP32": "FLOAT", "FP64": "DOUBLE", "BYTES": "STRING"}


@dataclass(frozen=True)
class Binary:
    """A tensor as its bytes on the wire."""

    datatype: str
    shape: tuple[int, ...]
    data: bytes

    def head(self, **members: Json) -> bytes:
        """Return the JSON of a request for this tensor, with other members of the input."""
        named = {"name": "x", "datatype": self.datatype, "shape": self.shape}
        return json.dumps(
            {"inputs": [{**named, "parameters": {"binary_data_size": len(self.data)}, **members}]}
        ).encode()


PAIR = Binary("FP32", (2,), struct.pack("<2f", 1, 2))


@st.composite
def tensors(draw: st.DrawFn) -> Binary:
    datatype = draw(st.sampled_from([*SIZES, "BYTES"]))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    count = math.prod(shape)
    size = SIZES.get(datatype, 1) * count
    if datatype != "BYTES":
        data = draw(st.binary(min_size=size, max_size=size))
        return Binary(datatype, shape, bytes(each & 1 for each in data) if datatype == "BOOL" else data)
    texts = draw(st.lists(st.text(max_size=5).map(str.encode), min_size=count, max_size=count))
    return Binary(datatype, shape, b"".join(struct.pack("<I", len(text)) + text for text in texts))


def floats(*values: float, name: str = "x") -> Json:
    return {**ONE, "name": name, "shape": [len(values)], "data": list(values)}


async def load(api: LocalApi, model_id: str, model: ModelProto, number: int = 1, **parameters: Any) -> None:
    save(model, api.config.repository, model_id, number)
    await api.load(model_id, version=number, **parameters)


async def infer_binary(api: LocalApi, model_id: str, tensor: Binary, **members: Json) -> Answer:
    """Send one binary tensor; outputs come back binary unless the members say otherwise."""
    members = {"parameters": {"binary_data_output": True}, **members}
    head = json.dumps({**json.loads(tensor.head()), **members}).encode()
    path, headers = f"/v2/models/{model_id}/infer", {LENGTH: str(len(head))}
    return await api.post(path, data=io.BytesIO(head + tensor.data), headers=headers, roles=("infer",))


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


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def identities(shared: LocalApi) -> LocalApi:
    """`y = x` loaded for each datatype, of any shape, under the datatype's name."""
    elements = {name: getattr(TensorProto, ONNX.get(name, name)) for name in (*SIZES, "BYTES")}
    identities = {name: models.identity_of_any_shape(element) for name, element in elements.items()}
    await asyncio.gather(*(load(shared, name, model) for name, model in identities.items()))
    return shared


async def test_json_tensors_come_back_equal_and_flat(identities: LocalApi) -> None:
    for datatype, shape, data, values in (
        ("INT64", [1, 2], [[-(2**63), 2**63 - 1]], [-(2**63), 2**63 - 1]),
        ("BOOL", [2], [True, False], [True, False]),
        ("BYTES", [2], ["", "é\u0000😀"], ["", "é\u0000😀"]),
        ("FP64", [2], [1e300, -0.1], [1e300, -0.1]),
        ("FP32", [2, 0], [[], []], []),
        ("FP32", [], [7.5], [7.5]),
    ):
        tensor = {"name": "x", "shape": shape, "datatype": datatype, "data": data}
        assert (await identities.infer(datatype, tensor)).json == {
            "model_name": datatype,
            "model_version": "1",
            "outputs": [{"name": "y", "shape": shape, "datatype": datatype, "data": values}],
        }


@settings(PLAIN, suppress_health_check=[HealthCheck.too_slow])
@given(tensor=tensors())
@example(tensor=Binary("FP32", (10**6,), Random(0).randbytes(4 * 10**6)))  # too large for a single write
async def test_any_binary_tensor_comes_back_bit_for_bit(identities: LocalApi, tensor: Binary) -> None:
    assert outputs_of(await infer_binary(identities, tensor.datatype, tensor)) == [tensor]


async def test_long_tensors_of_several_instances_come_back(shared: LocalApi) -> None:
    """Each through the memory of the worker that it was received into."""
    await load(shared, "instances", models.identity(), instances=2)
    rng = Random(0)
    sent = [Binary("FP32", (2**16,), rng.randbytes(4 * 2**16)) for _ in range(12)]
    for _ in range(2):
        answers = await asyncio.gather(*(infer_binary(shared, "instances", each) for each in sent))
        assert [outputs_of(answer) for answer in answers] == [[each] for each in sent]


@settings(PLAIN, suppress_health_check=[HealthCheck.too_slow])
@given(tensor=tensors())
async def test_any_json_tensor_comes_back_bit_for_bit(identities: LocalApi, tensor: Binary) -> None:
    answer = await infer_binary(identities, tensor.datatype, tensor, parameters={})
    if answer.status == 400:
        assert answer.refusal[1] == "not_representable"
        assert tensor.datatype in {"FP16", "BF16"}
        return
    [output] = answer.json["outputs"]
    assert "parameters" not in output
    again = {"name": "x", **{name: output[name] for name in ("datatype", "shape", "data")}}
    binary = {"binary_data_output": True}
    [back] = outputs_of(await identities.infer(tensor.datatype, again, parameters=binary))
    assert with_one_nan(back) == with_one_nan(tensor)


def with_one_nan(tensor: Binary) -> Binary:
    """Return a tensor whose NaN, of which there are many, are one."""
    if tensor.datatype not in {"FP32", "FP64"}:
        return tensor
    array = np.frombuffer(tensor.data, f"<f{SIZES[tensor.datatype]}").copy()
    array[np.isnan(array)] = np.nan
    return Binary(tensor.datatype, tensor.shape, array.tobytes())


async def test_nan_comes_back_in_json(shared: LocalApi) -> None:
    await load(shared, "add-nan", models.add())
    one = '{"name": "x", "datatype": "FP32", "shape": [3], "data": [NaN, -Infinity, 1]}'
    answer = await post_text(shared, "add-nan", f'{{"id": "NaN: Infinity", "inputs": [{one}]}}')
    assert answer.json["id"] == "NaN: Infinity"
    assert b'"data":[NaN,-Infinity,2.0]' in answer.body


async def post_text(api: LocalApi, model_id: str, text: str) -> Answer:
    return await api.post(f"/v2/models/{model_id}/infer", data=io.BytesIO(text.encode()), roles=("infer",))


async def test_bytes_need_not_be_utf8(shared: LocalApi) -> None:
    """A model that compares strings gets them as they are; one that returns them cannot."""
    equal = helper.make_node("Equal", ["x", "other"], ["y"])
    sent = [b"\xff", b"\xff\0", b"\xfe\xff", "ä".encode(), b""]
    inputs = [helper.make_tensor_value_info(name, TensorProto.STRING, ["n"]) for name in ("x", "other")]
    outputs = [helper.make_tensor_value_info("y", TensorProto.BOOL, ["n"])]
    graph = helper.make_graph([equal], "equal", inputs, outputs)
    opset = [helper.make_opsetid("", 19)]
    await load(shared, "equal", helper.make_model(graph, opset_imports=opset, ir_version=9))
    await load(shared, "strings", models.strings())

    async def compare(mine: list[bytes], others: list[bytes]) -> Answer:
        data = [
            b"".join(struct.pack("<I", len(each)) + each for each in elements) for elements in (mine, others)
        ]
        heads = [
            {
                "name": name, "datatype": "BYTES", "shape": [len(mine)],
                "parameters": {"binary_data_size": len(each)},
            }
            for name, each in zip(("x", "other"), data, strict=True)
        ]  # fmt: skip
        head = json.dumps({"inputs": heads}).encode()
        body, headers = io.BytesIO(b"".join([head, *data])), {LENGTH: str(len(head))}
        return await shared.post("/v2/models/equal/infer", data=body, headers=headers, roles=("infer",))

    for mine, other in product(sent, repeat=2):
        assert (await compare([mine], [other])).json["outputs"][0]["data"] == [mine == other]
    several = [b"\xff", b"abc", b"\xfe\xfd"]
    assert (await compare(several, several[::-1])).json["outputs"][0]["data"] == [False, True, False]
    assert "send a request for each" in (await compare(sent, sent)).json["detail"]
    refused = await infer_binary(shared, "strings", Binary("BYTES", (1,), b"\1\0\0\0\xff"))
    assert refused.refusal == (400, "inference_failed")
    assert "output 'y' holds a string that is not UTF-8" in refused.json["detail"]


async def test_each_output_comes_in_the_requested_form(identities: LocalApi) -> None:
    for default, own in product((True, False), repeat=2):
        outputs = [{"name": "y", "parameters": {"binary_data": own}}]
        parameters = {"binary_data_output": default}
        answer = await infer_binary(identities, "FP32", PAIR, parameters=parameters, outputs=outputs)
        assert (LENGTH in answer.headers) is own
        assert answer.media_type == ("application/octet-stream" if own else "application/json")


async def test_raw_body_is_answered_raw(shared: LocalApi) -> None:
    await load(shared, "raw", models.identity())
    path, body = "/v2/models/raw/infer", struct.pack("<3f", 1, 2, 3)
    answer = await shared.post(path, data=body, headers={LENGTH: "0"}, roles=("infer",))
    assert outputs_of(answer) == [Binary("FP32", (3,), body)]
    odd = await shared.post(path, data=b"12345", headers={LENGTH: "0"}, roles=("infer",))
    assert odd.refusal == (400, "invalid_input")


async def test_request_and_answer_are_compressed(identities: LocalApi) -> None:
    tensor = Binary("FP32", (1000,), bytes(4000))
    body, length = tensor.head() + tensor.data, str(len(tensor.head()))
    headers = {LENGTH: length, "Content-Encoding": "deflate", "Accept-Encoding": "gzip"}
    answer = await identities.post("/v2/models/FP32/infer", data=zlib.compress(body), headers=headers)
    assert (answer.status, answer.headers["Content-Encoding"]) == (200, "gzip")
    assert answer.json["outputs"][0]["data"] == [0.0] * 1000  # the test's client has unpacked it


async def test_request_id_and_output_names_are_kept(shared: LocalApi) -> None:
    await load(shared, "zip", models.zip_map())
    rows = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}
    answer = (await shared.infer("zip", rows)).json
    assert "id" not in answer
    assert [output["name"] for output in answer["outputs"]] == ["scores"]  # the other is no tensor
    answer = (await shared.infer("zip", rows, id="é", outputs=[{"name": "scores"}])).json
    assert (answer["id"], answer["outputs"][0]["name"]) == ("é", "scores")
    assert (await shared.infer("zip", rows, outputs=[{"name": "named"}])).refusal == (400, "invalid_input")


async def test_inputs_are_matched_by_name(shared: LocalApi) -> None:
    await load(shared, "subtract", models.subtract())
    a, b = floats(5, name="a"), floats(3, name="b")
    for inputs in ((a, b), (b, a)):
        assert (await shared.infer("subtract", *inputs)).json["outputs"][0]["data"] == [2]
    largest = 3.4e38
    answer = await shared.infer("subtract", floats(largest, name="a"), floats(-largest, name="b"))
    assert answer.json["outputs"][0]["data"] == [math.inf]
    refused = await shared.infer("subtract", floats(1, 2, name="a"), floats(1, 2, 3, name="b"))
    assert refused.refusal == (400, "inference_failed")
    assert "the model cannot compute these inputs" in refused.json["error"]
    assert await shared.types("subtract") == LOADED  # inference appends nothing


async def test_answer_names_the_load_behind_it(shared: LocalApi) -> None:
    for number in (1, 2):
        await load(shared, "versions", models.add(number), number)
        events = [event for event in await shared.events("versions") if isinstance(event.data, ModelLoaded)]
        answer = await shared.infer("versions", ONE)
        assert answer.headers["Loadledger-Model"] == f"versions/{number};position={events[-1].position}"
        assert answer.json["model_version"] == str(number)
        assert answer.json["outputs"][0]["data"] == [1 + number]
        assert (await shared.infer("versions", ONE, version=number)).status == 200


async def test_concurrent_requests_get_their_own_answers(identities: LocalApi) -> None:
    answers = await asyncio.gather(*(identities.infer("FP32", floats(n), id=str(n)) for n in range(100)))
    found = [(answer.json["id"], answer.json["outputs"][0]["data"]) for answer in answers]
    assert found == [(str(n), [float(n)]) for n in range(100)]


# test_codec.py and the worker's tests have the other refusals
@pytest.mark.parametrize(
    ("body", "length", "reason"),
    [
        (b"[" * 100_000, None, "not an inference request"),
        (b'{"inputs": []}', None, "no value for input 'x'"),
        (json.dumps({"inputs": [{**ONE, "data": ["1"]}]}).encode(), None, "Expected `float`, got `str`"),
        (json.dumps({"inputs": [ONE], "outputs": [{"name": "z"}]}).encode(), None, "no output 'z'"),
        (PAIR.head() + PAIR.data, "9" * 5000, LENGTH),
        (PAIR.head() + PAIR.data[:-1], str(len(PAIR.head())), "only 7 bytes"),
    ],
    ids=["nested", "input", "element", "output", "length", "short"],
)
async def test_invalid_request_is_refused_with_the_reason(
    identities: LocalApi, body: bytes, length: str | None, reason: str
) -> None:
    pid = identities.worker("FP32").pid
    headers = {LENGTH: length} if length is not None else {}
    answer = await identities.post("/v2/models/FP32/infer", data=body, headers=headers)
    assert answer.refusal == (400, "invalid_input")
    assert reason in answer.json["error"]
    assert answer.json["error"] == answer.json["detail"]
    assert len(answer.body) < 5_000
    assert (await identities.infer("FP32", ONE)).status == 200
    assert identities.worker("FP32").pid == pid


async def test_bytes_without_their_length_are_refused(identities: LocalApi) -> None:
    for data in (b"\xff\xff\xff\xff", b"\0"):
        refused = await infer_binary(identities, "BYTES", Binary("BYTES", (1,), data))
        assert refused.refusal == (400, "invalid_input")


async def test_too_large_body_is_refused(identities: LocalApi) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(65):
            yield b" " * MIB

    bomb, packed = zlib.compress(bytes(65 * MIB)), {"Content-Encoding": "deflate"}
    binary = {LENGTH: "0"}
    for body, headers in ((chunks(), {}), (bomb, packed), (chunks(), binary), (bomb, packed | binary)):
        answer = await identities.post("/v2/models/FP32/infer", data=body, headers=headers)
        assert answer.refusal == (413, "body_too_large")
    head = "POST /v2/models/FP32/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 1073741824\r\n"
    url = URL(identities.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(f"{head}Authorization: Bearer {identities.token('infer')}\r\n\r\n0123456789".encode())
    assert b" 413 " in await reader.readline()  # before the rest has come
    writer.close()
    await writer.wait_closed()


NOT_LOADED, UNKNOWN = (503, "model_not_loaded"), (404, "unknown_model")
INVALID = (400, "invalid_parameter")


async def test_model_or_version_that_is_not_loaded_is_refused(shared: LocalApi) -> None:
    for number in (1, 2):
        save(models.identity(), shared.config.repository, "idle", number)
    await load(shared, "one", models.identity())
    save(models.identity(), shared.config.repository, "one", 2)
    for path, expected in (
        ("idle", NOT_LOADED),
        ("idle/versions/1", NOT_LOADED),
        ("one/versions/2", NOT_LOADED),
        ("one/versions/3", NOT_LOADED),
        ("nope", UNKNOWN),
        ("nope/versions/1", UNKNOWN),
    ):
        answer = await shared.post(f"/v2/models/{path}/infer", json={"inputs": [ONE]})
        assert answer.refusal == expected, path
        assert answer.media_type == "application/json"
        for rest in ("/config", "/stats"):
            assert (await shared.get(f"/v2/models/{path}{rest}")).refusal == expected, path
        assert (await shared.get(f"/v2/models/{path}/ready")).refusal == (400, "not_ready"), path
    for text in ("0", "-1", "01x", "1v", "1.0", "9999999999999999999", "%00", "+1", "%2B1"):
        for rest in ("", "/ready", "/config", "/stats"):
            assert (await shared.get(f"/v2/models/one/versions/{text}{rest}")).refusal == INVALID, text
    idle = await shared.infer("idle", ONE)
    assert "POST /api/v1/models/idle/load" in idle.json["error"]
    assert "Retry-After" in idle.headers
    other = await shared.infer("one", ONE, version=2)
    assert "version 2 of model 'one' is not loaded, version 1 is" in other.json["error"]
    assert [await shared.types(name) for name in ("idle", "one", "nope")] == [[], LOADED, []]


async def test_server_metadata_lists_extensions(shared: LocalApi) -> None:
    extensions = ["model_repository", "model_configuration", "binary_tensor_data", "parameters", "statistics"]
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


async def stats(api: LocalApi, path: str = "/v2/models/stats") -> list[Json]:
    answer = await api.get(path, roles=("audit",))
    assert answer.status == 200, answer.body
    found: list[Json] = answer.json["model_stats"]
    return found


async def test_statistics_count_each_phase_of_a_load_s_inferences(shared: LocalApi) -> None:
    await load(shared, "counted", models.subtract(), 3)
    path, b = "/v2/models/counted/versions/3/stats", floats(1, 2, name="b")
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
    [batch] = after["batch_stats"]
    assert (batch["batch_size"], batch["compute_infer"]["count"]) == (1, 2)
    memory_bytes = (await shared.model("counted"))["memory_at_load_bytes"]
    assert after["memory_usage"] == [{"type": "CPU", "id": 0, "byte_size": memory_bytes}]
    await load(shared, "counted", models.subtract(), 4)
    [fresh] = await stats(shared, "/v2/models/counted/stats")
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
    [own] = await stats(shared, "/v2/models/stats/stats")
    assert own["inference_count"] == 1
