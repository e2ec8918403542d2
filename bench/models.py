"""The models that the bench loads, made on the spot with fixed seeds: the same bytes in every run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.random import Generator
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

# Every ONNX Runtime that the server accepts reads these.
OPSET = 17
IR_VERSION = 8
# A residual network of the usual shape; with these numbers of blocks it has 13.5 M weights, 54 MB as FP32.
STAGES = ((64, 3), (128, 4), (256, 3), (512, 2))
CLASSES = 1000
ADD_ONE = "add-one"
# As many as the network has weights.
TABLE_ELEMENTS = 13_500_000


Shape = Sequence[int | str]


class Layers:
    """Builds a network node by node; the weights are random, with a fixed seed."""

    def __init__(self, seed: int) -> None:
        self._random: Generator = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []

    def node(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Append a node and return the name of its only output."""
        output = f"{operator}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def weight(self, *shape: int) -> str:
        """Append a random FP32 weight, small enough that no layer overflows, and return its name."""
        scale = float(np.prod(shape[1:])) ** -0.5
        values = self._random.standard_normal(shape, dtype=np.float32) * np.float32(scale)
        self._weights.append(numpy_helper.from_array(values, f"weight_{len(self._weights)}"))
        return self._weights[-1].name

    def conv(self, source: str, inputs: int, outputs: int, *, kernel: int, stride: int = 1) -> str:
        """Append a convolution with its bias, as exporters leave one whose normalisation they folded."""
        return self.node(
            "Conv",
            [source, self.weight(outputs, inputs, kernel, kernel), self.weight(outputs)],
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[kernel // 2] * 4,
        )

    def block(self, source: str, inputs: int, outputs: int, *, stride: int) -> str:
        """Append two convolutions and the shortcut around them."""
        shortcut = source
        if stride > 1 or inputs != outputs:
            shortcut = self.conv(source, inputs, outputs, kernel=1, stride=stride)
        inner = self.node("Relu", [self.conv(source, inputs, outputs, kernel=3, stride=stride)])
        return self.node("Relu", [self.node("Add", [self.conv(inner, outputs, outputs, kernel=3), shortcut])])

    def model(self, name: str, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape]) -> bytes:
        """Return the network as a file; all that goes in and comes out is FP32."""
        given, results = (
            [
                helper.make_tensor_value_info(key, TensorProto.FLOAT, list(shape))
                for key, shape in each.items()
            ]
            for each in (inputs, outputs)
        )
        return _serialised(helper.make_graph(self._nodes, name, given, results, self._weights))


def _serialised(graph: onnx.GraphProto) -> bytes:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def convnet(seed: int = 0) -> bytes:
    """Return a residual convolutional network of 54 MB."""
    layers, channels = Layers(seed), STAGES[0][0]
    last = layers.node("Relu", [layers.conv("image", 3, channels, kernel=7, stride=2)])
    for outputs, blocks in STAGES:
        for index in range(blocks):
            last = layers.block(last, channels, outputs, stride=2 if index == 0 else 1)
            channels = outputs
    pooled = layers.node("Flatten", [layers.node("GlobalAveragePool", [last])])
    weights = layers.weight(CLASSES, channels), layers.weight(CLASSES)
    scores = layers.node("Gemm", [pooled, *weights], transB=1)
    return layers.model("convnet", {"image": ("N", 3, 224, 224)}, {scores: ("N", CLASSES)})


def renamed(model: bytes, name: str) -> bytes:
    """Return the same network with other bytes, so that no result cached by hash applies."""
    # Protocol buffers merge what is appended: this sets one more field.
    named: bytes = onnx.ModelProto(doc_string=name).SerializeToString()
    return model + named


def tiny() -> bytes:
    """Return a model that does nothing, in a hundred bytes: to load it is the server's own work alone."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "tiny", value[:1], value[1:])
    return _serialised(graph)


def add_one() -> bytes:
    """Return a model of one operator, `y = x + 1` on [-1, -1] FP32: its output is as large as its input."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", "M"]) for name in ("x", "y")]
    one = helper.make_tensor("one", TensorProto.FLOAT, [], [1.0])
    node = helper.make_node("Add", ["x", "one"], ["y"])
    return _serialised(helper.make_graph([node], ADD_ONE, value[:1], value[1:], [one]))


