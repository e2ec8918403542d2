"""Requests of the Open Inference Protocol: JSON, binary and raw, and all that can be wrong with them."""

import json
import math
import tracemalloc
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.events import PLAIN

from runtime.errors import InvalidInput
from runtime.wire import (
    DATATYPES,
    MAX_NAME_CHARACTERS,
    Infer,
    Tensor,
    TensorSpec,
    WantedOutput,
    encode,
    heads,
)
from server.v2.codec import (
    MAX_HEAD_BYTES,
    MAX_INPUTS,
    InferenceRequest,
    decode_raw,
    decode_request,
    header_length,
)

JSON_DATATYPES = sorted(DATATYPES.keys() - {"FP16", "BF16"})
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
ELEMENTS = st.integers() | st.text(max_size=3) | st.floats(allow_nan=False, allow_infinity=False)


def asked(*inputs: Any, data: bytes = b"", **members: Any) -> InferenceRequest:
    """Decode a request with these inputs, and `data` after its JSON."""
    text = json.dumps({"inputs": inputs, **members}).encode()
    return decode_request(text + data, len(text) if data else None)


def tensor(**members: Any) -> dict[str, Any]:
    return {"name": "x", "shape": [2], "datatype": "FP32", "data": [1, 2]} | members


def binary(size: object, **members: Any) -> dict[str, Any]:
    plain = {"name": "x", "shape": [2], "datatype": "FP32", "parameters": {"binary_data_size": size}}
    return plain | members


def refusal(body: bytes, header_bytes: int | None = None) -> str:
    with pytest.raises(InvalidInput) as refused:
        decode_request(body, header_bytes)
    assert refused.value.code == "invalid_input"
    return str(refused.value)


def refused(*inputs: Any, data: bytes = b"", **members: Any) -> str:
    with pytest.raises(InvalidInput) as error:
        asked(*inputs, data=data, **members)
    return str(error.value)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    datatype = draw(st.sampled_from(sorted(DATATYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=4)))
    if datatype in JSON_DATATYPES and draw(st.booleans()):
        values = draw(st.lists(ELEMENTS, max_size=3))
        return Tensor(draw(NAMES), datatype, shape, json.dumps(values).encode(), text=True)
    size = math.prod(shape) * DATATYPES[datatype].size if datatype != "BYTES" else draw(st.integers(0, 9))
    return Tensor(draw(NAMES), datatype, shape, draw(st.binary(min_size=size, max_size=size)))


def written(item: Tensor) -> str:
    """Write an input as a client does."""
    head = f'"name": {json.dumps(item.name)}, "shape": {list(item.shape)}, "datatype": "{item.datatype}"'
    if item.text:
        return f'{{{head}, "data": {bytes(item.data).decode()}}}'
    return f'{{{head}, "parameters": {{"binary_data_size": {len(item.data)}, "mine": 1.5}}}}'


# What is right


@PLAIN
@given(st.lists(tensors(), max_size=5))
def test_what_a_client_writes_comes_out_as_it_was_and_fits_into_a_frame(drawn: list[Tensor]) -> None:
    text = f'{{"id": "7", "inputs": [{", ".join(map(written, drawn))}]}}'.encode()
    payload = b"".join(item.data for item in drawn if not item.text)
    request = decode_request(text + payload, len(text))
    assert request == InferenceRequest("7", None, tuple(drawn), (), text=True)
    assert encode(Infer(1, heads(request.tensors)), request.tensors)
    if not payload:
        assert decode_request(text) == request


def test_the_tensors_are_views_of_the_body_and_no_copies() -> None:
    text = json.dumps({"inputs": [tensor(), binary(8)]}).encode()
    body = bytearray(text + bytes(8))
    request = decode_request(body, len(text))
    body[len(text)] = 7
    assert bytes(request.tensors[1].data[:1]) == b"\7"
    body[text.index(b"[1, 2]") + 1] = ord("5")
    assert bytes(request.tensors[0].data) == b"[5, 2]"


