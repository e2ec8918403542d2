"""The graph of a file, read without `onnx`, beside what `onnx` reads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper, numpy_helper
from support.coupledmodels import COUPLED, INDEPENDENT
from support.models import FLOAT, INT64, model, value

from runtime import onnxgraph
from runtime.onnxfields import TooManyFields, Unparsable
from runtime.onnxgraph import ConstantTensor, Graph, GraphFile, OperatorNode, Reference

CASES = {**COUPLED, **INDEPENDENT}


def check_graph(read: Graph, expected: GraphProto) -> None:
    assert [each.name for each in read.inputs] == [each.name for each in expected.input]
    assert list(read.outputs) == [each.name for each in expected.output]
    assert set(read.constants) == {each.name for each in expected.initializer}
    for tensor in expected.initializer:
        check_tensor(read.constants[tensor.name], tensor)
    for found, node in zip(read.nodes, expected.node, strict=True):
        assert (found.operator, found.domain, found.name) == (node.op_type, node.domain, node.name)
        assert (list(found.inputs), list(found.outputs)) == (list(node.input), list(node.output))
        for attribute in node.attribute:
            check_attribute(found, attribute)
        assert found.attribute("absent") is None


def check_attribute(node: OperatorNode, expected: AttributeProto) -> None:
    found: Any = node.attribute(expected.name)
    if expected.ref_attr_name:
        assert found == Reference(expected.ref_attr_name)
        return
    wanted: Any = helper.get_attribute_value(expected)
    if isinstance(wanted, GraphProto):
        check_graph(found, wanted)
    elif isinstance(wanted, TensorProto):
        check_tensor(found, wanted)
    elif isinstance(wanted, list):
        assert list(found) == wanted
    else:
        assert found == wanted or (found != found and wanted != wanted)  # noqa: PLR0124 - NaN


def check_tensor(found: ConstantTensor, expected: TensorProto) -> None:
    assert (found.element, found.shape) == (expected.data_type, tuple(expected.dims))
    if found.values is not None:
        assert np.array_equal(found.values, numpy_helper.to_array(expected), equal_nan=True)


def field(number: int, content: bytes) -> bytes:
    """Return a field of protobuf with a length of three bytes."""
    length = len(content)
    return bytes([number << 3 | 2, length & 127 | 128, length >> 7 & 127 | 128, length >> 14]) + content


def read(root: Path, made: ModelProto) -> Path:
    path = root / "model.onnx"
    path.write_bytes(made.SerializeToString())
    return path


@pytest.mark.parametrize("name", sorted(CASES))
def test_graph_is_read_as_onnx_reads_it(tmp_path: Path, name: str) -> None:
    made = CASES[name].build()
    with GraphFile(read(tmp_path, made)) as found:
        assert found.ir_version == made.ir_version
        assert found.opsets == {each.domain: each.version for each in made.opset_import}
        check_graph(found.graph, made.graph)
        for function in made.functions:
            one = found.functions[function.domain, function.name, function.overload]
            assert (list(one.inputs), list(one.outputs)) == (list(function.input), list(function.output))
            assert len(one.nodes) == len(function.node)


NUMBERS = st.integers(-(2**63), 2**63 - 1)


@given(
    st.lists(NUMBERS, max_size=40),
    st.lists(st.floats(width=32), max_size=40),
    st.lists(st.binary(), max_size=9),
)
def test_lists_of_attributes_are_read(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], floats: list[float], texts: list[bytes]
) -> None:
    node = helper.make_node("Any", ["x"], ["y"])
    for name, kind, values in (
        ("ints", AttributeProto.INTS, numbers),
        ("floats", AttributeProto.FLOATS, floats),
        ("strings", AttributeProto.STRINGS, texts),
    ):
        attribute = AttributeProto(name=name, type=kind)
        getattr(attribute, name).extend(values)
        node.attribute.append(attribute)
    with GraphFile(read(tmp_path_factory.mktemp("m"), model([node], [], []))) as found:
        (one,) = found.graph.nodes
        assert list(one.attribute("ints")) == numbers
        assert np.array_equal(one.attribute("floats"), np.array(floats, np.float32), equal_nan=True)
        assert list(one.attribute("strings")) == texts


@pytest.mark.parametrize("is_raw", [True, False])
@pytest.mark.parametrize(
    "kind",
    ["float32", "float64", "int32", "int64", "uint8", "int8", "int16", "uint16", "bool", "uint32", "uint64"],
)
def test_values_of_small_constants_are_read(tmp_path: Path, kind: str, is_raw: bool) -> None:  # noqa: FBT001
    array = np.array([[0, 1, 5], [7, 100, 3]]).astype(kind)
    data = array.tobytes() if is_raw else array.reshape(-1).tolist()
    tensor = helper.make_tensor(
        "c", helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, data, raw=is_raw
    )
    with GraphFile(read(tmp_path, model([], [], [], [tensor]))) as found:
        assert np.array_equal(found.graph.constants["c"].values, array)


def test_values_of_weights_are_not_read(tmp_path: Path) -> None:
    weights = numpy_helper.from_array(np.zeros((64, 64), np.float32), "w")
    with GraphFile(read(tmp_path, model([], [], [], [weights]))) as found:
        assert found.graph.constants["w"] == ConstantTensor(FLOAT, (64, 64), None)


def test_name_behind_a_long_list_is_the_attributes(tmp_path: Path) -> None:
    """Protobuf takes the last name of an attribute, and so does the reader."""
    node = helper.make_node("Any", ["x"], ["y"], wrong=list(range(20_000)))
    attribute = node.attribute[0].SerializeToString() + AttributeProto(name="axis").SerializeToString()
    data = field(7, field(1, field(5, attribute)))
    assert ModelProto.FromString(data).graph.node[0].attribute[0].name == "axis"
    (tmp_path / "model.onnx").write_bytes(data)
    with GraphFile(tmp_path / "model.onnx") as found:
        assert list(found.graph.nodes[0].attribute("axis")) == list(range(20_000))
        assert found.graph.nodes[0].attribute("wrong") is None


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/passwd", "missing.bin", "", "pipe"])
def test_external_data_elsewhere_is_not_read(tmp_path: Path, location: str) -> None:
    (tmp_path / "outside.bin").write_bytes(bytes(8))
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "pipe").symlink_to("/dev/zero")
    tensor = TensorProto(name="s", data_type=INT64, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    with GraphFile(read(folder, model([], [], [], [tensor]))) as found:
        assert found.graph.constants["s"].values is None


def test_fields_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxgraph, "MAX_GRAPH_FIELDS", 500)
    nodes = [helper.make_node("Relu", [f"v{at}"], [f"v{at + 1}"]) for at in range(200)]
    path = read(tmp_path, model(nodes, [value("v0", FLOAT, [None])], [value("v200", FLOAT, [None])]))
    with pytest.raises(TooManyFields, match="more than 500 fields to read for its graph"):
        GraphFile(path).__enter__()


@pytest.mark.parametrize(
    "data", [b"", b"\x08\x08", b"\x3a\x05\x0a", model([], [], []).SerializeToString() * 2]
)
def test_file_without_a_graph_or_with_two_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(Unparsable):
        GraphFile(tmp_path / "model.onnx").__enter__()
