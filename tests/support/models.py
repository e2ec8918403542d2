"""Real ONNX models for the tests, each the smallest that shows what its name says.

Builders return a `ModelProto`; `save` and `save_bytes` put one into a model repository in the layout that
the server reads, `<root>/<model>/<version>/model.onnx`.
"""

import os
import socket
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from onnx import (
    FunctionProto,
    ModelProto,
    NodeProto,
    TensorProto,
    TypeProto,
    ValueInfoProto,
    helper,
    numpy_helper,
    parser,
)

IR_VERSION = 10
OPSET = 18

FLOAT: int = TensorProto.FLOAT
INT64: int = TensorProto.INT64
STRING: int = TensorProto.STRING
BOOL: int = TensorProto.BOOL

CORRUPT = b"\x08\x0a\x12\x07backend\x3a\xff\xff\x01not a graph" + bytes(range(256))
"""Begins like a model and breaks off inside its graph."""
TEXT = b"this is no model, it is a sentence\n"
"""A text file under a model's name."""
OTHER_FORMAT = b"\x14\0\0\0ORTM" + bytes(100)
"""Begins like ONNX Runtime's own format, which it looks for in bytes, and not in a file of this name."""
ENDLESS = 2**62
"""For `counting_loop`: more trips than anything lives to see."""
LOWEST = -(2**63)
"""For `crash_on_run`: the 64-bit integer whose negative does not exist."""


def save(model: ModelProto, root: Path, model_id: str, version: int = 1) -> Path:
    """Write a model into the repository at `root`; returns the version's folder."""
    return save_bytes(model.SerializeToString(), root, model_id, version)


def save_bytes(data: bytes, root: Path, model_id: str, version: int = 1) -> Path:
    """Write any bytes as a model's file: empty, corrupt, text; returns the version's folder."""
    folder = root / model_id / str(version)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(data)
    return folder


def bind_socket(path: Path) -> None:
    """Put a socket where a file is expected."""
    folder = os.open(path.parent, os.O_RDONLY)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


def value(name: str, element: int, shape: Sequence[int | str | None] | None) -> ValueInfoProto:
    """Describe a tensor that goes in or out; a name or None in the shape is a dynamic dimension."""
    return helper.make_tensor_value_info(name, element, shape)


def model(
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    initializers: Sequence[TensorProto] = (),
    functions: Sequence[FunctionProto] = (),
) -> ModelProto:
    """Put a graph into a model, with the opsets that the builders here use."""
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    opsets = [
        helper.make_opsetid("", OPSET),
        helper.make_opsetid("ai.onnx.ml", 3),
        helper.make_opsetid("local", 1),
    ]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, functions=functions)


def parse_model(graph: str) -> ModelProto:
    """Return a model with a graph in ONNX's own text form."""
    made = parser.parse_graph(f"graph {graph}")
    return model(made.node, made.input, made.output, made.initializer)


def identity(element: int = FLOAT, shape: Sequence[int | str | None] = (None,)) -> ModelProto:
    """`y = x`, of any element type and shape; the default is a vector of floats of any length."""
    node = helper.make_node("Identity", ["x"], ["y"])
    return model([node], [value("x", element, shape)], [value("y", element, shape)])


def strings() -> ModelProto:
    """`y = x` for a vector of strings (the protocol's BYTES)."""
    return identity(STRING)


def add(constant: float = 1.0) -> ModelProto:
    """`y = x + constant`, on a vector of floats: tells versions of a model apart by their answers."""
    nodes = [helper.make_node("Add", ["x", "c"], ["y"])]
    weights = [numpy_helper.from_array(np.array([constant], np.float32), "c")]
    return model(nodes, [value("x", FLOAT, [None])], [value("y", FLOAT, [None])], weights)


def subtract() -> ModelProto:
    """`y = a - b`: two inputs, whose order matters."""
    return parse_model("(float[?] a, float[?] b) => (float[?] y) { y = Sub(a, b) }")