def test_the_form_of_outputs_is_json_unless_the_request_or_the_output_says_otherwise() -> None:
    named = [{"name": "a"}, {"name": "b", "parameters": {"binary_data": True}}]
    named += [
        {"name": "c", "parameters": {"binary_data": False, "mine": "x"}},
        {"name": "d", "parameters": {}},
    ]
    for members, forms in (
        ({}, (True, False, False, True)),
        ({"binary_data_output": False}, (True, False, False, True)),
        ({"binary_data_output": True}, (False, False, True, False)),
    ):
        request = asked(tensor(), outputs=named, parameters=members)
        wanted = {"a": forms[0], "b": False, "c": True, "d": forms[3]}
        assert request.outputs == tuple(WantedOutput(name, text) for name, text in wanted.items())
        assert request.text is forms[0]
        assert asked(tensor(), parameters=members).outputs == ()


@pytest.mark.parametrize(
    ("given_us", "expected"), [(0, None), (1, 1), (2**63 - 1, 2**63 - 1), (5_000_000, 5_000_000)]
)
def test_the_timeout_is_in_microseconds_and_0_is_none(given_us: int, expected: int | None) -> None:
    assert asked(tensor(), parameters={"timeout": given_us}).timeout_us == expected
    assert asked(tensor()).timeout_us is None


def test_members_and_parameters_of_the_client_s_own_are_ignored_as_is_what_asks_for_nothing() -> None:
    custom: dict[str, Any] = {"mine": "x", "pi": 3.1, "n": -(2**63), "yes": True, "": "", "headers": "x"}
    for neutral in (0, ""):
        custom |= {"sequence_id": neutral, "sequence_start": False, "sequence_end": False, "priority": 0}
        output = {"name": "y", "parameters": {**custom, "classification": 0}, "mine": []}
        request = asked(tensor(parameters=custom, mine={}), outputs=[output], parameters=custom, mine=[{}])
        assert request == asked(tensor(), outputs=[{"name": "y"}])


def test_members_that_are_null_are_not_there() -> None:
    plain = asked(tensor(parameters=None), outputs=None, id=None, parameters=None)
    assert plain == asked(tensor()) == asked(tensor(), outputs=[], parameters={})
    assert asked(tensor(), id="").id == ""


def test_zero_size_tensors_and_scalars_may_be_binary() -> None:
    request = asked(
        binary(0, shape=[0, 3]), binary(4, shape=[]), binary(0, shape=[2**31 - 1, 0]), data=b"abcd"
    )
    assert [bytes(each.data) for each in request.tensors] == [b"", b"abcd", b""]
    text = json.dumps({"inputs": [binary(0, shape=[0])]}).encode()
    assert decode_request(text, len(text)) == decode_request(text)


# What is wrong


@pytest.mark.parametrize("size", [7, 9, 0, -8, 8.0, "8", True, 2**62, 10**30, -(10**30)])
def test_a_size_that_is_not_the_shape_s_is_refused(size: object) -> None:
    assert "input 'x'" in refused(binary(size), data=bytes(8))


