"""Requests and responses of the Open Inference Protocol, JSON, binary and raw; invalid requests."""

import json
import math
import tracemalloc
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.history import PLAIN

from runtime import requestjson
from runtime.errors import InvalidInput
from runtime.router import InferenceRequest
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
from server.v2 import codec

JSON_DATATYPES = sorted(DATATYPES.keys() - {"FP16", "BF16"})
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
ELEMENTS = st.integers() | st.text(max_size=3) | st.floats()


def request_of(*inputs: Any, data: bytes = b"", **members: Any) -> tuple[bytes, int | None]:
    """Return a request with these inputs and `data` after its JSON, and the length of the JSON."""
    text = json.dumps({"inputs": inputs, **members}).encode()
    return text + data, len(text) if data else None


def decode(*inputs: Any, **members: Any) -> InferenceRequest:
    return codec.decode_request(*request_of(*inputs, **members))


def tensor(**members: Any) -> dict[str, Any]:
    return {"name": "x", "shape": [2], "datatype": "FP32", "data": [1, 2]} | members


def binary(size: object, **members: Any) -> dict[str, Any]:
    plain = {"name": "x", "shape": [2], "datatype": "FP32", "parameters": {"binary_data_size": size}}
    return plain | members


def refusal(body: bytes, header_bytes: int | None = None) -> str:
    with pytest.raises(InvalidInput) as refused:
        codec.decode_request(body, header_bytes)
    assert refused.value.code == "invalid_input"
    return str(refused.value)


def refused(*inputs: Any, **members: Any) -> str:
    return refusal(*request_of(*inputs, **members))


@st.composite
def tensors(draw: st.DrawFn, with_text: Sequence[str] = JSON_DATATYPES) -> Tensor:
    datatype = draw(st.sampled_from(sorted(DATATYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=4)))
    if datatype in with_text and draw(st.booleans()):
        values = draw(st.lists(ELEMENTS, max_size=3))
        return Tensor(draw(NAMES), datatype, shape, json.dumps(values).encode(), text=True)
    size = math.prod(shape) * DATATYPES[datatype].size if datatype != "BYTES" else draw(st.integers(0, 9))
    return Tensor(draw(NAMES), datatype, shape, draw(st.binary(min_size=size, max_size=size)))


def written(item: Tensor) -> str:
    """Return an input as a client writes it."""
    head = f'"name": {json.dumps(item.name)}, "shape": {list(item.shape)}, "datatype": "{item.datatype}"'
    if item.text:
        return f'{{{head}, "data": {bytes(item.data).decode()}}}'
    return f'{{{head}, "parameters": {{"binary_data_size": {len(item.data)}, "mine": 1.5}}}}'


@PLAIN
@given(st.lists(tensors(), max_size=5), st.dictionaries(NAMES, NAMES | st.integers(0, 9), max_size=3))
def test_request_is_decoded_as_written(drawn: list[Tensor], custom: dict[str, Any]) -> None:
    """A long text as a short one."""
    escaped = json.dumps({f"mine:{name}": value for name, value in custom.items()})
    inputs = ", ".join(map(written, drawn))
    text = f'{{"id": ":7", "inputs": [{inputs}], "parameters": {escaped}}}'.encode()
    payload = b"".join(item.data for item in drawn if not item.text)
    request = codec.decode_request(text + payload, len(text))
    assert request == InferenceRequest(":7", None, tuple(drawn), (), text=True)
    assert encode(Infer(1, heads(request.tensors)), request.tensors)
    if not payload:
        assert codec.decode_request(text) == request
    long = text + b" " * requestjson.SHORT_JSON_BYTES
    assert codec.decode_request(long + payload, len(long)) == request


def test_decoded_tensors_are_views_of_the_body() -> None:
    text = json.dumps({"inputs": [tensor(), binary(8)]}).encode()
    body = bytearray(text + bytes(8))
    request = codec.decode_request(body, len(text))
    body[len(text)] = 7
    assert bytes(request.tensors[1].data[:1]) == b"\7"
    body[text.index(b"[1, 2]") + 1] = ord("5")
    assert bytes(request.tensors[0].data) == b"[5, 2]"


