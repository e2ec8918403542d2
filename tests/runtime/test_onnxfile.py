"""Finding what an ONNX file refers to, on files that the onnx package writes."""

import contextlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from random import Random
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnxruntime import InferenceSession
from support import models
from support.history import PLAIN
from support.models import FLOAT, external_bytes, external_tensor, save, save_bytes, value, varint

from runtime import onnxfields, onnxfile
from runtime.errors import LoadRefused
from runtime.onnxfields import MAX_FIELDS, TooManyFields, Unparsable
from runtime.onnxfile import (
    ELEMENTS,
    FOREIGN_HEAD_BYTES,
    FileWindows,
    ModelTensors,
    check_external_data,
    describe_foreign_content,
    external_locations,
    read_tensors,
)
from runtime.wire import DATATYPES, MAX_REQUEST_BYTES
from runtime.worker.sessions import describe_model, session_options


def locations(model: onnx.ModelProto, tmp_path: Path) -> list[str]:
    return list(external_locations(save(model, tmp_path, "m") / "model.onnx"))


def check(location: str, root: Path) -> bool:
    folder = save(models.external(location), root, "m")
    return check_external_data(folder / "model.onnx", folder, root)


def body(name: str) -> onnx.GraphProto:
    constant = helper.make_node("Constant", [], ["out"], value=external_tensor("v", name))
    return helper.make_graph(
        [constant], "body", [], [value("out", FLOAT, [4])], [external_tensor("i", f"{name}+")]
    )


def test_every_external_tensor_is_found(tmp_path: Path) -> None:
    node, at = helper.make_node, external_tensor
    sparse = helper.make_sparse_tensor(
        at("values", "sparse values", 1), at("indices", "sparse indices", 1), [9]
    )
    nodes = [
        node("Constant", [], ["a"], value=at("t", "attribute")),
        node("Custom", [], ["b"], many=[at("t", "in a list"), at("t", "of two")]),
        node("Constant", [], ["c"], sparse_value=sparse),
        node("If", ["go"], ["d"], then_branch=body("then"), else_branch=body("else")),
        node("Custom", [], ["e"], graphs=[body("one of"), body("several")]),
        node("Custom", [], ["f"], sparse_list=[sparse]),
    ]
    inner = node("Constant", [], ["y"], value=at("t", "function"))
    default = helper.make_attribute("default", at("t", "default"))
    opset = [helper.make_opsetid("", 18)]
    function = helper.make_function("local", "F", [], ["y"], [inner], opset, attribute_protos=[default])
    model = models.model(nodes, [], [value("y", FLOAT, [4])], [at("w", "initializer")], [function])
    model.graph.sparse_initializer.append(sparse)
    training = model.training_info.add()
    training.initialization.CopyFrom(body("initialization"))
    training.algorithm.CopyFrom(body("algorithm"))
    subgraphs = ["then", "else", "one of", "several", "initialization", "algorithm"]
    expected = ["initializer", "attribute", "in a list", "of two", "function", "default"]
    expected += 3 * ["sparse values", "sparse indices"] + subgraphs + [f"{name}+" for name in subgraphs]
    assert sorted(locations(model, tmp_path)) == sorted(expected)


UNPARSABLE = [
    b"",
    models.TEXT,
    models.CORRUPT,
    b"\x3a",
    b"\x3a\x7f",
    b"\xff" * 11,
    b"\x00\x00",
    b"\x0b",  # a group without an end
    b"\x0c",  # an end without a group
    b"\x0b\x14",  # the end of another
    b"\x0b\x13\x0c\x14",
    b"\x0b\x3a\x7f\x0c",  # a field in it that ends outside
    b"\x0b\x0f\x0c",  # a wire type that there is not
    b"\x0b" * 101 + b"\x0c" * 101,
    b"\x0d\x00",
    models.behind_a_long_tag(models.external("../x")),  # a tag that other parsers cut off
]


@pytest.mark.parametrize("data", UNPARSABLE, ids=lambda data: repr(data[:12]))
def test_invalid_protobuf_is_not_parsed(tmp_path: Path, data: bytes) -> None:
    folder = save_bytes(data, tmp_path, "m")
    with pytest.raises(Unparsable):
        list(external_locations(folder / "model.onnx"))
    assert not check_external_data(folder / "model.onnx", folder, tmp_path)