@pytest.mark.parametrize(
    ("inputs", "data", "told"),
    [
        ([binary(8)], bytes(7), "only 7 bytes of the body are left"),
        ([binary(8)], b"", "only 0 bytes of the body are left"),
        ([binary(8)], bytes(9), "1 bytes are left over"),
        ([tensor()], bytes(9), "9 bytes are left over"),
        ([binary(8), binary(8, name="z")], bytes(15), "input 'z': binary_data_size is 8, but only 7"),
        ([binary(2**30, shape=[2**28])], bytes(10), "only 10 bytes"),
        ([binary(2**30, datatype="BYTES")], bytes(10), "only 10 bytes"),
        ([tensor(parameters={"binary_data_size": 8})], bytes(8), "not both"),
        ([binary(8) | {"data": None}], bytes(8), "not both"),
        ([{"name": "x", "shape": [2], "datatype": "FP32"}], b"", "'x': data is missing"),
        ([tensor(datatype="FP16")], b"", "use the binary data form"),
        ([tensor(datatype="BF16")], b"", "use the binary data form"),
        ([tensor(datatype="fp32")], b"", "'fp32' is no datatype"),
        ([binary(8, datatype="")], bytes(8), "'' is no datatype"),
        ([tensor(shape=[-1])], b"", "$.inputs[0].shape"),
        ([tensor(shape=[2**31])], b"", "$.inputs[0].shape"),
        ([tensor(), tensor(name="z", shape=[1] * 65)], b"", "$.inputs[1].shape"),
        ([tensor(shape=[1.5])], b"", "$.inputs[0].shape"),
        ([tensor(shape=[True])], b"", "$.inputs[0].shape"),
        ([tensor(shape=None)], b"", "$.inputs[0].shape"),
        ([tensor(datatype=1)], b"", "$.inputs[0].datatype"),
        ([tensor(name=1)], b"", "inputs[0].name"),
        ([tensor(name="n" * (MAX_NAME_CHARACTERS + 1))], b"", "length"),
        ([tensor(parameters={"mine": [1]})], b"", "$.inputs[0].parameters"),
        ([tensor(parameters={"a": 1, "mine": None})], b"", "$.inputs[0].parameters"),
        ([tensor(parameters=[])], b"", "inputs[0].parameters"),
        ([tensor(parameters={"shared_memory_region": "r"})], b"", "shared memory is not supported; send"),
        ([binary(8, parameters={"shared_memory_region": "r"})], b"", "shared memory is not supported"),
        ([tensor(parameters={"triton_x": 1})], b"", "input 'x': the parameter 'triton_x' is not supported"),
    ],
)  # fmt: skip
def test_an_input_that_is_wrong_is_refused_by_name(inputs: list[Any], data: bytes, told: str) -> None:
    assert told in refused(*inputs, data=data)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sequence_id", 1), ("sequence_id", "a"), ("sequence_id", False), ("sequence_id", 0.0),
        ("sequence_start", True), ("sequence_end", True), ("sequence_start", 0), ("priority", 1),
        ("priority", "0"), ("priority", False), ("triton_enable_empty_final_response", False),
        ("triton_", ""),
        ("timeout", -1), ("timeout", 1.5), ("timeout", "1"), ("timeout", True), ("timeout", 2**63),
        ("binary_data_output", 1), ("binary_data_output", "true"),
    ],
)  # fmt: skip
def test_a_parameter_of_the_request_that_is_not_supported_is_refused_by_name(
    name: str, value: object
) -> None:
    assert f"the parameter '{name}'" in refused(tensor(), parameters={"a": 1, name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("classification", 3), ("binary_data", 1), ("binary_data", "false"), ("shared_memory_region", "r"),
        ("shared_memory_byte_size", 8), ("triton_x", 1),
    ],
)  # fmt: skip
def test_a_parameter_of_an_output_that_is_not_supported_is_refused_by_name(name: str, value: object) -> None:
    for more in ({}, {"a": 1}, {"binary_data": True}):
        told = refused(tensor(), outputs=[{"name": "z"}, {"name": "y", "parameters": {**more, name: value}}])
        assert told.startswith("output 'y': ")
        assert name in told


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b"{}", b'{"inputs": {}}', b'{"inputs": [1]}', b'{"inputs": []',
        b'{"inputs": []} x', b'\xef\xbb\xbf{"inputs": []}', b"\xff\xfe", b"[" * 100_000,
        b'{"x":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"inputs": [], "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"inputs": [{"name": "x", "shape": [1], "datatype": "BOOL", "data": ' + b"[" * 100_000 + b"}]}",
        b'{"inputs": [{"name": "\xff", "shape": [1], "datatype": "BOOL", "data": [1]}]}',
        b'{"inputs": [{"name": "\\ud800", "shape": [1], "datatype": "BOOL", "data": [1]}]}',
        b'{"inputs": [], "outputs": ["y"]}', b'{"inputs": [], "id": 1}', b'{"inputs": [], "parameters": []}',
        b'{"inputs": [], "parameters": {"mine": []}}', b'{"inputs": [], "parameters": {"mine": null}}',
        b'{"inputs": [], "outputs": [{"name": "y", "parameters": {"mine": {}}}]}',
        b'{"inputs": [{}, {"name": 1}], "inputs": []}', b'{"inputs": [], "parameters": {"timeout": 1e999}}',
        b'{"inputs": [], "parameters": {"timeout": ' + b"9" * 5000 + b"}}",
        b'{"inputs": [{"name": "x", "shape": [' + b"9" * 5000 + b'], "datatype": "BOOL", "data": [1]}]}',
    ],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