def test_output_form_is_json_unless_requested_otherwise() -> None:
    own: list[dict[str, Any]] = [{}, {"binary_data": True}, {"binary_data": False, "mine": "x"}]
    outputs = [{"name": "a"}, *({"name": "b", "parameters": parameters} for parameters in own)]
    for members, text in (
        ({}, True),
        ({"binary_data_output": False}, True),
        ({"binary_data_output": True}, False),
    ):
        request = decode(tensor(), outputs=outputs, parameters=members)
        forms = [("a", text), ("b", text), ("b", False), ("b", True)]
        assert request.outputs == tuple(WantedOutput(*form) for form in forms)
        assert request.text is text
        assert decode(tensor(), parameters=members).outputs == ()


def test_timeout_of_zero_is_none() -> None:
    sent_us = [0, 1, 2**63 - 1]
    found = [decode(tensor(), parameters={"timeout": each}).timeout_us for each in sent_us]
    assert [decode(tensor()).timeout_us, *found] == [None, None, 1, 2**63 - 1]


def test_priority_is_read_and_zero_is_none() -> None:
    sent = [0, 1, 2**64 - 1]
    found = [decode(tensor(), parameters={"priority": each}).priority for each in sent]
    assert [decode(tensor()).priority, *found] == [0, *sent]


def test_custom_members_and_neutral_parameters_are_ignored() -> None:
    custom: dict[str, Any] = {"mine": "x", "pi": 3.1, "n": -(2**63), "yes": True, "": "", "headers": "x"}
    for neutral in (0, ""):
        custom |= {"sequence_id": neutral, "sequence_start": False, "sequence_end": False, "priority": 0}
        output = {"name": "y", "parameters": {**custom, "classification": 0}, "mine": []}
        request = decode(tensor(parameters=custom, mine={}), outputs=[output], parameters=custom, mine=[{}])
        assert request == decode(tensor(), outputs=[{"name": "y"}])


def test_null_members_are_absent() -> None:
    plain = decode(tensor(parameters=None), outputs=None, id=None, parameters=None)
    assert plain == decode(tensor()) == decode(tensor(), outputs=[], parameters={})
    assert decode(tensor(), id="").id == ""


def test_empty_tensors_and_scalars_may_be_binary() -> None:
    inputs = binary(0, shape=[0, 3]), binary(4, shape=[]), binary(0, shape=[2**31 - 1, 0])
    request = decode(*inputs, data=b"abcd")
    assert [bytes(each.data) for each in request.tensors] == [b"", b"abcd", b""]
    text = json.dumps({"inputs": [binary(0, shape=[0])]}).encode()
    assert codec.decode_request(text, len(text)) == codec.decode_request(text)


@pytest.mark.parametrize("size", [7, 9, 0, -8, 8.0, "8", True, 2**62, 10**30, -(10**30)])
def test_binary_size_must_match_the_shape(size: object) -> None:
    assert "input 'x'" in refused(binary(size), data=bytes(8))