def test_nesting_is_bounded(tmp_path: Path) -> None:
    data = b"\x52\x08location"  # the graph's description: what has no such word is not looked into
    for _ in range(60):  # graph > node > attribute > graph …
        node = b"\x2a" + varint(len(data) + 1 + len(varint(len(data)))) + b"\x32" + varint(len(data)) + data
        data = b"\x0a" + varint(len(node)) + node
    folder = save_bytes(b"\x3a" + varint(len(data)) + data, tmp_path, "m")
    with pytest.raises(Unparsable, match="deep"):
        list(external_locations(folder / "model.onnx"))


GROUP = b"\xa3\x06" + b"\x08\x01\x11********\x1a\x02hi\x25****" + b"\x3b\x3c" * 2 + b"\xa4\x06"
"""A group of field 100, in it a field of every wire type, and two groups."""


@pytest.mark.parametrize("group", [GROUP, b"\x0b\x0c", b"\x3b" * 90 + b"\x3c" * 90, GROUP * 3])
def test_groups_are_skipped(tmp_path: Path, group: bytes) -> None:
    model = models.external("../x")
    tensor = group + model.graph.initializer[0].SerializeToString() + group
    del model.graph.initializer[0]
    graph = group + model.graph.SerializeToString() + b"\x2a" + varint(len(tensor)) + tensor + group
    model.ClearField("graph")
    data = group + model.SerializeToString() + b"\x3a" + varint(len(graph)) + graph + group
    folder = save_bytes(data, tmp_path, "m")
    assert onnx.ModelProto.FromString(data).graph.initializer[0].external_data[0].value == "../x"
    assert list(external_locations(folder / "model.onnx")) == ["../x"]


FILLERS = (0, 0, 1, 7, 126, 127, 128, 129, 300, 4_080, 4_096, 4_100, 70_000)
"""Lengths around those at which a field counts as short, and at which bytes are searched."""
WORDS = ("x", "locatio", "location", "locationlocation")