def test_what_is_no_request_is_refused(body: bytes) -> None:
    assert "not an inference request" in refusal(body)
    assert refusal(body, len(body))


def test_a_refusal_does_not_repeat_a_long_name() -> None:
    long = "n" * MAX_NAME_CHARACTERS
    for told in (
        refused(tensor(name=long, datatype=long)),
        refused(tensor(), outputs=[{"name": long, "parameters": {"triton_" + long: 1}}]),
        refused(tensor(), parameters={"triton_" + long: 1}),
        refused(tensor(name=long, shape=[-1])),
    ):
        assert len(told) < 500


def test_names_and_parameters_without_end_are_refused_and_data_as_long_is_not() -> None:
    many = MAX_HEAD_BYTES // 10
    for members in (
        {"parameters": {str(number): number for number in range(many)}},
        {"mine": "x" * MAX_HEAD_BYTES},
        {"outputs": [{"name": ""}] * many},
    ):
        assert f"at most {MAX_HEAD_BYTES} are taken" in refused(tensor(), **members)
    assert "are taken" in refused(*[tensor()] * many)
    assert len(asked(tensor(data=[0] * MAX_HEAD_BYTES)).tensors[0].data) > MAX_HEAD_BYTES
    assert "$.inputs[0].shape" in refused(tensor(data=[0] * MAX_HEAD_BYTES, shape=[-1]))
    assert "not an inference request" in refusal(b"[" * MAX_HEAD_BYTES + b"]")


def test_inputs_without_end_are_refused_before_they_take_memory() -> None:
    body = b'{"inputs":[' + b"{}," * 2**20 + b"{}]}"
    tracemalloc.start()
    try:
        for _ in range(2):
            assert f"more than {MAX_INPUTS} inputs; no more are taken" in refusal(body)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


SCRAPS = st.sampled_from(
    [
        b'{"inputs":[', b'{"name":"x","shape":[2],"datatype":"FP32"', b',"data":[1,2]', b'"parameters":{',
        b'"binary_data_size":8', b"}", b"]", b",", b'"outputs":[{"name":"y"', b'"timeout":', b"1e999",
        b"null", b"-1", b"\x00", b"\xff", b'"', b'"shape":[', b"9" * 30, b'{"inputs":[]}', b"[" * 2000,
        bytes(8),
    ]
)  # fmt: skip


@PLAIN
@given(st.lists(SCRAPS | st.binary(max_size=6), max_size=12).map(b"".join), st.none() | st.integers(-3, 90))
@example(b'{"inputs":[{"name":"x","shape":[2],"datatype":"FP32","parameters":{"binary_data_size":8}}]}', 90)
def test_any_bytes_are_a_request_or_refused(body: bytes, header_bytes: int | None) -> None:
    try:
        request = decode_request(body, header_bytes)
    except InvalidInput:
        return
    assert encode(Infer(1, heads(request.tensors), request.outputs), request.tensors)


# The length of the JSON


@pytest.mark.parametrize(
    ("fields", "expected"), [(None, None), ([], None), ("0", 0), (["10"], 10), ("007", 7), (("3",), 3)]
)
def test_the_header_s_length_is_a_number_within_the_body(fields: Any, expected: int | None) -> None:
    assert header_length(fields, 10) == expected