def add_one_from_table() -> bytes:
    """Return a model of 54 MB that answers as `add_one` does and as quickly: its one is looked up in a table.

    Where in the table depends on how many rows are asked, so that nothing can be worked out at the load.
    """
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", "M"]) for name in ("x", "y")]
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], end=1),
        helper.make_node("Gather", ["table", "shape"], ["one"]),
        helper.make_node("Add", ["x", "one"], ["y"]),
    ]
    table = numpy_helper.from_array(np.ones(TABLE_ELEMENTS, np.float32), "table")
    return _serialised(helper.make_graph(nodes, ADD_ONE, value[:1], value[1:], [table]))


def write(repository: Path, model_id: str, model: bytes, *, version: int = 1) -> Path:
    """Put a version of a model into the repository and return its file, which the page cache then holds."""
    path = repository / model_id / str(version) / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(model)
    return path


MLP_LAYERS = (1024, 3072, 3072, 3072, 1024, 1000)
LARGE_SIDE, LARGE_LAYERS = 4096, 16
WEIGHTS = "weights.bin"


@dataclass(frozen=True, slots=True)
class Network:
    """A measured network.

    Args:
        name: Its model id.
        what: What the table calls it.
        build: Returns the ONNX file; it takes up to a second.
        inputs: The shapes of what one inference brings, all FP32, by name.
        weights_bytes: What it has in a file of its own, `weights.bin`; 0 is none.
    """

    name: str
    what: str
    build: Callable[[], bytes]
    inputs: Mapping[str, tuple[int, ...]]
    weights_bytes: int = 0

    def write_weights(self, model: Path, seed: int) -> None:
        """Write the file of weights beside the model's, if there is one: noise, other bytes for each seed."""
        if self.weights_bytes:
            noise = np.random.default_rng(seed).standard_normal(LARGE_SIDE**2, dtype=np.float32) / LARGE_SIDE
            with model.with_name(WEIGHTS).open("wb") as file:
                for _ in range(self.weights_bytes // noise.nbytes):
                    file.write(noise.data)

    def values(self) -> dict[str, NDArray[np.float32]]:
        """Return what one inference brings, noise, by name."""
        noise = np.random.default_rng(1)
        return {name: noise.standard_normal(shape, dtype=np.float32) for name, shape in self.inputs.items()}


def mlp() -> bytes:
    """Return a network of fully connected layers, 105 MB."""
    layers, last = Layers(2), "x"
    for index, (inputs, outputs) in enumerate(pairwise(MLP_LAYERS)):
        if index:
            last = layers.node("Relu", [last])
        last = layers.node("Gemm", [last, layers.weight(outputs, inputs), layers.weight(outputs)], transB=1)
    return layers.model("mlp", {"x": ("N", MLP_LAYERS[0])}, {last: ("N", MLP_LAYERS[-1])})


NETWORKS = (
    Network("cnn", "CNN", convnet, {"image": (1, 3, 224, 224)}),
    Network("mlp", "MLP", mlp, {"x": (1, MLP_LAYERS[0])}),
)
"""Networks that `make bench` measures."""


def large_mlp() -> bytes:
    """Return a network of fully connected layers without biases, whose weights lie in `weights.bin`."""
    weights, nodes, last = [], [], "x"
    for index in range(LARGE_LAYERS):
        weight = onnx.TensorProto(
            name=f"weight_{index}",
            data_type=TensorProto.FLOAT,
            dims=[LARGE_SIDE, LARGE_SIDE],
            data_location=TensorProto.EXTERNAL,
        )
        length = 4 * LARGE_SIDE**2
        for key, value in {"location": WEIGHTS, "offset": index * length, "length": length}.items():
            weight.external_data.add(key=key, value=str(value))
        weights.append(weight)
        nodes.append(helper.make_node("Gemm", [last, weight.name], [f"layer_{index}"]))
        last = f"layer_{index}"
    shape: Shape = ["N", LARGE_SIDE]
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name in ("x", last)
    )
    graph = helper.make_graph(nodes, "large", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    content: bytes = model.SerializeToString()
    return content


LARGE = Network(
    "large", "MLP, external data", large_mlp, {"x": (1, LARGE_SIDE)}, LARGE_LAYERS * 4 * LARGE_SIDE**2
)
"""One whose weights are a gigabyte, beside the file of its graph."""