def weights(megabytes: int, *, layers: int = 8, seed: int = 0) -> ModelProto:
    """A chain of `x @ w` of this size in all (10**6 bytes): something that takes memory to hold."""
    side = max(1, int((megabytes * 1_000_000 / 4 / layers) ** 0.5))
    rng = np.random.default_rng(seed)
    tensors = [
        numpy_helper.from_array(rng.standard_normal((side, side), np.float32) / side, f"w{i}")
        for i in range(layers)
    ]
    names = ["x", *(f"h{i}" for i in range(layers - 1)), "y"]
    nodes = [
        helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]], name=f"layer{i}")
        for i in range(layers)
    ]
    return model(nodes, [value("x", FLOAT, [None, side])], [value("y", FLOAT, [None, side])], tensors)


def slow_model(side: int = 1500, depth: int = 30) -> ModelProto:
    """Slow to load, not to run: thirty products of 1500 by 1500 take some seconds on one core."""
    nodes, tensors, last = _folded_chain(side, depth)
    nodes.append(helper.make_node("Add", ["x", last], ["y"]))
    shape = [side, side]
    return model(nodes, [value("x", FLOAT, shape)], [value("y", FLOAT, shape)], tensors)


def slow_to_fold(side: int, depth: int) -> ModelProto:
    """`y = x + c`, with a c that takes ONNX Runtime long to find while it loads."""
    nodes, tensors, last = _folded_chain(side, depth)
    nodes.append(helper.make_node("ReduceMax", [last], ["c"], keepdims=0))
    nodes.append(helper.make_node("Add", ["x", "c"], ["y"]))
    return model(nodes, [value("x", FLOAT, [None])], [value("y", FLOAT, [None])], tensors)


def slow_identity(side: int = 800, depth: int = 40) -> ModelProto:
    """`y = x` of floats, which takes a second or so to load."""
    nodes, tensors, last = _folded_chain(side, depth)
    tensors.append(helper.make_tensor("zero", FLOAT, [], [0.0]))
    nodes += [
        helper.make_node("ReduceSum", [last], ["sum"], keepdims=0),
        helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
        helper.make_node("Add", ["x", "nothing"], ["y"]),
    ]
    return model(nodes, [value("x", FLOAT, [None])], [value("y", FLOAT, [None])], tensors)


def _folded_chain(side: int, depth: int) -> tuple[list[NodeProto], list[TensorProto], str]:
    """Return a chain of constant MatMuls, which ONNX Runtime folds while it loads, and its last output."""
    rng = np.random.default_rng(0)
    tensors = [numpy_helper.from_array(rng.standard_normal((side, side), np.float32) / side, "w")]
    names = ["w", *(f"h{i}" for i in range(depth))]
    nodes = [helper.make_node("MatMul", [names[i], "w"], [names[i + 1]]) for i in range(depth)]
    return nodes, tensors, names[-1]


def counting_loop() -> ModelProto:
    """`count = trips`, by counting: runs as long as its input says, so `ENDLESS` never returns by itself."""
    return parse_model("""(int64 trips) => (int64 count) <bool go = {1}, int64 zero = {0}> {
        count = Loop (trips, go, zero) <body = body
            (int64 trip, bool going, int64 total) => (bool going_out, int64 total_out) <int64 one = {1}> {
                going_out = Identity(going)
                total_out = Add(total, one)
            }>
    }""")


def memory_bomb_on_load(count: int = 225_000_000) -> ModelProto:
    """A file of 300 bytes that takes 900 MB (4 bytes times count) to load: a sparse constant."""
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("v", FLOAT, [1], [1.0]), helper.make_tensor("i", INT64, [1], [0]), [count]
    )
    nodes = [
        helper.make_node("Constant", [], ["m"], sparse_value=sparse),
        helper.make_node("Add", ["x", "m"], ["y"]),
    ]
    return model(nodes, [value("x", FLOAT, [count])], [value("y", FLOAT, [count])])


def memory_bomb_on_run() -> ModelProto:
    """Takes 4 bytes times the product of its input (a shape) to answer with one number."""
    return parse_model("""(int64[?] shape) => (float sum) {
        zeros = ConstantOfShape(shape)
        sum = ReduceSum <keepdims = 0> (zeros)
    }""")