@pytest.mark.parametrize(
    ("inputs", "data", "reason"),
    [
        ([binary(8)], bytes(7), "only 7 bytes of the body are left"),
        ([binary(8)], b"", "only 0 bytes of the body are left"),
        ([binary(8)], bytes(9), "1 bytes are left over"),
        ([tensor()], bytes(9), "9 bytes are left over"),
        ([binary(8), binary(8, name="z")], bytes(15), "input 'z': binary_data_size is 8, but only 7"),
        ([binary(2**30, datatype="BYTES")], bytes(10), "only 10 bytes"),
        ([tensor(parameters={"binary_data_size": 8})], bytes(8), "not both"),
        ([binary(8) | {"data": None}], bytes(8), "not both"),
        ([{"name": "x", "shape": [2], "datatype": "FP32"}], b"", "'x': data is missing"),
        ([tensor(datatype="FP16")], b"", "use the binary data form"),
        ([tensor(datatype="fp32")], b"", "'fp32' is no datatype"),
        ([binary(8, datatype="")], bytes(8), "'' is no datatype"),
        ([tensor(shape=[-1])], b"", "$.inputs[0].shape"),
        ([tensor(shape=[2**31])], b"", "$.inputs[0].shape"),
        ([tensor(), tensor(name="z", shape=[1] * 65)], b"", "$.inputs[1].shape"),
        ([tensor(shape=[1.5])], b"", "$.inputs[0].shape"),
        ([tensor(datatype=1)], b"", "$.inputs[0].datatype"),
        ([tensor(name=1)], b"", "inputs[0].name"),
        ([tensor(name="n" * (MAX_NAME_CHARACTERS + 1))], b"", "length"),
        ([tensor(parameters={"mine": [1]})], b"", "$.inputs[0].parameters"),
        ([tensor(parameters={"a": 1, "mine": None})], b"", "$.inputs[0].parameters"),
        ([tensor(parameters={"shared_memory_region": "r"})], b"", "shared memory is not supported; send"),
        ([binary(8, parameters={"shared_memory_region": "r"})], b"", "shared memory is not supported"),
        ([tensor(parameters={"triton_x": 1})], b"", "input 'x': the parameter 'triton_x' is not supported"),
    ],
)  # fmt: skip
def test_invalid_input_is_refused_by_name(inputs: list[Any], data: bytes, reason: str) -> None:
    assert reason in refused(*inputs, data=data)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sequence_id", 1), ("sequence_id", "a"), ("sequence_id", False), ("sequence_id", 0.0),
        ("sequence_start", True), ("sequence_end", True), ("sequence_start", 0), ("priority", -1),
        ("priority", "0"), ("priority", False), ("priority", 2**64),
        ("triton_enable_empty_final_response", False), ("triton_", ""),
        ("timeout", -1), ("timeout", 1.5), ("timeout", "1"), ("timeout", True), ("timeout", 2**63),
        ("binary_data_output", 1), ("binary_data_output", "true"),
    ],
)  # fmt: skip
def test_unsupported_request_parameter_is_refused(name: str, value: object) -> None:
    assert f"the parameter '{name}'" in refused(tensor(), parameters={"a": 1, name: value})


def test_unsupported_output_parameter_is_refused() -> None:
    wrong: list[tuple[str, Any]] = [
        ("classification", 3), ("binary_data", 1), ("binary_data", "false"), ("shared_memory_region", "r"),
        ("shared_memory_byte_size", 8), ("triton_x", 1),
    ]  # fmt: skip
    others: list[dict[str, Any]] = [{}, {"a": 1}, {"binary_data": True}]
    for (name, value), more in product(wrong, others):
        parameters = {**more, name: value}
        text = refused(tensor(), outputs=[{"name": "z"}, {"name": "y", "parameters": parameters}])
        assert text.startswith("output 'y': ")
        assert name in text


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
def test_malformed_request_is_refused(body: bytes) -> None:
    assert "not an inference request" in refusal(body)
    assert refusal(body, len(body))


PADDINGS = pytest.mark.parametrize("padding", [0, requestjson.SHORT_JSON_BYTES], ids=["short", "long"])


@PADDINGS
def test_nan_and_infinities_are_read_in_data_alone(padding: int) -> None:
    names = ("Inf: \\u0022NaN", "-Infinity")
    inputs = [tensor(name=name, data=[math.nan, -math.inf]) for name in names]
    body, _ = request_of(*inputs, id="NaN", parameters={"NaN": "Infinity"}, outputs=[{"name": "Inf"}])
    read = codec.decode_request(body + b" " * padding)
    assert [(each.name, bytes(each.data)) for each in read.tensors] == [
        (name, b"[NaN, -Infinity]") for name in names
    ]
    assert (read.id, read.outputs) == ("NaN", (WantedOutput("Inf", text=True),))
    for members in ({"parameters": {"timeout": math.inf}}, {"mine": math.nan}, {"id": math.nan}):
        wrong, _ = request_of(tensor(data=[math.nan]), **members)
        assert "invalid character" in refusal(wrong + b" " * padding)
    for misplaced in ({"shape": [math.nan]}, {"name": math.nan}):
        wrong, _ = request_of(tensor(**misplaced))
        assert "NaN and Infinity are allowed in the data of an input alone" in refusal(wrong + b" " * padding)
    twice = b'"data": [NaN, 1], "data": [NaN, 2]'
    assert refusal(body.replace(b'"data": [NaN, -Infinity]', twice, 1) + b" " * padding)