@pytest.mark.parametrize(
    "fields",
    ["", "-1", "+1", "1.0", "0x1", "1 ", " 1", "1,1", "1, 1", "٣", "²", "11", "9" * 12, "9" * 9000,
     ["1", "1"], ["1", "2"], [""], "a" * 9000, "1_0", "\x00"],
)  # fmt: skip
def test_what_is_no_length_within_the_body_is_refused(fields: Any) -> None:
    with pytest.raises(InvalidInput, match="Inference-Header-Content-Length") as refused:
        header_length(fields, 10)
    assert len(str(refused.value)) < 300


@PLAIN
@given(st.none() | st.text(max_size=20) | st.lists(st.text(max_size=20), max_size=3), st.integers(0, 100))
def test_any_field_is_a_length_within_the_body_or_refused(fields: Any, body_length: int) -> None:
    try:
        length = header_length(fields, body_length)
    except InvalidInput:
        return
    assert length is None or 0 <= length <= body_length


# Nothing but data


def spec(*shape: int, datatype: str = "FP32", optional: bool = False) -> TensorSpec:
    return TensorSpec("x", datatype, shape, optional)


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((4,), 16, (4,)), ((-1,), 16, (4,)), ((2, -1), 16, (2, 2)), ((-1, 2, 1), 16, (2, 2, 1)), ((), 4, ()),
        ((-1,), 0, (0,)), ((0,), 0, (0,)), ((0, -1), 0, (0, 0)),
    ],
)  # fmt: skip
def test_the_variable_dimension_follows_from_the_body_s_size(
    shape: tuple[int, ...], size: int, expected: tuple[int, ...]
) -> None:
    body = bytes(range(size))
    tensors = (Tensor("x", "FP32", expected, body),)
    assert decode_raw(body, [spec(*shape)]) == InferenceRequest(None, None, tensors, (), text=False)
    assert heads(tensors)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((4,), 15), ((4,), 20), ((-1,), 15), ((2, -1), 12), ((-1, -1), 16), ((0,), 4), ((), 8), ((0, -1), 4)],
)  # fmt: skip
def test_a_body_that_does_not_make_the_input_is_refused(shape: tuple[int, ...], size: int) -> None:
    with pytest.raises(InvalidInput, match="'x'"):
        decode_raw(bytes(size), [spec(*shape)])


def test_where_the_model_batches_the_body_is_a_batch_of_one() -> None:
    [tensor] = decode_raw(bytes(16), [spec(-1, -1)], max_batch_size=8).tensors
    assert tensor.shape == (1, 4)


@pytest.mark.parametrize("shape", [(), (-1,), (1,), (-1, 1)])
@pytest.mark.parametrize("body", [b"", b"a", bytes(300)])
def test_of_bytes_the_whole_body_is_one_element(shape: tuple[int, ...], body: bytes) -> None:
    [tensor] = decode_raw(memoryview(body), [spec(*shape, datatype="BYTES")]).tensors
    assert tensor == Tensor("x", "BYTES", (1,) * len(shape), len(body).to_bytes(4, "little") + body)


def test_of_bytes_in_a_larger_shape_there_is_no_raw_form() -> None:
    with pytest.raises(InvalidInput, match="one element"):
        decode_raw(b"a", [spec(2, datatype="BYTES")])


def test_only_a_model_with_one_input_to_fill_takes_a_raw_body() -> None:
    more = spec(1, optional=True)
    assert decode_raw(bytes(4), [more]) == decode_raw(bytes(4), [more, spec(1), more])
    for inputs in ([], [spec(1), spec(1)], [more, more]):
        with pytest.raises(InvalidInput, match="one input"):
            decode_raw(bytes(4), inputs)
    with pytest.raises(InvalidInput, match="has no binary form"):
        decode_raw(bytes(4), [spec(1, datatype="seq(tensor(float))")])


@PLAIN
@given(
    st.sampled_from([*DATATYPES, "seq(x)"]),
    st.lists(st.integers(-1, 3) | st.just(2**62), max_size=3),
    st.binary(max_size=40),
)
def test_any_body_fills_the_input_or_is_refused(datatype: str, shape: list[int], body: bytes) -> None:
    try:
        request = decode_raw(body, [spec(*shape, datatype=datatype)])
    except InvalidInput:
        return
    assert heads(request.tensors)