def crash_on_load() -> ModelProto:
    """Kills the process that loads it (SIGFPE on x86): folds the one division that overflows."""
    tensors = [helper.make_tensor("a", INT64, [1], [LOWEST]), helper.make_tensor("b", INT64, [1], [-1])]
    nodes = [helper.make_node("Div", ["a", "b"], ["d"]), helper.make_node("Add", ["x", "d"], ["y"])]
    return model(nodes, [value("x", INT64, [1])], [value("y", INT64, [1])], tensors)


def crash_on_run() -> ModelProto:
    """`y = a / b` of integers, or a if b is 0: kills its process (SIGFPE on x86) for `LOWEST / -1`."""
    return parse_model("""(int64[?] a, int64[?] b) => (int64[?] y) <int64 zero = {0}, int64 one = {1}> {
        is_zero = Equal(b, zero)
        divisor = Where(is_zero, one, b)
        y = Div(a, divisor)
    }""")


def unknown_operator() -> ModelProto:
    """A valid file with an operator that no runtime has."""
    return parse_model("(float[?] x) => (float[?] y) { y = Frobnicate(x) }")


def external(location: str, *, count: int = 4) -> ModelProto:
    """`y = x + w` with w (`count` floats) in a file of its own, at `location` beneath the version's folder.

    The file itself is the caller's to write (`external_bytes`), or not to.
    """
    tensor = external_tensor("w", location, count)
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    return model(nodes, [value("x", FLOAT, [count])], [value("y", FLOAT, [count])], [tensor])


def behind_a_long_tag(model: ModelProto) -> bytes:
    """Serialise a model with its graph behind a tag of 36 bits.

    Protobuf cuts it to 32 and so finds the graph (measured with ONNX Runtime 1.31); by the wire format there
    is no such field.
    """
    graph = model.graph.SerializeToString()
    rest = ModelProto()
    rest.CopyFrom(model)
    rest.ClearField("graph")
    data: bytes = rest.SerializeToString() + b"\xba\x80\x80\x80\x10" + varint(len(graph)) + graph
    return data


def varint(number: int) -> bytes:
    """Encode a number as protobuf does."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def external_tensor(name: str, location: str, count: int = 4) -> TensorProto:
    """Make a tensor of `count` floats whose bytes are in another file."""
    tensor = TensorProto(name=name, data_type=FLOAT, dims=[count], data_location=TensorProto.EXTERNAL)
    for key, text in (("location", location), ("offset", "0"), ("length", str(4 * count))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, text
    return tensor


def external_bytes(count: int = 4) -> bytes:
    """Give the content of the file beside `external`: the floats from 0 up."""
    return np.arange(count, dtype=np.float32).tobytes()


def zip_map() -> ModelProto:
    """A classifier's usual ending: `scores` comes out as a tensor and as a sequence of maps (`named`)."""
    nodes = [
        helper.make_node("Identity", ["x"], ["scores"]),
        helper.make_node("ZipMap", ["x"], ["named"], domain="ai.onnx.ml", classlabels_int64s=[0, 1]),
    ]
    element = helper.make_map_type_proto(INT64, helper.make_tensor_type_proto(FLOAT, []))
    maps: TypeProto = helper.make_sequence_type_proto(element)
    outputs = [value("scores", FLOAT, [None, 2]), helper.make_value_info("named", maps)]
    return model(nodes, [value("x", FLOAT, [None, 2])], outputs)


def sequence_input() -> ModelProto:
    """The length of a sequence of tensors: an input that the inference protocol has no name for."""
    sequence = helper.make_sequence_type_proto(helper.make_tensor_type_proto(FLOAT, [None]))
    nodes = [helper.make_node("SequenceLength", ["s"], ["length"])]
    return model(nodes, [helper.make_value_info("s", sequence)], [value("length", INT64, [])])


def with_default() -> ModelProto:
    """`y = x + c`, where c is 5 unless it is given."""
    default = numpy_helper.from_array(np.array([5], np.float32), "c")
    nodes = [helper.make_node("Add", ["x", "c"], ["y"])]
    inputs = [value("x", FLOAT, [None]), value("c", FLOAT, [1])]
    return model(nodes, inputs, [value("y", FLOAT, [None])], [default])


