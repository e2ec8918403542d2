"""The models that the benches load, made on the spot: the same bytes in every run, and no download."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.random import Generator
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


class ConvNet:
    """Builds a residual network node by node; the weights are random, with a fixed seed."""

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

    def layers(self) -> str:
        """Append the whole network, from `image` on, and return the name of its result."""
        channels = STAGES[0][0]
        last = self.node("Relu", [self.conv("image", 3, channels, kernel=7, stride=2)])
        for outputs, blocks in STAGES:
            for index in range(blocks):
                last = self.block(last, channels, outputs, stride=2 if index == 0 else 1)
                channels = outputs
        pooled = self.node("Flatten", [self.node("GlobalAveragePool", [last])])
        return self.node("Gemm", [pooled, self.weight(CLASSES, channels), self.weight(CLASSES)], transB=1)

    def model(self) -> bytes:
        """Return the network from `image` [N, 3, 224, 224] FP32 to its scores [N, 1000] FP32."""
        output = self.layers()
        graph = helper.make_graph(
            self._nodes,
            "convnet",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 224, 224])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", CLASSES])],
            self._weights,
        )
        return _serialised(graph)


def _serialised(graph: onnx.GraphProto) -> bytes:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def convnet(seed: int = 0) -> bytes:
    """Return a convolutional network of 54 MB."""
    return ConvNet(seed).model()


def renamed(model: bytes, name: str) -> bytes:
    """Return the same network with other bytes, so that nothing that was learnt of it by hash applies."""
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