@PADDINGS
@pytest.mark.parametrize("name", [rb"\ud800", rb"\udfff", rb"\uD83D\\uDE00", b"\xed\xa0\x80"])
def test_unpaired_surrogate_is_refused_as_such(name: bytes, padding: int) -> None:
    body = json.dumps({"inputs": [tensor()]}).encode().replace(b'"x"', b'"%s"' % name)
    assert "unpaired surrogate" in refusal(body + b" " * padding)
    escaped = body.replace(name, rb"\\ud800") + b"," + b" " * padding
    assert "surrogate" not in refusal(escaped)
    paired = body.replace(name, rb"\ud83d\ude00 \\ud800")
    assert codec.decode_request(paired + b" " * padding).tensors[0].name == "\U0001f600 \\ud800"


@PADDINGS
@pytest.mark.parametrize(
    ("body", "key"),
    [
        ('{"id": "1", "id": "1", "inputs": [{IN}]}', "id"),
        ('{"inputs": [{IN}], "inputs": [{IN}]}', "inputs"),
        ('{"inputs": [{IN}], "parameters": {}, "parameters": null}', "parameters"),
        ('{"inputs": [{IN}], "parameters": {"a": 1, "b": 2, "a": 1}}', "a"),
        ('{"inputs": [{"data": [":"], IN}]}', "data"),
        ('{"inputs": [{"data": [1, 2], IN}]}', "data"),
        ('{"inputs": [{IN}, {"name": "y", IN}]}', "name"),
        ('{"inputs": [{"parameters": {}, "parameters": {}, IN}]}', "parameters"),
        ('{"inputs": [{"d\\u0061ta": [2], IN}]}', "data"),
        ('{"inputs": [{"parameters": {"\\\\\\u003a": 1, "b": 1, "b": 1}, IN}]}', "b"),
        ('{"inputs": [{"parameters": {"\\\\u003a": ":", "b": 1, "b": 1}, IN}]}', "b"),
        ('{"inputs": [{IN}], "outputs": [{"name": "y", "name": "y"}]}', "name"),
        ('{"inputs": [{IN}], "mine": [{"a": 1, "b": 2, "a": 1}]}', "a"),
        ('{"mine": 1, "inputs": [{IN}], "mine": 1}', "mine"),
        ('{"inputs": [{"mine": 1, "mine": 1, IN}]}', "mine"),
    ],
)
def test_duplicate_key_is_refused(body: str, key: str, padding: int) -> None:
    text = body.replace("IN", json.dumps(tensor())[1:-1]).encode()
    told = (
        f'the key "{key}" appears twice in one object' if not padding else "a key appears twice in one object"
    )
    assert told in refusal(text + b" " * padding)


def written_object(members: list[tuple[str, str]]) -> str:
    return f"{{{','.join(f'{key} : {value}' for key, value in members)}}}"


KEYS = st.sampled_from(
    ['"a"', '"b:"', '"\\u0061"', '"\\u003a"', '"\\\\u003a"', '":"', '"\\n"', '"data"', '""']
)
VALUES = st.recursive(
    st.sampled_from(["1", "null", '":"', '"\\u003A"', '"\\\\"', "[]"]),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]")
        | st.lists(st.tuples(KEYS, inner), max_size=3).map(written_object)
    ),
    max_leaves=6,
)


@PLAIN
@given(st.lists(st.tuples(KEYS, VALUES), max_size=3), st.lists(st.tuples(KEYS, VALUES), max_size=2))
def test_keys_that_appear_twice_and_no_others_are_refused(
    top: list[tuple[str, str]], own: list[tuple[str, str]]
) -> None:
    item = [
        (f'"{name}"', json.dumps(value)) for name, value in tensor(datatype="BYTES", data=[":", "\n"]).items()
    ]
    text = written_object([('"inputs"', f"[{written_object(item + own)}]"), *top])
    twice = []

    def note(pairs: list[tuple[str, object]]) -> dict[str, object]:
        twice.append(len(dict(pairs)) < len(pairs))
        return dict(pairs)

    json.loads(text, object_pairs_hook=note)
    if any(twice):
        assert "appears twice" in refusal(text.encode())
    else:
        codec.decode_request(text.encode())