def optional_value(name: str) -> ValueInfoProto:
    """Describe a vector of floats that may have no value."""
    vector = helper.make_tensor_type_proto(FLOAT, [None])
    return helper.make_value_info(name, helper.make_optional_type_proto(vector))


def optional_input() -> ModelProto:
    """`y = o` if o is given, else x; `given` says which."""
    return parse_model("""(float[?] x, optional(float[?]) o) => (float[?] y, bool given) {
        given = OptionalHasElement(o)
        y = If (given) <
            then_branch = then () => (float[?] t) { t = OptionalGetElement(o) },
            else_branch = else () => (float[?] e) { e = Identity(x) }
        >
    }""")


def optional_output() -> ModelProto:
    """`maybe = x` if `wanted`, else it has no value; `z = x` always has one."""
    nothing = helper.make_node("Optional", [], ["e"], type=helper.make_tensor_type_proto(FLOAT, [None]))
    nodes = [
        helper.make_node(
            "If",
            ["wanted"],
            ["maybe"],
            then_branch=helper.make_graph(
                [helper.make_node("Optional", ["x"], ["t"])], "then", [], [optional_value("t")]
            ),
            else_branch=helper.make_graph([nothing], "else", [], [optional_value("e")]),
        ),
        helper.make_node("Identity", ["x"], ["z"]),
    ]
    inputs = [value("x", FLOAT, [None]), value("wanted", BOOL, [])]
    return model(nodes, inputs, [optional_value("maybe"), value("z", FLOAT, [None])])


def running_total() -> ModelProto:
    """Adds x, step by step, to the state that goes in; every total, and the state to go on with, come out."""
    return parse_model("""(float[2] state, float[?, 2] x) => (float[2] new_state, float[?, 2] totals) {
        new_state, totals = Scan (state, x) <num_scan_inputs = 1, body = body
            (float[2] before, float[2] step) => (float[2] after, float[2] t) {
                after = Add(before, step)
                t = Identity(after)
            }>
    }""")


def rows(element: int = FLOAT) -> ModelProto:
    """`y = x` for rows of any length: something with a batch dimension."""
    return identity(element, ("batch", "length"))


