"""Binary tensors over HTTP, whatever they hold; compression; deadlines and queues as clients meet them."""

import asyncio
import gzip
import io
import json
import math
import os
import signal
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from support import models
from support.events import PLAIN
from support.http import Answer, Json, LocalApi, when
from support.models import save
from support.workers import until

from events.types import WorkerExited
from server.appkeys import BODIES

Start = Callable[..., Awaitable[LocalApi]]

LENGTH = "Inference-Header-Content-Length"
SIZES = {
    "BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8, "INT8": 1, "INT16": 2, "INT32": 4,
    "INT64": 8, "FP16": 2, "BF16": 2, "FP32": 4, "FP64": 8,
}  # fmt: skip
ONNX = {"FP16": "FLOAT16", "BF16": "BFLOAT16", "FP32": "FLOAT", "FP64": "DOUBLE", "BYTES": "STRING"}
TRIPS = {"name": "trips", "shape": [], "datatype": "INT64", "data": [models.ENDLESS]}


@dataclass(frozen=True)
class Given:
    """A tensor as its bytes on the wire."""

    datatype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def head(self) -> Json:
        """What the JSON says of it."""
        parameters = {"binary_data_size": len(self.data)}
        return {
            "name": "x",
            "datatype": self.datatype,
            "shape": list(self.shape),
            "parameters": parameters,
        }


@st.composite
def tensors(draw: st.DrawFn) -> Given:
    """Any tensor of any datatype."""
    datatype = draw(st.sampled_from([*SIZES, "BYTES"]))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    count = math.prod(shape)
    if datatype == "BYTES":
        texts = draw(st.lists(st.text(max_size=5), min_size=count, max_size=count))
        packed = [text.encode() for text in texts]
        return Given(datatype, shape, b"".join(struct.pack("<I", len(data)) + data for data in packed))
    if datatype == "BOOL":
        return Given(
            datatype, shape, bytes(draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)))
        )
    size = SIZES[datatype] * count
    return Given(datatype, shape, draw(st.binary(min_size=size, max_size=size)))


async def asked(
    api: LocalApi, model_id: str, tensor: Given, headers: dict[str, str] | None = None, **more: Json
) -> Answer:
    """Ask with one binary tensor; the outputs come back binary if nothing else is said."""
    request = {"inputs": [tensor.head], "parameters": {"binary_data_output": True}, **more}
    head = json.dumps(request).encode()
    return await api.post(
        f"/v2/models/{model_id}/infer",
        data=io.BytesIO(head + tensor.data),
        headers={LENGTH: str(len(head)), **(headers or {})},
        roles=("predict",),
    )


def outputs_of(answer: Answer) -> list[Given]:
    """Read the answer's binary outputs."""
    assert answer.status == 200, answer.body
    length = int(answer.headers.get(LENGTH, len(answer.body)))
    rest, found = answer.body[length:], []
    for output in json.loads(answer.body[:length])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        found.append(Given(output["datatype"], tuple(output["shape"]), rest[:size]))
        rest = rest[size:]
    assert not rest
    return found


@pytest.fixture
async def identities(api: LocalApi, repository: Path) -> LocalApi:
    """The application with `y = x` loaded for each datatype, of any shape."""
    for datatype in (*SIZES, "BYTES"):
        element = getattr(TensorProto, ONNX.get(datatype, datatype))
        save(models.identity_of_any_shape(element), repository, datatype)
        await api.load(datatype)
    return api