@PLAIN
@given(seed=st.integers(0, 2**32))
def test_every_location_is_found_whatever_is_around_it(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    dice, expected = Random(seed), list[str]()

    def text() -> str:
        return (dice.choice(WORDS) * 9_000)[: dice.choice(FILLERS)]

    def tensor() -> TensorProto:
        made = TensorProto(name=text(), raw_data=text().encode(), dims=[1] * dice.randrange(40))
        for _ in range(dice.randrange(3)):
            made.external_data.add(key=dice.choice(WORDS), value=f"file {len(expected)} {text()}")
            if made.external_data[-1].key == "location":
                expected.append(made.external_data[-1].value)
        made.doc_string = text()
        return made

    def graph(depth: int) -> onnx.GraphProto:
        made = onnx.GraphProto(name=text(), doc_string=text())
        for _ in range(dice.randrange(3)):
            attribute = made.node.add(op_type=text(), input=[text()]).attribute.add(name=text())
            attribute.floats.extend([0.5] * dice.choice(FILLERS[:-1]))
            attribute.strings.append(text().encode())
            attribute.ints.extend([3, 300, -1])
            attribute.tensors.append(tensor())
            if depth:
                attribute.g.CopyFrom(graph(depth - 1))
        made.initializer.extend([tensor() for _ in range(dice.randrange(3))])
        return made

    path = tmp_path_factory.getbasetemp() / "around.onnx"
    path.write_bytes(onnx.ModelProto(producer_name=text(), graph=graph(2)).SerializeToString())
    assert sorted(external_locations(path)) == sorted(expected)


UNKNOWN = {
    "varints": b"\xf8\x07\x01",
    "empty": b"\x0a\x00",
    "graphs": b"\x3a\x04\x0a\x02\x0a\x00",
    "numbers": b"\x08\xff\x01\x0d****\x09********",
}
"""Fields of the file itself that lead nowhere: unknown, or without content."""
LONG = {
    "long tags": b"\x88\x80\x80\x80\x00\x01",
    "groups": b"\x0b\x0c",
    "long fields": b"\x12\x80\x01" + bytes(128),
    "marks": b"\x12\x08location",
    "tensors": b"\x3a\x16\x2a\x14\x6a\x12\x0a\x08location\x12\x06../../",
}
"""Fields that are read one by one."""


@pytest.mark.parametrize("fields", UNKNOWN)
def test_short_fields_are_skipped_however_many(tmp_path: Path, fields: str) -> None:
    count = 2 * MAX_FIELDS // len(UNKNOWN[fields])
    folder = save_bytes(UNKNOWN[fields] * count + models.external("x").SerializeToString(), tmp_path, "m")
    assert list(external_locations(folder / "model.onnx")) == ["x"]


@pytest.mark.parametrize("fields", [*LONG, *UNKNOWN])
def test_fields_that_are_read_are_bounded(
    tmp_path: Path, fields: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxfields, "MAX_FIELDS", 1_000)
    monkeypatch.setattr(onnxfields, "MAX_SHORT_BYTES", 1_000)
    monkeypatch.setattr(onnxfile, "_check_location", lambda *_: None)
    monkeypatch.setattr(onnxfile, "normalise_location", PurePosixPath)
    unit = {**LONG, **UNKNOWN}[fields]
    folder = save_bytes(unit * 100, tmp_path, "m")
    assert check_external_data(folder / "model.onnx", folder, tmp_path)
    folder = save_bytes(unit * 2_000, tmp_path, "m")
    with pytest.raises(LoadRefused, match="has more than 1,000 fields to read for references") as refusal:
        check_external_data(folder / "model.onnx", folder, tmp_path)
    assert refusal.value.code == "invalid_model"


def test_location_before_garbage_is_refused(tmp_path: Path) -> None:
    for location in ("../x", "*/_ORT_MEM_ADDR_/*"):
        folder = save_bytes(models.external(location).SerializeToString() + b"\xff", tmp_path, "m")
        with pytest.raises(LoadRefused):
            check_external_data(folder / "model.onnx", folder, tmp_path)


def test_files_beside_the_model_are_allowed(tmp_path: Path) -> None:
    folder = save(models.external("x"), tmp_path, "m")
    (folder / "data").mkdir()
    for name in ("w.bin", "data/w.bin"):
        (folder / name).write_bytes(external_bytes())
        assert check(name, tmp_path)
    assert check("./w.bin", tmp_path)
    (tmp_path / "shared.bin").write_bytes(external_bytes())
    (folder / "link.bin").symlink_to(tmp_path / "shared.bin")
    assert check("link.bin", tmp_path)


@pytest.mark.parametrize(
    "location",
    [
        "", "/etc/passwd", "../2/w.bin", "../../../etc/passwd", "data/../../x", "a\0b", "data",
        "fifo", "out", "out/passwd", "*/_ORT_MEM_ADDR_/*", "w.bin/x", "x" * 5000, "./" * 100_000,
    ],
)  # fmt: skip
def test_unsafe_locations_are_refused(tmp_path: Path, location: str) -> None:
    folder = save(models.external("x"), tmp_path, "m")
    (folder / "data").mkdir()
    (folder / "w.bin").write_bytes(external_bytes())
    (folder / "*" / "_ORT_MEM_ADDR_").mkdir(parents=True)
    (folder / "*" / "_ORT_MEM_ADDR_" / "*").write_bytes(external_bytes())
    os.mkfifo(folder / "fifo")
    (folder / "out").symlink_to("/etc")
    with pytest.raises(LoadRefused) as refusal:
        check(location, tmp_path)
    assert refusal.value.code == "unsafe_file"
    assert len(str(refusal.value)) < 1_000


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 98762\n"
SAVED_MODEL = b"\x08\x01\x12\x80\x10\x0a\x20" + bytes(2_100)
SAFETENSORS = (
    (60).to_bytes(8, "little") + b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(60) + b"...."
)
FOREIGN = {
    "empty": (b"", "is empty"),
    "pointer": (POINTER, "Git LFS pointer"),
    "page": (b"\n<!DOCTYPE html><html><title>Sign in</title>", "HTML page"),
    "xhtml": (b'<?xml version="1.0"?><html xmlns="x">', "HTML page"),
    "error document": (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code>', "XML document"),
    "sentence": (b"404: Not Found", "a text and no model: '404: Not Found'"),
    "JSON": (b'{"error": "Invalid credentials"}\n', "Invalid credentials"),
    "long text": (b"word " * 100, "word word "),
    "zip": (b"PK\x03\x04" + b"notes.txt", "zip archive"),
    "PyTorch": (b"PK\x03\x04" + bytes(22) + b"archive/data.pkl", "PyTorch checkpoint"),
    "Keras": (b"PK\x03\x04" + bytes(22) + b"config.json", "Keras model"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "Keras"),
    "pickle": (pickle.dumps({"a": 1}), "pickle"),
    "old pickle": (pickle.dumps([1], protocol=2), "pickle"),
    "safetensors": (SAFETENSORS, "safetensors"),
    "SavedModel": (SAVED_MODEL, "SavedModel of TensorFlow"),
    "TensorFlow Lite": (b"\x1c\0\0\0TFL3" + bytes(99), "TensorFlow Lite"),
    "ort": (models.OTHER_FORMAT, "own format"),
    "numpy": (b"\x93NUMPY\x01\x00" + bytes(99), "numpy"),
    "gzip": (b"\x1f\x8b\x08" + bytes(99), "gzip"),
    "tar": (b"model.onnx".ljust(257, b"\0") + b"ustar\x0000", "tar archive"),
    "zeros": (bytes(5_000), "zero bytes"),
    "cut off": (models.weights(1).SerializeToString()[:5_000], "ends after 5,000 bytes"),
}
"""Files that are no ONNX file, and words of what they are."""


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_content_is_named(name: str) -> None:
    content, words = FOREIGN[name]
    told = describe_foreign_content(content[:FOREIGN_HEAD_BYTES], len(content))
    assert told is not None
    assert words in told
    assert len(told) < 200


def test_onnx_files_are_not_foreign() -> None:
    files = [*(Path(onnx.__file__).parent / "backend/test/data").rglob("*.onnx")]
    contents = [file.read_bytes() for file in files[:200]]
    contents += [made().SerializeToString() for made in (models.add, models.strings, models.counting_loop)]
    contents += [
        onnx.ModelProto(ir_version=1, producer_name="x" * 500, graph={"name": "g"}).SerializeToString()
    ]
    for content in contents:
        assert describe_foreign_content(content[:FOREIGN_HEAD_BYTES], len(content)) is None


def tensors(model: onnx.ModelProto) -> ModelTensors:
    data = model.SerializeToString()
    return read_tensors(data, len(data))


@pytest.mark.parametrize(
    "made",
    [
        models.add, models.strings, models.zip_map, models.with_default, models.optional_input,
        models.optional_output, models.counting_loop,
    ],
    ids=lambda made: str(made.__name__),
)  # fmt: skip
def test_tensors_are_what_onnx_runtime_reports(made: Callable[[], onnx.ModelProto]) -> None:
    model = made()
    session = InferenceSession(model.SerializeToString(), session_options(1))
    reported = describe_model(session, 0, MAX_REQUEST_BYTES)
    assert tensors(model) == ModelTensors(reported.inputs, reported.outputs)


NAMES = st.text(max_size=20)
SHAPES = st.none() | st.lists(st.none() | st.text(max_size=3) | st.integers(-(2**63), 2**63 - 1), max_size=5)
TENSORS = st.tuples(
    st.sampled_from([number for number in TensorProto.DataType.values() if number in ELEMENTS]), SHAPES
)
"""Element type and shape."""


@PLAIN
@given(
    inputs=st.dictionaries(NAMES, TENSORS, max_size=5),
    outputs=st.dictionaries(NAMES, TENSORS, max_size=5),
    defaults=st.sets(NAMES, max_size=3),
    picked=st.integers(0, 5),
    ir_version=st.integers(1, 12),
)
def test_tensors_of_any_graph_are_what_onnx_parses(
    inputs: dict[str, Any], outputs: dict[str, Any], defaults: set[str], picked: int, ir_version: int
) -> None:
    defaults |= set(list(inputs)[:picked])
    weights = [helper.make_tensor(name, FLOAT, [2], [1.0, 2.0]) for name in sorted(defaults)]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["a"], ["b"], doc_string="c" * 200)] * picked,
        "g",
        [value(name, *each) for name, each in inputs.items()],
        [value(name, *each) for name, each in outputs.items()],
        weights,
    )
    model = onnx.ModelProto(ir_version=ir_version, producer_name="x" * picked * 50, graph=graph)
    parsed = onnx.ModelProto.FromString(model.SerializeToString()).graph
    found = tensors(model)
    optional = [each for each in parsed.input if each.name in defaults and ir_version >= 4]
    required = [each for each in parsed.input if each.name not in defaults]
    assert [spec.name for spec in found.inputs] == [each.name for each in (*required, *optional)]
    assert [spec.optional for spec in found.inputs] == [False] * len(required) + [True] * len(optional)
    for spec, each in zip(
        (*found.inputs, *found.outputs), (*required, *optional, *parsed.output), strict=True
    ):
        kind = each.type.tensor_type
        known = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim]
        assert spec.shape == tuple(length if length >= 0 else -1 for length in known)
        datatype = DATATYPES.get(spec.datatype)
        assert (datatype.onnx if datatype else spec.datatype) == f"tensor({ELEMENTS[kind.elem_type]})"