@pytest.mark.parametrize(
    ("unit", "reason", "most_bytes"),
    [
        (b'"data":[1],', "are allowed", 2**20),
        (b'"":0,', "are allowed", 2**20),
        (b'"name":"x",', "are allowed", 2**20),
        (b'"mine":[{}],', "are allowed", 2**20),
        (b"},{", f"more than {requestjson.MAX_INPUTS} inputs; no more are allowed", 2**23),
    ],
    ids=lambda case: case.decode() if isinstance(case, bytes) else "",
)
def test_repeated_part_is_refused_without_taking_memory(unit: bytes, reason: str, most_bytes: int) -> None:
    body = b'{"inputs":[{' + unit * (2**20 // len(unit)) + json.dumps(tensor())[1:].encode() + b"]}"
    tracemalloc.start()
    try:
        for _ in range(2):
            assert reason in refusal(body)
        assert tracemalloc.get_traced_memory()[1] < most_bytes
    finally:
        tracemalloc.stop()


def test_refusal_shortens_a_long_name() -> None:
    long = "n" * MAX_NAME_CHARACTERS
    for text in (
        refused(tensor(name=long, datatype=long)),
        refused(tensor(), outputs=[{"name": long, "parameters": {"triton_" + long: 1}}]),
        refused(tensor(), parameters={"triton_" + long: 1}),
        refused(tensor(name=long, shape=[-1])),
    ):
        assert len(text) < 500


def test_head_is_limited_and_data_is_not() -> None:
    many = requestjson.MAX_HEAD_BYTES // 10
    for members in (
        {"parameters": {str(number): number for number in range(many)}},
        {"mine": "x" * requestjson.MAX_HEAD_BYTES},
        {"outputs": [{"name": ""}] * many},
    ):
        assert f"at most {requestjson.MAX_HEAD_BYTES} are allowed" in refused(tensor(), **members)
    assert "are allowed" in refused(*[tensor()] * (many // 3))
    assert (
        len(decode(tensor(data=[0] * requestjson.MAX_HEAD_BYTES)).tensors[0].data)
        > requestjson.MAX_HEAD_BYTES
    )
    assert "not an inference request" in refusal(b"[" * requestjson.MAX_HEAD_BYTES + b"]")


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
def test_any_bytes_are_decoded_or_refused(body: bytes, header_bytes: int | None) -> None:
    try:
        request = codec.decode_request(body, header_bytes)
    except InvalidInput:
        return
    assert encode(Infer(1, heads(request.tensors), request.outputs), request.tensors)


def test_header_length_is_read() -> None:
    given: list[Any] = [None, [], "0", ["10"], "007", ("3",)]
    assert [codec.header_length(fields) for fields in given] == [None, None, 0, 10, 7, 3]


@pytest.mark.parametrize(
    "fields",
    ["", "-1", "+1", "1.0", "0x1", "1 ", " 1", "1,1", "1, 1", "٣", "²", "9" * 13, "9" * 9000,
     ["1", "1"], ["1", "2"], [""], "a" * 9000, "1_0", "\x00"],
)  # fmt: skip
def test_invalid_header_length_is_refused(fields: Any) -> None:
    with pytest.raises(InvalidInput, match="Inference-Header-Content-Length") as refused:
        codec.header_length(fields)
    assert len(str(refused.value)) < 300


def spec(*shape: int, datatype: str = "FP32", optional: bool = False) -> TensorSpec:
    return TensorSpec("x", datatype, shape, optional)


def test_raw_body_determines_the_variable_dimension() -> None:
    for shape, size, expected in (
        ((4,), 16, (4,)), ((-1,), 16, (4,)), ((2, -1), 16, (2, 2)), ((-1, 2, 1), 16, (2, 2, 1)), ((), 4, ()),
        ((-1,), 0, (0,)), ((0,), 0, (0,)), ((0, -1), 0, (0, 0)),
    ):  # fmt: skip
        body = bytes(range(size))
        request = codec.decode_raw(body, [spec(*shape)])
        tensors = (Tensor("x", "FP32", expected, body),)
        assert request == InferenceRequest(None, None, tensors, (), text=False)
        assert heads(request.tensors)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((4,), 15), ((4,), 20), ((-1,), 15), ((2, -1), 12), ((-1, -1), 16), ((0,), 4), ((), 8), ((0, -1), 4)],
)  # fmt: skip
def test_raw_body_of_another_size_is_refused(shape: tuple[int, ...], size: int) -> None:
    with pytest.raises(InvalidInput, match="'x'"):
        codec.decode_raw(bytes(size), [spec(*shape)])


def test_raw_bytes_body_is_one_element() -> None:
    for shape, body in product([(), (-1,), (1,), (-1, 1)], [b"", b"a", bytes(300)]):
        [tensor] = codec.decode_raw(memoryview(body), [spec(*shape, datatype="BYTES")]).tensors
        assert tensor == Tensor("x", "BYTES", (1,) * len(shape), len(body).to_bytes(4, "little") + body)


def test_raw_body_needs_exactly_one_required_input() -> None:
    optional = spec(1, optional=True)
    assert codec.decode_raw(bytes(4), [optional]) == codec.decode_raw(bytes(4), [optional, spec(1), optional])
    [batched] = codec.decode_raw(bytes(16), [spec(-1, -1)], max_batch_size=8).tensors
    assert batched.shape == (1, 4)  # a batch of one
    for inputs, reason in (
        ([], "one input"),
        ([spec(1), spec(1)], "one input"),
        ([optional, optional], "one input"),
        ([spec(1, datatype="seq(tensor(float))")], "has no binary form"),
        ([spec(2, datatype="BYTES")], "one element"),
    ):
        with pytest.raises(InvalidInput, match=reason):
            codec.decode_raw(bytes(4), inputs)


def read(body: bytes, header_bytes: int | None) -> tuple[dict[str, Any], list[Tensor]]:
    """Read a response as a client does: the JSON, then the binary outputs in their order."""
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
@given(NAMES, NAMES | st.none(), st.lists(tensors(sorted(DATATYPES)), max_size=5))
def test_response_is_read_back_bit_for_bit(
    model_id: str, request_id: str | None, drawn: list[Tensor]
) -> None:
    buffers, header_bytes = codec.encode_response(model_id, 3, request_id, drawn)
    answer, tensors = read(b"".join(buffers), header_bytes)
    assert tensors == drawn
    expected = {"model_name": model_id, "model_version": "3"}
    assert answer == (expected if request_id is None else {**expected, "id": request_id})
    assert (header_bytes is None) == (not any(len(each.data) for each in drawn if not each.text))


def test_response_of_json_alone_has_no_header_length() -> None:
    output = b'{"name":"y","datatype":"FP32","shape":[2],"data":[1.5,2]}'
    expected = b'{"model_name":"m","model_version":"1","outputs":[' + output + b"]}"
    assert codec.encode_response("m", 1, None, [Tensor("y", "FP32", (2,), b"[1.5,2]", text=True)]) == (
        [expected],
        None,
    )
    [body], header_bytes = codec.encode_response("m", 1, "", [Tensor("y", "FP32", (0, 3), b"")])
    answer = json.loads(bytes(body))
    assert (header_bytes, answer["id"]) == (None, "")
    assert answer["outputs"][0]["parameters"] == {"binary_data_size": 0}


def test_binary_data_is_not_copied() -> None:
    data, empty = memoryview(bytes(100)), Tensor("x", "FP32", (0, 3), b"")
    buffers, header_bytes = codec.encode_response(
        "m", 1, None, [empty, Tensor("y", "INT8", (100,), data), empty]
    )
    assert header_bytes == len(buffers[0])
    assert buffers[1] is data
    assert len(buffers) == 2