@settings(PLAIN, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(tensor=tensors())
async def test_any_binary_tensor_comes_back_bit_for_bit(identities: LocalApi, tensor: Given) -> None:
    assert outputs_of(await asked(identities, tensor.datatype, tensor)) == [tensor]


@settings(PLAIN, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(tensor=tensors())
async def test_any_tensor_that_json_can_carry_comes_back_bit_for_bit_from_json(
    identities: LocalApi, tensor: Given
) -> None:
    answer = await asked(identities, tensor.datatype, tensor, parameters={})
    if answer.status == 400:
        assert answer.refusal[1] == "not_representable"
        assert tensor.datatype in {"FP16", "BF16", "FP32", "FP64"}
        return
    [output] = answer.json["outputs"]
    assert "parameters" not in output
    question = {"name": "x", **{name: output[name] for name in ("datatype", "shape", "data")}}
    wanted = {"binary_data_output": True}
    again = await identities.infer(tensor.datatype, question, parameters=wanted)
    assert outputs_of(again) == [tensor]


async def test_outputs_come_each_in_the_form_that_is_asked_for(api: LocalApi, repository: Path) -> None:
    save(models.identity(), repository, "m")
    await api.load("m")
    tensor = Given("FP32", (2,), struct.pack("<2f", 1, 2))
    for default in (True, False):
        for own in (True, False):
            answer = await asked(
                api, "m", tensor,
                parameters={"binary_data_output": default},
                outputs=[{"name": "y", "parameters": {"binary_data": own}}],
            )  # fmt: skip
            assert (LENGTH in answer.headers) is own
            assert answer.media_type == ("application/octet-stream" if own else "application/json")


async def test_a_body_that_is_nothing_but_the_input_is_answered_in_kind(
    api: LocalApi, repository: Path
) -> None:
    save(models.identity(), repository, "m")
    await api.load("m")
    body = struct.pack("<3f", 1, 2, 3)
    answer = await api.post("/v2/models/m/infer", data=body, headers={LENGTH: "0"}, roles=("predict",))
    assert outputs_of(answer) == [Given("FP32", (3,), body)]
    odd = await api.post("/v2/models/m/infer", data=b"12345", headers={LENGTH: "0"}, roles=("predict",))
    assert odd.refusal == (400, "invalid_input")


def told(tensor: Given, **members: Json) -> bytes:
    """The JSON of a request for this tensor, with other members of it."""
    return json.dumps({"inputs": [{**tensor.head, **members}]}).encode()


PAIR = Given("FP32", (2,), b"\0" * 8)
WRONG: Sequence[tuple[bytes, str]] = (
    *((told(PAIR) + PAIR.data, length) for length in ("-1", "1e3", "9" * 14, "x", " ", "9" * 5000)),
    (told(PAIR) + PAIR.data, str(len(told(PAIR)) - 1)),
    (told(PAIR) + PAIR.data, str(len(told(PAIR)) + 1)),
    (told(PAIR) + PAIR.data + b"\0", str(len(told(PAIR)))),
    (told(PAIR) + PAIR.data[:-1], str(len(told(PAIR)))),
    *(
        (text + PAIR.data, str(len(text)))
        for text in (
            told(PAIR, shape=[3]),
            told(PAIR, shape=[2**31]),
            told(PAIR, shape=[-1, -2]),
            told(PAIR, shape=[250_000_000]),
            told(PAIR, datatype="FP64"),
            told(PAIR, datatype="FP31"),
            told(PAIR, data=[1, 2]),
            told(PAIR, name="z"),
            told(PAIR, parameters={"binary_data_size": -8}),
            told(PAIR, parameters={"binary_data_size": 8.0}),
            told(PAIR, parameters={"binary_data_size": "8"}),
            told(PAIR, parameters={"binary_data_size": 2**30}),
            told(PAIR, parameters={"shared_memory_region": "r"}),
            told(PAIR, parameters={}),
            b'{"inputs": []}',
            b'{"inputs": ' + b"[" * 5000,
            b"\xff",
        )
    ),
)


async def test_a_binary_request_that_is_wrong_is_400_and_harms_nobody(
    api: LocalApi, repository: Path, subtests: pytest.Subtests
) -> None:
    save(models.identity(), repository, "m")
    await api.load("m")
    pid = api.worker("m").pid
    for body, length in WRONG:
        with subtests.test(str(body[:90]), length=length[:10]):
            answer = await api.post("/v2/models/m/infer", data=body, headers={LENGTH: length})
            assert answer.refusal == (400, "invalid_input")
            assert len(answer.body) < 5_000
    assert outputs_of(await asked(api, "m", PAIR)) == [PAIR]
    assert api.worker("m").pid == pid


async def test_bytes_that_are_no_text_are_400(api: LocalApi, repository: Path) -> None:
    save(models.strings(), repository, "m")
    await api.load("m")
    for data in (b"\2\0\0\0\xff\xff", b"\xff\xff\xff\xff", b"\1\0\0\0", b"\0"):
        refused = await asked(api, "m", Given("BYTES", (1,), data))
        assert refused.refusal == (400, "invalid_input")
    empty = Given("BYTES", (1,), b"\0\0\0\0")
    assert outputs_of(await asked(api, "m", empty)) == [empty]


async def test_a_gibibyte_that_is_declared_and_does_not_come_costs_nothing(
    api: LocalApi, repository: Path
) -> None:
    save(models.identity(), repository, "m")
    await api.load("m")
    head = f"POST /v2/models/m/infer HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {api.token('predict')}\r\n"
    reader, writer = await asyncio.open_connection(api.client.server.host, api.client.server.port)
    writer.write(f"{head}Content-Length: {2**30}\r\n\r\n0123456789".encode())
    assert b" 413 " in await reader.readline()
    writer.close()
    await writer.wait_closed()


# Compression


@pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_requests_and_answers_may_be_compressed(
    api: LocalApi, repository: Path, coding: str, pack: Callable[[bytes], bytes]
) -> None:
    save(models.identity(), repository, "m")
    await api.load("m")
    tensor = Given("FP32", (1000,), bytes(4000))
    head = told(tensor)
    answer = await api.post(
        "/v2/models/m/infer",
        data=pack(head + tensor.data),
        headers={LENGTH: str(len(head)), "Content-Encoding": coding, "Accept-Encoding": coding},
        roles=("predict",),
    )
    assert answer.status == 200
    assert answer.headers["Content-Encoding"] == coding
    assert answer.json["outputs"][0]["data"] == [0.0] * 1000  # the client has unpacked it


async def test_a_small_body_that_would_become_a_huge_one_is_413(api: LocalApi, repository: Path) -> None:
    save(models.identity(), repository, "m")
    await api.load("m")
    bomb = zlib.compress(bytes(65 * 2**20))
    answer = await api.post("/v2/models/m/infer", data=bomb, headers={"Content-Encoding": "deflate"})
    assert answer.refusal == (413, "body_too_large")


# Deadlines, queues, clients that go away


async def test_the_client_s_own_deadline_stops_the_run(api: LocalApi, repository: Path) -> None:
    save(models.counting_loop(), repository, "m")
    await api.load("m")
    pid = api.worker("m").pid
    answer = await api.infer("m", TRIPS, parameters={"timeout": 50_000})
    assert answer.refusal == (504, "inference_timeout")
    assert "0.05 s" in answer.json["error"]
    assert (await api.infer("m", {**TRIPS, "data": [5]})).status == 200
    assert api.worker("m").pid == pid


async def test_a_worker_that_does_not_stop_is_replaced_and_what_waits_behind_is_answered(
    start: Start, repository: Path
) -> None:
    save(models.counting_loop(), repository, "m")
    api = await start(inference_timeout_s=20.0, inference_grace_s=0.1)
    await api.load("m")
    worker = api.worker("m")
    os.kill(worker.pid, signal.SIGSTOP)
    first = asyncio.create_task(api.infer("m", TRIPS, parameters={"timeout": 50_000}))
    await until(lambda: worker.in_flight == 1)
    behind = [asyncio.create_task(api.infer("m", {**TRIPS, "data": [number]})) for number in (3, 4)]
    assert (await first).refusal == (504, "inference_timeout")
    assert [(await task).json["outputs"][0]["data"] for task in behind] == [[3], [4]]
    [exited] = await api.data_of(WorkerExited)
    assert "did not stop" in exited.stderr[-1]
    assert api.worker("m").pid != worker.pid


async def test_a_full_queue_is_503_at_once_with_when_to_come_back(start: Start, repository: Path) -> None:
    save(models.counting_loop(), repository, "m")
    api = await start(inference_queue=2)
    await api.load("m")
    worker = api.worker("m")
    running = [asyncio.create_task(api.infer("m", TRIPS)) for _ in range(2)]
    await until(lambda: worker.in_flight == 2)
    refused = await api.infer("m", TRIPS)
    assert refused.refusal == (503, "inference_queue_full")
    assert refused.headers["Retry-After"] == "1"
    await api.unload("m", force=True)
    assert {(await task).status for task in running} == {503}


async def test_a_client_that_goes_away_stops_its_run(api: LocalApi, repository: Path) -> None:
    save(models.counting_loop(), repository, "m")
    await api.load("m")
    worker = api.worker("m")
    asking = asyncio.create_task(api.infer("m", TRIPS))
    await until(lambda: worker.in_flight == 1)
    asking.cancel()
    await until(lambda: worker.in_flight == 0)
    assert (await api.infer("m", {**TRIPS, "data": [5]})).status == 200
    assert api.worker("m") is worker


async def test_more_than_the_memory_for_bodies_is_503_and_is_given_back(
    start: Start, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.app.MAX_BODIES_BYTES", 2**20)
    save(models.identity(), repository, "m")
    api = await start()
    await api.load("m")

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(32):
            yield b" " * 2**16

    for _ in range(2):
        assert (await api.post("/v2/models/m/infer", data=endless())).refusal == (503, "bodies_full")
    answer = await when(lambda: asked(api, "m", PAIR), lambda seen: seen.status == 200)
    assert outputs_of(answer) == [PAIR]


async def test_one_subject_cannot_take_all_the_memory_for_bodies(
    start: Start, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.app.MAX_BODIES_BYTES", 2**20)
    save(models.identity(), repository, "m")
    api = await start()
    await api.load("m")
    more, bodies = asyncio.Event(), api.app[BODIES]

    async def slowly() -> AsyncIterator[bytes]:
        yield b" " * 2**19
        await more.wait()
        yield json.dumps({"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [7]}]}).encode()

    half = asyncio.create_task(api.post("/v2/models/m/infer", data=slowly(), subject="alice"))
    await until(lambda: bodies.taken_bytes == 2**19)
    large = Given("FP32", (2**16,), bytes(2**18))
    head = told(large)
    for subject, status in (("alice", 503), ("bob", 200)):
        answer = await api.post(
            "/v2/models/m/infer",
            data=io.BytesIO(head + large.data),
            headers={LENGTH: str(len(head))},
            subject=subject,
        )
        assert answer.status == status
    more.set()
    assert (await half).refusal == (503, "bodies_full")
    await until(lambda: bodies.taken_bytes == 0)


async def test_what_a_worker_has_not_read_is_bounded_though_nobody_waits_for_it_any_more(
    api: LocalApi, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.processes.workers.MAX_UNSENT_BYTES", 2**20)
    save(models.identity(), repository, "m")
    await api.load("m")
    os.kill(api.worker("m").pid, signal.SIGSTOP)
    large = Given("FP32", (2**20,), bytes(2**22))
    soon = {"timeout": 20_000}
    assert (await asked(api, "m", large, parameters=soon)).refusal == (504, "inference_timeout")
    assert (await asked(api, "m", large, parameters=soon)).refusal == (503, "inference_queue_full")
    os.kill(api.worker("m").pid, signal.SIGCONT)
    answer = await when(lambda: asked(api, "m", PAIR), lambda seen: seen.status == 200)
    assert outputs_of(answer) == [PAIR]