@PLAIN
@given(
    any_bytes=st.binary(max_size=300) | st.binary(max_size=30).map(b"\x08\x01\x12".__add__),
    cut=st.integers(0, 400),
    garbage=st.binary(max_size=4),
    size=st.integers(0, 2**70),
)
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, any_bytes: bytes, cut: int, garbage: bytes, size: int
) -> None:
    whole = models.counting_loop().SerializeToString()
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    for content in (any_bytes, whole[:cut] + garbage + whole[cut + len(garbage) :], whole[:cut]):
        path.write_bytes(content)
        with contextlib.suppress(Unparsable):
            list(external_locations(path))
        with contextlib.suppress(Unparsable, TooManyFields):
            read_tensors(content, len(content))
        told = describe_foreign_content(content[:FOREIGN_HEAD_BYTES], max(size, len(content)))
        assert told is None or (len(told) < 250 and told.isprintable())


def nested(depth: int) -> onnx.TypeProto:
    kind = helper.make_tensor_type_proto(FLOAT, [])
    for _ in range(depth):
        kind = helper.make_sequence_type_proto(kind)
    return kind


@pytest.mark.parametrize(
    "model",
    [
        models.model([], [helper.make_value_info("x", nested(20))], []),
        models.model([], [value("x" * 20_000, FLOAT, [])], []),
        models.model([], [value("x", FLOAT, [1] * 65)], []),
        models.model([], [value(f"{number}{'x' * 1_000}", FLOAT, []) for number in range(70)], []),
    ],
    ids=["depth", "name", "shape", "names"],
)
def test_tensors_beyond_bounds_are_refused(model: onnx.ModelProto) -> None:
    with pytest.raises((Unparsable, TooManyFields)):
        tensors(model)


