"""Long JSON: read in a process of its own, however hostile it is, and within the body budget."""

import asyncio
import io
import json
import os
import re
import signal
import tracemalloc
from collections.abc import AsyncIterator, Mapping

import numpy as np
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from support import models
from support.history import PLAIN
from support.http import ONE, Answer, LocalApi, local_server
from support.workers import fork_server_of, until

from runtime.errors import InvalidInput
from runtime.requestjson import LONG_JSON_BYTES, assemble, decode_json, describe
from runtime.wire import JsonRead, MalformedFrame
from runtime.worker.main import find_address
from server.appkeys import BODIES, POOL
from server.v2 import codec

LONG = LONG_JSON_BYTES + 1
HEAD = b'{"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": ["'


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalApi]:
    """One application with `y = x` of numbers and of strings."""
    async with local_server(tmp_path_factory.mktemp("shared")) as api:
        for model_id, model in (("numbers", models.identity()), ("strings", models.strings())):
            api.save(model, model_id)
            await api.load(model_id)
        yield api


async def infer(api: LocalApi, model_id: str, body: bytes, **headers: str) -> Answer:
    return await api.post(f"/v2/models/{model_id}/infer", data=io.BytesIO(body), headers=headers)


def nothing_is_left(api: LocalApi) -> bool:
    """Whether no bytes are counted, and no process but the models' is left; else it may be on its way."""
    return api.app[BODIES].taken_bytes == 0 and len(api.app[POOL]._workers) <= 3


async def test_long_json_is_answered_as_a_short_one(shared: LocalApi) -> None:
    one = {"name": "x", "datatype": "FP32", "shape": [2], "data": [1 / 7, float("-inf")]}
    request = {"id": "é", "parameters": {"own": 1}, "inputs": [one], "outputs": [{"name": "y"}]}
    text = json.dumps(request).replace(", -Inf", f",{' ' * LONG}-Inf").encode()
    output = {
        "name": "y",
        "datatype": "FP32",
        "shape": [2],
        "data": [float(np.float32(1 / 7)), float("-inf")],
    }
    expected = {"model_name": "numbers", "model_version": "1", "id": "é", "outputs": [output]}
    assert (await infer(shared, "numbers", text)).json == expected
    packed = {codec.HEADER_LENGTH: str(len(text))}  # JSON alone, of a body that could have more
    assert (await infer(shared, "numbers", text, **packed)).json == expected
    assert nothing_is_left(shared)


async def test_reading_counts_in_the_body_budget(shared: LocalApi) -> None:
    spaced = json.dumps({"inputs": [ONE]}).replace("[1]}", f"[1{' ' * LONG}]}}").encode()
    bodies = shared.app[BODIES]
    bodies.add("alice", bodies._max_bytes // 2 - 3 * LONG)  # room for the body, and not for reading it
    assert (await infer(shared, "numbers", spaced)).refusal == (503, "bodies_full")
    bodies.add("alice", 3 * LONG - bodies._max_bytes // 2)
    assert (await infer(shared, "numbers", spaced)).status == 200


HOSTILE: Mapping[str, tuple[bytes, bytes, str]] = {
    "nothing": (b"", b" ", "the body is not an inference request"),
    "brackets": (HEAD[:-2], b"[", "the body is not an inference request"),
    "objects": (b'{"inputs": [', b"{},", "inputs; no more are allowed"),
    "members": (b"{", b'"x": 1,', "the body is not an inference request"),
    "names": (b'{"inputs": [{"name": "', b"n", "the body is not an inference request"),
    "escapes": (HEAD, rb"\u003a", "the body is not an inference request"),
}


async def test_hostile_text_is_refused_and_another_subject_is_answered(
    shared: LocalApi, subtests: pytest.Subtests
) -> None:
    fine = {"name": "x", "datatype": "BYTES", "shape": [1], "data": ["a"]}
    for name, (head, repeated, reason) in HOSTILE.items():
        with subtests.test(name):
            body = head + repeated * (LONG // len(repeated) + 1)
            refused = asyncio.ensure_future(infer(shared, "strings", body))
            other = await shared.post("/v2/models/strings/infer", json={"inputs": [fine]}, subject="bob")
            assert other.status == 200
            assert (await refused).refusal == (400, "invalid_input")
            assert reason in (await refused).json["detail"]
            assert nothing_is_left(shared)


async def test_end_of_the_fork_server_is_no_mistake_of_the_client(shared: LocalApi) -> None:
    pool = shared.app[POOL]
    asked = asyncio.ensure_future(infer(shared, "strings", HEAD + b":" * (16 * 2**20)))
    await until(lambda: any(worker.worker_id == "JSON" for worker in pool._workers))
    os.kill(fork_server_of(pool).pid, signal.SIGKILL)
    assert (await asked).refusal == (503, "fork_server_unavailable")


def read(text: bytes) -> JsonRead:
    return describe(text, find_address)


@PLAIN
@given(
    data=st.recursive(st.integers() | st.text(), st.lists, max_leaves=9).map(json.dumps),
    count=st.integers(0, 3),
    padding=st.text(" \n", max_size=3),
    ends=st.sampled_from(("", "}", "x")),
)
def test_text_read_elsewhere_is_the_one_read_here(data: str, count: int, padding: str, ends: str) -> None:
    one = f'{{"name":{padding}"é","shape":[2], "data":{padding}{data}{padding},"datatype":"FP32"}}'
    bare = '{"name": "b", "shape": [], "datatype": "FP32", "parameters": {"binary_data_size": 4}}'
    text = f'{{"id":"1","inputs":[{",".join([*[one] * count, bare])}]}}{ends}'.encode()
    if ends:
        with pytest.raises(InvalidInput) as here:
            decode_json(text)
        with pytest.raises(InvalidInput, match=re.escape(str(here.value))):
            assemble(text, read(text))
    else:
        expected, found = decode_json(text), assemble(text, read(text))
        assert [bytes(each.data) for each in found.inputs] == [bytes(each.data) for each in expected.inputs]
        assert (found.id, found.inputs[-1].parameters) == (expected.id, expected.inputs[-1].parameters)


@pytest.mark.parametrize("element", [b"NaN,", b"-Infinity,"])
def test_nan_is_read_within_two_copies_of_the_text(element: bytes) -> None:
    text = TEXT.replace(b"[1]}", b"[" + element * (LONG // len(element)) + b"1]}")
    tracemalloc.start()
    try:
        assert not read(text).problem
        assert tracemalloc.get_traced_memory()[1] < 2.1 * len(text)  # `reading_bytes` has room for no more
    finally:
        tracemalloc.stop()


TEXT = b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1]}]}'


@pytest.mark.parametrize(
    "untrue",
    [
        JsonRead(b"{", ()),
        JsonRead(b"\xff", ()),
        JsonRead(b'{"inputs":[]}', ((0, 1),)),
        JsonRead(read(TEXT).head, ()),
        JsonRead(read(TEXT).head, ((0, len(TEXT) + 1),)),
        JsonRead(read(TEXT).head, ((2**62, 1),)),
    ],
)
def test_untrue_words_of_the_reading_process_are_refused(untrue: JsonRead) -> None:
    with pytest.raises(MalformedFrame):
        assemble(TEXT, untrue)