def quantised() -> ModelProto:
    """`y = x · w` by whole numbers, with one scale for all rows of x, as most int8 models compute."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
        helper.make_node("MatMulInteger", ["q", "w", "zero"], ["product"]),
        helper.make_node("Cast", ["product"], ["sum"], to=FLOAT),
        helper.make_node("Mul", ["sum", "scale"], ["y"]),
    ]
    weights = [numpy_helper.from_array(np.eye(4, dtype=np.int8), "w")]
    return model(nodes, [value("x", FLOAT, ["batch", 4])], [value("y", FLOAT, ["batch", 4])], weights)


def less_their_mean() -> ModelProto:
    """`y = x` less the mean of all rows, so that they depend on each other."""
    return parse_model("""(float[batch, 4] x) => (float[batch, 4] y) <int64[1] axis = {0}> {
        mean = ReduceMean(x, axis)
        y = Sub(x, mean)
    }""")


def unfamiliar_rows() -> ModelProto:
    """`y = x`, by an operator that ONNX Runtime has and the table of operators lacks."""
    return parse_model("""(float[batch, 4] x) => (float[batch, 4] y)
    <int64[4] picture = {-1, 1, 1, 4}, int64[2] row = {-1, 4}, int32[1, 1, 1, 4] mask = {1, 1, 1, 1}> {
        before = Reshape(x, picture)
        after = com.microsoft.MaxpoolWithMask <kernel_shape = [1, 1]> (before, mask)
        y = Reshape(after, row)
    }""")


def look_up() -> ModelProto:
    """`y = 10 * x` for rows of x from 0 to 3, by looking it up: fails for any other."""
    return parse_model("""(int64[batch, length] x) => (int64[batch, length] y)
    <int64[4] table = {0, 10, 20, 30}> {
        y = Gather(table, x)
    }""")


def distinct_rows() -> ModelProto:
    """The rows of x, each once: what has a batch dimension of its own length."""
    return parse_model("(float[batch, 1] x) => (float[any, 1] y) { y = Unique <axis = 0, sorted = 0> (x) }")


def counting_rows() -> ModelProto:
    """`y = x`, after counting to the largest in the batch."""
    loop = counting_loop().graph
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["trips"], keepdims=0),
        *loop.node,
        helper.make_node("Min", ["x", "count"], ["y"]),
    ]
    return model(nodes, [value("x", INT64, ["batch"])], [value("y", INT64, ["batch"])], loop.initializer)


def identity_of_any_shape(element: int) -> ModelProto:
    """`y = x`, of any element type, with as many dimensions as it gets."""
    node = helper.make_node("Identity", ["x"], ["y"])
    return model([node], [value("x", element, None)], [value("y", element, None)])


def reshape() -> ModelProto:
    """`y = x` as a matrix whose sides are the second input: zeros are no such sides."""
    return parse_model(
        "(float[6] x, int64[2] sides) => (float[?, ?] y) { y = Reshape <allowzero = 1> (x, sides) }"
    )


def picture_of_one_size() -> ModelProto:
    """`y = x` for pictures of 224 by 224 pixels, though it declares any size: fails for others."""
    return parse_model("""(float[1,3,h,w] x) => (float[1,3,224,224] y) <int64[4] size = {1, 3, 224, 224}> {
        y = Reshape(x, size)
    }""")


def divide() -> ModelProto:
    """`y = a / b` of integers: fails where b is 0."""
    return parse_model("(int64[?] a, int64[?] b) => (int64[?] y) { y = Div(a, b) }")


def crash_on_zeros() -> ModelProto:
    """Kills the process that runs it (SIGFPE on x86) for 0: it is then `LOWEST / -1`."""
    return parse_model(f"""(int64[1] x) => (int64[1] y) <int64 lowest = {{{LOWEST}}}, int64 one = {{1}}> {{
        a = Add(x, lowest)
        b = Sub(x, one)
        y = Div(a, b)
    }}""")


def crash_on_rows(rows: int) -> ModelProto:
    """`y = x`; kills the process that runs it (SIGFPE on x86) for so many: it then divides `LOWEST / -1`."""
    return parse_model(f"""(int64[?] x) => (int64[?] y) <
        int64[1] deadly = {{{rows}}}, int64[1] lowest = {{{LOWEST}}},
        int64[1] one = {{1}}, int64[1] zero = {{0}}
    > {{
        rows = Shape(x)
        more = Sub(rows, deadly)
        square = Mul(more, more)
        a = Add(square, lowest)
        b = Sub(square, one)
        quotient = Div(a, b)
        nothing = Mul(quotient, zero)
        y = Add(x, nothing)
    }}""")


def endless() -> ModelProto:
    """Counts on from its input for ever: no inference of it ends by itself."""
    loop = counting_loop().graph
    far = helper.make_tensor("far", INT64, [], [ENDLESS])
    nodes = [helper.make_node("Add", ["x", "far"], ["trips"]), *loop.node]
    return model(nodes, [value("x", INT64, [])], [value("count", INT64, [])], [*loop.initializer, far])


def filled() -> ModelProto:
    """As many ones and a half as the input says."""
    return parse_model(
        "(int64[1] count) => (float[?] y) { y = ConstantOfShape <value = float[1] {1.5}> (count) }"
    )


def filled_rows() -> ModelProto:
    """For each row as many tenths as the largest of the batch says."""
    return parse_model("""(int64[batch, 1] x) => (float[batch, length] y) <int64[1] one = {1}> {
        largest = ReduceMax <keepdims = 0> (x)
        length = Reshape(largest, one)
        rows = Shape <start = 0, end = 1> (x)
        shape = Concat <axis = 0> (rows, length)
        y = ConstantOfShape <value = float[1] tenth {0.1}> (shape)
    }""")


def second_column() -> ModelProto:
    """`y = x[:, 1]` of floats, where no shape is declared: fails for what is no matrix."""
    one = helper.make_tensor("one", INT64, [], [1])
    nodes = [helper.make_node("Gather", ["x", "one"], ["y"], axis=1)]
    return model(nodes, [value("x", FLOAT, None)], [value("y", FLOAT, None)], [one])


def memory_bomb_on_zeros(count: int = 250_000_000) -> ModelProto:
    """Takes 4 bytes times count to answer any input with one number."""
    return parse_model(f"""(int64[1] x) => (float sum) <int64[1] count = {{{count}}}> {{
        shape = Add(x, count)
        zeros = ConstantOfShape(shape)
        sum = ReduceSum <keepdims = 0> (zeros)
    }}""")


def widened(count: int = 40_000_000) -> ModelProto:
    """`y = x` repeated so many times: a file of 200 bytes that takes memory to run, and not to load."""
    size = helper.make_tensor("count", INT64, [1], [count])
    nodes = [helper.make_node("Expand", ["x", "count"], ["y"])]
    return model(nodes, [value("x", FLOAT, [1])], [value("y", FLOAT, [count])], [size])


def table(megabytes: float, key: int = 0) -> ModelProto:
    """`y = table[x]`, with a table of this size (10**6 bytes): takes memory to hold, and tells who answered.

    `entry(key, index)` is what the answers are; no two keys below 1000 have one in common at any index.
    """
    indices = np.arange(int(megabytes * 1_000_000 / 4), dtype=np.int64)
    values = numpy_helper.from_array(entry(key, indices).astype(np.float32), "table")
    nodes = [helper.make_node("Gather", ["table", "x"], ["y"])]
    return model(nodes, [value("x", INT64, [None])], [value("y", FLOAT, [None])], [values])


def entry(key: int, index: Any) -> Any:
    """Give what stands in the table of this key at an index, or at many: whole numbers that FP32 has."""
    return (5 * index + 10_007 * key) % 2**24


def misaligned(rows: int | str = "rows", side: int = 250) -> ModelProto:
    """Three layers of odd size, which kernels do not read in whole steps."""
    rng = np.random.default_rng(0)
    tensors = [
        numpy_helper.from_array(rng.standard_normal((side, side), np.float32) / side, f"w{i}")
        for i in range(3)
    ]
    names = ["x", "h0", "h1", "y"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(3)]
    return model(nodes, [value("x", FLOAT, [rows, side])], [value("y", FLOAT, [rows, side])], tensors)


def grown(count: int = 20_000_000) -> ModelProto:
    """`y = x + 1` in a file of 200 bytes: ONNX Runtime makes a weight of 4 bytes times count of its 1."""
    nodes = [helper.make_node("Expand", ["one", "count"], ["w"]), helper.make_node("Add", ["x", "w"], ["y"])]
    tensors = [helper.make_tensor("one", FLOAT, [1], [1.0]), helper.make_tensor("count", INT64, [1], [count])]
    return model(nodes, [value("x", FLOAT, [1])], [value("y", FLOAT, [count])], tensors)


@cache
def endless_load() -> bytes:
    """`y = x + c` that takes minutes to load: tests wait for its load to begin, never for its end.

    ONNX Runtime looks for c while it loads, by three hundred poolings of a second and 360 KB each.
    """
    side, wide, depth = 300, 201, 300
    first = np.random.default_rng(0).standard_normal((1, 1, side, side), np.float32)
    kernel, pads = [wide, wide], [wide // 2] * 4
    nodes = [
        helper.make_node("MaxPool", [f"h{i}"], [f"h{i + 1}"], kernel_shape=kernel, pads=pads)
        for i in range(depth)
    ]
    nodes.append(helper.make_node("ReduceMax", [f"h{depth}"], ["c"], keepdims=0))
    nodes.append(helper.make_node("Add", ["x", "c"], ["y"]))
    tensors = [numpy_helper.from_array(first, "h0")]
    shape = [None]
    made = model(nodes, [value("x", FLOAT, shape)], [value("y", FLOAT, shape)], tensors)
    content: bytes = made.SerializeToString()
    return content