def test_tensors_are_read_within_a_bound_of_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxfile, "MAX_TENSOR_FIELDS", 500)
    many = helper.make_node("Identity", ["x"], ["y"])
    assert tensors(models.model([many] * 400, [], [])) == ModelTensors((), ())
    with pytest.raises(TooManyFields, match="more than 500 fields to read for its inputs and outputs"):
        tensors(models.model([many] * 600, [], []))


def test_tensors_of_a_large_file_are_read_in_parts(tmp_path: Path) -> None:
    folder = save(models.weights(16), tmp_path, "m")
    with (folder / "model.onnx").open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        windows = FileWindows(file.fileno())
        assert read_tensors(windows, size) == tensors(models.weights(16))
        (folder / "model.onnx").write_bytes(b"")  # cut short while it is read
        with pytest.raises(Unparsable):
            read_tensors(FileWindows(file.fileno()), size)


def test_dimension_name_without_a_length_is_no_name(tmp_path: Path) -> None:
    """A hostile file gives the name as a number: there is nothing to read for it."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    dimension = bytes([2 << 3, 5])
    tensor = bytes([1 << 3, FLOAT]) + field(2, field(1, dimension))
    graph = field(11, field(1, b"x") + field(2, field(1, tensor)))
    file = tmp_path / "model.onnx"
    file.write_bytes(bytes([1 << 3, 8]) + field(7, graph))
    with file.open("rb") as opened:
        read = read_tensors(FileWindows(opened.fileno()), file.stat().st_size)
    assert [(spec.shape, spec.dimensions) for spec in read.inputs] == [((5,), ())]
