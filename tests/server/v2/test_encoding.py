"""Answers of the Open Inference Protocol, read back by a reader of their own."""

import json
import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from support.events import PLAIN

from runtime.wire import DATATYPES, Tensor
from server.v2.codec import encode_response

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


@st.composite
def outputs(draw: st.DrawFn) -> Tensor:
    datatype = draw(st.sampled_from(sorted(DATATYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=4)))
    if draw(st.booleans()):
        text = json.dumps(draw(st.lists(st.integers() | st.text(max_size=3), max_size=3))).encode()
        return Tensor(draw(NAMES), datatype, shape, text, text=True)
    size = math.prod(shape) * DATATYPES[datatype].size if datatype != "BYTES" else draw(st.integers(0, 9))
    return Tensor(draw(NAMES), datatype, shape, memoryview(draw(st.binary(min_size=size, max_size=size))))


def read(body: bytes, header_bytes: int | None) -> tuple[dict[str, Any], list[Tensor]]:
    """Read an answer as a client does: the JSON, then the binary outputs in their order."""
    answer = json.loads(body[:header_bytes])
    rest = b"" if header_bytes is None else body[header_bytes:]
    tensors = []
    for each in answer.pop("outputs"):
        head = each["name"], each["datatype"], tuple(each["shape"])
        if "parameters" in each:
            assert "data" not in each
            size = each["parameters"]["binary_data_size"]
            tensors.append(Tensor(*head, rest[:size]))
            rest = rest[size:]
        else:
            tensors.append(Tensor(*head, json.dumps(each["data"]).encode(), text=True))
    assert rest == b""
    return answer, tensors


@PLAIN
@given(NAMES, NAMES | st.none(), st.lists(outputs(), max_size=5))
def test_what_is_written_is_read_back_bit_for_bit(
    model_id: str, request_id: str | None, drawn: list[Tensor]
) -> None:
    buffers, header_bytes = encode_response(model_id, 3, request_id, drawn)
    answer, tensors = read(b"".join(buffers), header_bytes)
    assert tensors == drawn
    expected = {"model_name": model_id, "model_version": "3"}
    assert answer == (expected if request_id is None else {**expected, "id": request_id})
    assert (header_bytes is None) == (not any(len(each.data) for each in drawn if not each.text))


def test_an_answer_of_json_alone_has_no_parameters_and_no_length() -> None:
    buffers, header_bytes = encode_response("m", 1, None, [Tensor("y", "FP32", (2,), b"[1.5,2]", text=True)])
    output = b'{"name":"y","datatype":"FP32","shape":[2],"data":[1.5,2]}'
    assert buffers == [b'{"model_name":"m","model_version":"1","outputs":[' + output + b"]}"]
    assert header_bytes is None


def test_binary_outputs_without_any_bytes_make_no_binary_answer() -> None:
    empty = Tensor("y", "FP32", (0, 3), b"")
    [body], header_bytes = encode_response("m", 1, "", [empty])
    assert header_bytes is None
    assert json.loads(bytes(body))["outputs"][0]["parameters"] == {"binary_data_size": 0}
    assert json.loads(bytes(body))["id"] == ""
    buffers, header_bytes = encode_response("m", 1, None, [empty, Tensor("z", "INT8", (1,), b"a"), empty])
    assert header_bytes == len(buffers[0])
    assert buffers[1:] == [b"a"]


def test_the_data_of_binary_outputs_is_handed_on_and_not_copied() -> None:
    data = memoryview(bytes(100))
    buffers, _ = encode_response("m", 1, None, [Tensor("y", "INT8", (100,), data)])
    assert buffers[1] is data
