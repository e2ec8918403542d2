"""ModelInfer of gRPC: a request as HTTP with binary tensors, an HTTP answer as a message."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.history import PLAIN
from support.tritongrpc import triton_message

from features.grpc.errors import CallRefused, InvalidCall
from features.grpc.inference import MAX_FIELDS, MAX_HEAD_BYTES, InferenceCall, read_call, write_answer
from features.grpc.messages import message_class
from features.grpc.wireformat import field_head

Find = Callable[[str], Any]
FP32, INT8 = np.array([1.5, -2], "<f4").tobytes(), np.array([1, -2, 3], "i1").tobytes()


def own_message(name: str) -> Any:
    return message_class(f"inference.{name}")


BOTH = pytest.mark.parametrize("find", [triton_message, own_message], ids=["triton", "own"])


def request_of(find: Find, *, typed: bool) -> Any:
    """Return a request with two inputs and all else that there is."""
    request = find("ModelInferRequest")(model_name="m", model_version="stable", id="seven")
    for name, value in PARAMETERS.items():
        setattr(request.parameters[name], f"{name}_param", value)
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    x = request.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    x.parameters["of input"].string_param = "a"
    y = request.inputs.add(name="y", datatype="INT8", shape=[3])
    request.outputs.add(name="a").parameters["classification"].int64_param = 2
    request.outputs.add(name="b")
    if typed:
        x.contents.fp32_contents.extend([1.5, -2])
        y.contents.int_contents.extend([1, -2, 3])
    else:
        request.raw_input_contents.extend([FP32, INT8])
    return request


PARAMETERS = {"bool": True, "int64": -1, "string": "é", "double": 0.5, "uint64": 2**64 - 1}
OF_X, OF_Y = {"of input": "a", "binary_data_size": 8}, {"binary_data_size": 3}
HEAD = {
    "id": "seven",
    "parameters": {**PARAMETERS, "binary_data_output": True},
    "inputs": [
        {"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": OF_X},
        {"name": "y", "datatype": "INT8", "shape": [3], "parameters": OF_Y},
    ],
    "outputs": [
        {"name": "a", "parameters": {"classification": 2, "binary_data": True}},
        {"name": "b", "parameters": {"binary_data": True}},
    ],
}


async def read(message: bytes) -> InferenceCall:
    return await read_call(message, lambda _: None)


async def read_or_refuse(message: bytes) -> bool:
    """Return whether a message is a request, and then is one for the library; another one is refused."""
    try:
        call = await read(message)
    except InvalidCall:
        return False
    found, head = own_message("ModelInferRequest").FromString(message), json.loads(call.head)
    assert [each["name"] for each in head["inputs"]] == [each.name for each in found.inputs]
    assert [each["parameters"]["binary_data_size"] for each in head["inputs"]] == [*map(len, call.tensors)]
    assert not found.raw_input_contents or [*map(bytes, call.tensors)] == [*found.raw_input_contents]
    return True


# Requests


@BOTH
@pytest.mark.parametrize("typed", [False, True], ids=["raw", "typed"])
async def test_request_becomes_one_of_http(find: Find, *, typed: bool) -> None:
    call = await read(request_of(find, typed=typed).SerializeToString())
    assert (call.model_name, call.model_version, call.typed) == ("m", "stable", typed)
    assert json.loads(call.head) == HEAD
    assert [*map(bytes, call.tensors)] == [FP32, INT8]


async def test_smallest_request_has_no_id_and_no_tensors() -> None:
    call = await read(own_message("ModelInferRequest")(model_name="m").SerializeToString())
    head = {"parameters": {"binary_data_output": True}, "inputs": [], "outputs": []}
    assert (json.loads(call.head), call.tensors, call.typed) == (head, [], False)


async def test_raw_tensors_are_views_of_the_message() -> None:
    message = request_of(own_message, typed=False).SerializeToString()
    assert all(memoryview(tensor).obj is message for tensor in (await read(message)).tensors)


async def test_memory_of_typed_tensors_is_counted_before() -> None:
    taken = list[int]()
    await read_call(request_of(own_message, typed=True).SerializeToString(), taken.append)
    assert len(taken) == 2
    assert taken[1] >= len(INT8)

    def refuse(_: int) -> None:
        raise CallRefused("RESOURCE_EXHAUSTED", "full", "bodies_full")

    with pytest.raises(CallRefused, match="full"):
        await read_call(request_of(own_message, typed=True).SerializeToString(), refuse)


def add_contents(request: Any) -> None:
    request.inputs[1].contents.int_contents.append(1)


def add_inputs(count: int, name: str = "") -> Callable[[Any], None]:
    return lambda request: request.inputs.extend(
        [own_message("ModelInferRequest.InferInputTensor")(name=name)] * count
    )


def add_value(datatype: str) -> Callable[[Any], None]:
    def add(request: Any) -> None:
        del request.raw_input_contents[:]
        request.inputs[1].datatype = datatype
        request.inputs[1].contents.int_contents.append(300)

    return add


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (add_contents, "input 'y' has contents beside raw_input_contents: send either for all inputs"),
        (lambda request: request.raw_input_contents.pop(), "has 1 tensors for 2 inputs: send one for each"),
        (lambda request: request.raw_input_contents.append(b""), "has 3 tensors for 2 inputs"),
        (add_inputs(MAX_FIELDS), "more than 10,000 fields"),
        (add_inputs(4, "x" * (MAX_HEAD_BYTES // 4)), "longer than 1048576 bytes; send tensors in raw"),
        (lambda request: setattr(request, "id", "x" * MAX_HEAD_BYTES), "longer than 1048576 bytes"),
        (add_value("INT8"), "input 'y': a number in int_contents is out of the range of INT8"),
        (add_value("FP16"), "input 'y': FP16 has no typed contents: send raw_input_contents"),
        (add_value("x" * 1000), "input 'y': x{64} has no typed contents: no such datatype"),
    ],
)
async def test_request_against_the_rules_is_refused(change: Callable[[Any], None], text: str) -> None:
    request = request_of(own_message, typed=False)
    change(request)
    with pytest.raises(InvalidCall, match=text) as refused:
        await read(request.SerializeToString())
    assert (refused.value.status, refused.value.code) == ("INVALID_ARGUMENT", "invalid_input")
    assert len(str(refused.value)) < 300


async def test_input_of_too_many_fields_is_refused() -> None:
    dimensions = b"\x18\x01" * (MAX_FIELDS + 1)  # not packed
    with pytest.raises(InvalidCall, match="more than 10,000 fields"):
        await read(field_head(5, len(dimensions)) + dimensions)


@pytest.mark.parametrize("typed", [False, True], ids=["raw", "typed"])
async def test_truncated_request_is_read_or_refused(*, typed: bool) -> None:
    message = request_of(own_message, typed=typed).SerializeToString()
    found = [await read_or_refuse(message[:end]) for end in range(len(message) + 1)]
    assert (found[0], found[-1]) == (True, True)
    assert not all(found)


@PLAIN
@given(message=st.binary(max_size=60))
async def test_random_message_is_read_or_refused(message: bytes) -> None:
    await read_or_refuse(message)


@PLAIN
@given(data=st.data(), typed=st.booleans())
async def test_mutated_request_is_read_or_refused(data: st.DataObject, *, typed: bool) -> None:
    message = request_of(own_message, typed=typed).SerializeToString()
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(message)))
        end = min(len(message), start + data.draw(st.integers(0, 4)))
        message = message[:start] + data.draw(st.binary(max_size=4)) + message[end:]
    await read_or_refuse(message)


# Answers


def answer_of(*outputs: tuple[str, list[int], bytes], **members: str) -> tuple[bytes, int]:
    """Return the body of an HTTP answer, and the length of its JSON.

    Args:
        outputs: the datatype, shape and bytes of each.
        members: more of the JSON.
    """
    heads = [
        {"name": f"y{at}", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(raw)}}
        for at, (datatype, shape, raw) in enumerate(outputs)
    ]
    head = json.dumps({"model_name": "m", "model_version": "3", "outputs": heads, **members}).encode()
    return head + b"".join(raw for _, _, raw in outputs), len(head)


def described(response: Any) -> list[tuple[str, str, list[int]]]:
    return [(each.name, each.datatype, [*each.shape]) for each in response.outputs]


@BOTH
@pytest.mark.parametrize("typed", [False, True], ids=["raw", "typed"])
async def test_answer_becomes_a_message(find: Find, *, typed: bool) -> None:
    body, head_bytes = answer_of(
        ("FP32", [1, 2], FP32),
        ("INT8", [3], INT8),
        ("INT64", [0, 4], b""),
        ("BYTES", [1], b"\2\0\0\0ab"),
        id="7",
    )
    taken = list[int]()
    message = await write_answer(body, head_bytes, taken.append if typed else None)
    response = find("ModelInferResponse").FromString(message)
    assert (response.model_name, response.model_version, response.id) == ("m", "3", "7")
    assert described(response) == [
        ("y0", "FP32", [1, 2]), ("y1", "INT8", [3]), ("y2", "INT64", [0, 4]), ("y3", "BYTES", [1])
    ]  # fmt: skip
    contents = [each.contents for each in response.outputs]
    if typed:
        assert [*contents[0].fp32_contents] == [1.5, -2]
        assert [*contents[1].int_contents] == [1, -2, 3]
        assert [*contents[3].bytes_contents] == [b"ab"]
    else:
        assert [each.ByteSize() for each in contents] == [0] * 4
    assert len(taken) == (4 if typed else 0)
    assert [*response.raw_output_contents] == ([] if typed else [FP32, INT8, b"", b"\2\0\0\0ab"])


async def test_answer_without_a_typed_form_is_raw() -> None:
    body, head_bytes = answer_of(("FP32", [2], FP32), ("BF16", [1], b"\x80\x3f"))
    message = await write_answer(body, head_bytes, list[int]().append)
    response = own_message("ModelInferResponse").FromString(message)
    assert [*response.raw_output_contents] == [FP32, b"\x80\x3f"]
    assert not any(each.HasField("contents") for each in response.outputs)


async def test_answer_of_json_alone_has_empty_tensors() -> None:
    body, _ = answer_of(("FP32", [0], b""), ("INT8", [2, 0], b""))
    response = own_message("ModelInferResponse").FromString(await write_answer(body, None))
    assert described(response) == [("y0", "FP32", [0]), ("y1", "INT8", [2, 0])]
    assert [*response.raw_output_contents] == [b"", b""]


@pytest.mark.parametrize("length", [1000, 100_000], ids=["on the loop", "in a thread"])
async def test_long_typed_tensor_survives_both_ways(length: int) -> None:
    values = range(-7, length - 7)
    request = triton_message("ModelInferRequest")(model_name="m")
    request.inputs.add(name="x", datatype="INT32", shape=[length]).contents.int_contents.extend(values)
    [tensor] = (await read(request.SerializeToString())).tensors
    message = await write_answer(*answer_of(("INT32", [length], bytes(tensor))), list[int]().append)
    [output] = triton_message("ModelInferResponse").FromString(message).outputs
    assert [*output.contents.int_contents] == [*values]
