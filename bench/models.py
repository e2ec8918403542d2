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
# Of 4 MB, multiplied so often that an inference takes about 3 ms of one core.
SLOW_SIDE, SLOW_LAYERS = 1024, 64


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


def add_one_slowly() -> bytes:
    """Return a model that answers as `add_one` does, after some milliseconds of one core."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", "M"]) for name in ("x", "y")]
    weights = np.random.default_rng(0).standard_normal((SLOW_SIDE, SLOW_SIDE), np.float32) / SLOW_SIDE**0.5
    constants = {"row": np.ones((1, SLOW_SIDE), np.float32), "weights": weights}
    constants |= {"zero": np.zeros((), np.float32), "one": np.ones((), np.float32)}
    nodes, last = [helper.make_node("ReduceMean", ["x"], ["mean"])], "layer_0"
    nodes.append(helper.make_node("Mul", ["mean", "row"], [last]))
    for index in range(SLOW_LAYERS):
        nodes.append(helper.make_node("Gemm", [last, "weights"], [f"product_{index}"]))
        last = f"layer_{index + 1}"
        nodes.append(helper.make_node("Tanh", [f"product_{index}"], [last]))
    nodes += [
        helper.make_node("ReduceMean", [last], ["end"], keepdims=0),
        helper.make_node("Mul", ["end", "zero"], ["nothing"]),
        helper.make_node("Add", ["one", "nothing"], ["increment"]),
        helper.make_node("Add", ["x", "increment"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(each, name) for name, each in constants.items()]
    return _serialised(helper.make_graph(nodes, ADD_ONE, value[:1], value[1:], tensors))


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


Shape = Sequence[int | str]


class Layers(ConvNet):
    """Builds a network of other layers, too."""

    def silu(self, source: str) -> str:
        """Append the activation of detectors as exporters write it."""
        return self.node("Mul", [source, self.node("Sigmoid", [source])])

    def recurrent(
        self,
        operator: str,
        source: str,
        inputs: int,
        hidden: int,
        states: Sequence[str] = (),
        **attributes: str,
    ) -> tuple[str, str]:
        """Append an LSTM or a GRU; return the names of its outputs and of its last hidden state.

        Args:
            operator: Either.
            source: A sequence [length, N, inputs].
            inputs: How many features.
            hidden: How many come of them, in each direction.
            states: The initial one, in place of zeros.
            attributes: The direction, if it is not forward.
        """
        gates, directions = 4 if operator == "LSTM" else 3, 2 if "direction" in attributes else 1
        weights = [self.weight(directions, gates * hidden, size) for size in (inputs, hidden)]
        bias = self.weight(directions, 2 * gates * hidden)
        outputs = [f"{operator}_{len(self._nodes)}_{part}" for part in ("all", "last")]
        sources = [source, *weights, bias, *(["", *states] if states else [])]
        self._nodes.append(helper.make_node(operator, sources, outputs, hidden_size=hidden, **attributes))
        return outputs[0], outputs[1]

    def integers(self, *values: int) -> str:
        """Append a constant for an operator that takes a shape or axes, and return its name."""
        return self._constant(TensorProto.INT64, values)

    def separable(self, source: str, inputs: int, outputs: int, *, dimensions: int, stride: int = 1) -> str:
        """Append a convolution in each channel and one over all, normalised, as they are trained."""
        kernel, around = [5] * dimensions, [2] * 2 * dimensions
        own = self.node(
            "Conv",
            [source, self.weight(inputs, 1, *kernel)],
            kernel_shape=kernel,
            strides=[stride] * dimensions,
            pads=around,
            group=inputs,
        )
        active = self.node("Relu", [self._normalised(own, inputs)])
        over_all = self.node("Conv", [active, self.weight(outputs, inputs, *[1] * dimensions)])
        made = self._normalised(over_all, outputs)
        return self.node("Add", [made, source]) if inputs == outputs and stride == 1 else made

    def twice(self, source: str, *, dimensions: int) -> str:
        """Append an upsampling of a picture or spectrum to twice the size along each dimension."""
        scales = self._constant(TensorProto.FLOAT, (1.0, 1.0, *[2.0] * dimensions))
        return self.node("Resize", [source, "", scales], mode="nearest")

    def network(self, name: str, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape]) -> bytes:
        """Return the network as a file; all that goes in and comes out is FP32."""
        given, results = (
            [
                helper.make_tensor_value_info(key, TensorProto.FLOAT, list(shape))
                for key, shape in each.items()
            ]
            for each in (inputs, outputs)
        )
        graph = helper.make_graph(self._nodes, name, given, results, self._weights)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
        )
        onnx.checker.check_model(model)
        content: bytes = model.SerializeToString()
        return content

    def _normalised(self, source: str, channels: int) -> str:
        ones = self._constant(TensorProto.FLOAT, [1.0] * channels)
        return self.node(
            "BatchNormalization", [source, ones, self.weight(channels), self.weight(channels), ones]
        )

    def _constant(self, kind: int, values: Sequence[float]) -> str:
        name = f"constant_{len(self._weights)}"
        self._weights.append(helper.make_tensor(name, kind, [len(values)], values))
        return name


MLP_LAYERS = (1024, 3072, 3072, 3072, 1024, 1000)

# Each stage halves the picture: its channels, and how many blocks follow.
DETECTOR_STAGES = ((32, 0), (64, 2), (128, 4), (256, 4), (320, 2))
DETECTOR_HEAD = 80
DETECTOR_CLASSES = 80
DETECTOR_SIDE = 320

LINE_HEIGHT, LINE_WIDTH = 48, 320
# Channels and stride of each block; a picture of a line becomes a sequence, a step for each eight columns.
LINE_STAGES = ((64, 1), (64, 2), (96, 1), (96, 2), *[(128, 1)] * 6)
LINE_HIDDEN = 300
# As many as a published recogniser of Chinese has.
LINE_CLASSES = 6625

LARGE_SIDE, LARGE_LAYERS = 4096, 16
WEIGHTS = "weights.bin"

SPECTRUM = 256
# Each stage halves the spectrum.
SOUND_CHANNELS = (32, 48, 64, 64)
SOUND_HIDDEN = 128


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
    return layers.network("mlp", {"x": ("N", MLP_LAYERS[0])}, {last: ("N", MLP_LAYERS[-1])})


def detector() -> bytes:
    """Return a detector of 20 MB: three scales of a backbone, brought together, with heads on each."""
    layers = Layers(3)
    scales = _backbone(layers)
    last, channels = scales.pop()
    pyramid = [(last, channels)]
    while scales:
        finer, more = scales.pop()
        last = _merged(layers, last, channels, finer, more)
        channels = more
        pyramid.append((last, channels))
    heads = [[_head(layers, *scale, outputs) for scale in pyramid] for outputs in (4, DETECTOR_CLASSES)]
    boxes, scores = (layers.node("Concat", head, axis=2) for head in heads)
    scores = layers.node("Sigmoid", [scores])
    best = layers.node("ReduceMax", [scores], axes=[1], keepdims=1)
    return layers.network(
        "detector",
        {"image": ("N", 3, DETECTOR_SIDE, DETECTOR_SIDE)},
        {boxes: ("N", 4, "A"), scores: ("N", DETECTOR_CLASSES, "A"), best: ("N", 1, "A")},
    )


def _backbone(layers: Layers) -> list[tuple[str, int]]:
    """Append it, and return the names and the channels of its three last stages."""
    scales: list[tuple[str, int]] = []
    last, channels = "image", 3
    for outputs, blocks in DETECTOR_STAGES:
        last = layers.silu(layers.conv(last, channels, outputs, kernel=3, stride=2))
        channels = outputs
        for _ in range(blocks):
            last = _bottleneck(layers, last, channels)
        scales.append((last, channels))
    return scales[-3:]


def _bottleneck(layers: Layers, source: str, channels: int) -> str:
    inner = layers.silu(layers.conv(source, channels, channels // 2, kernel=1))
    return layers.node("Add", [source, layers.silu(layers.conv(inner, channels // 2, channels, kernel=3))])


def _merged(layers: Layers, coarse: str, channels: int, finer: str, more: int) -> str:
    """Append the fusion of a coarse scale into a finer one."""
    narrow = layers.silu(layers.conv(coarse, channels, more, kernel=1))
    both = layers.node("Concat", [layers.twice(narrow, dimensions=2), finer], axis=1)
    return layers.silu(layers.conv(both, 2 * more, more, kernel=1))


def _head(layers: Layers, source: str, channels: int, outputs: int) -> str:
    inner = layers.silu(layers.conv(source, channels, DETECTOR_HEAD, kernel=3))
    made = layers.conv(inner, DETECTOR_HEAD, outputs, kernel=1)
    return layers.node("Reshape", [made, layers.integers(0, outputs, -1)])


def recogniser() -> bytes:
    """Return a recogniser of 21 MB: convolutions over the picture of a line, an LSTM, and classes."""
    layers = Layers(4)
    last = layers.node("Relu", [layers.conv("line", 3, 32, kernel=3, stride=2)])
    channels = 32
    for outputs, stride in LINE_STAGES:
        last = layers.separable(last, channels, outputs, dimensions=2, stride=stride)
        channels = outputs
    last = layers.node("ReduceMean", [last], axes=[2], keepdims=0)  # over the height that is left
    last = layers.node("Transpose", [last], perm=[2, 0, 1])
    both, _ = layers.recurrent("LSTM", last, channels, LINE_HIDDEN, direction="bidirectional")
    last = layers.node("Transpose", [both], perm=[2, 0, 1, 3])  # from [length, direction, N, hidden]
    last = layers.node("Reshape", [last, layers.integers(0, 0, 2 * LINE_HIDDEN)])
    last = layers.node("MatMul", [last, layers.weight(2 * LINE_HIDDEN, LINE_CLASSES)])
    last = layers.node("Softmax", [layers.node("Add", [last, layers.weight(LINE_CLASSES)])], axis=2)
    return layers.network(
        "recogniser", {"line": ("N", 3, LINE_HEIGHT, LINE_WIDTH)}, {last: ("N", "T", LINE_CLASSES)}
    )


def denoiser() -> bytes:
    """Return a network of 2 MB that marks the noise in a spectrum; its states are inputs and outputs.

    Convolutions make it smaller, two GRUs remember, and convolutions make it larger again.
    """
    layers, last, channels = Layers(5), "spectrum", 1
    passed: list[tuple[str, int]] = []
    for outputs in SOUND_CHANNELS:
        passed.append((last, channels))
        for stride in (2, 1, 1):
            last = layers.separable(last, channels, outputs, dimensions=1, stride=stride)
            channels = outputs
    features = channels * SPECTRUM // 2 ** len(SOUND_CHANNELS)
    last = layers.node("Reshape", [last, layers.integers(0, features)])
    last, after = _remembered(layers, last, features)
    last = layers.node("Reshape", [last, layers.integers(0, channels, -1)])
    for skip, outputs in reversed(passed):
        last = layers.separable(layers.twice(last, dimensions=1), channels, outputs, dimensions=1)
        last = layers.separable(layers.node("Add", [last, skip]), outputs, outputs, dimensions=1)
        channels = outputs
    state = (1, "N", SOUND_HIDDEN)
    return layers.network(
        "denoiser",
        {"spectrum": ("N", 1, SPECTRUM), "first": state, "second": state},
        {layers.node("Sigmoid", [last]): ("N", 1, SPECTRUM), **dict.fromkeys(after, state)},
    )


def _remembered(layers: Layers, source: str, features: int) -> tuple[str, list[str]]:
    """Append the recurrent part over earlier spectra; return its output and the next states."""
    narrow = layers.node("Gemm", [source, layers.weight(SOUND_HIDDEN, features)], transB=1)
    last, after = layers.node("Unsqueeze", [narrow, layers.integers(0)]), list[str]()
    for name in ("first", "second"):
        every, state = layers.recurrent("GRU", last, SOUND_HIDDEN, SOUND_HIDDEN, [name])
        last = layers.node("Squeeze", [every, layers.integers(1)])
        after.append(state)
    last = layers.node("Squeeze", [last, layers.integers(0)])
    wide = layers.node("Gemm", [last, layers.weight(features, SOUND_HIDDEN)], transB=1)
    return layers.node("Relu", [wide]), after


NETWORKS = (
    Network("cnn", "CNN", convnet, {"image": (1, 3, 224, 224)}),
    Network("mlp", "MLP", mlp, {"x": (1, MLP_LAYERS[0])}),
    Network("detector", "detector", detector, {"image": (1, 3, DETECTOR_SIDE, DETECTOR_SIDE)}),
    Network("recogniser", "text recogniser", recogniser, {"line": (1, 3, LINE_HEIGHT, LINE_WIDTH)}),
    Network(
        "stateful",
        "stateful net",
        denoiser,
        {
            "spectrum": (1, 1, SPECTRUM),
            "first": (1, 1, SOUND_HIDDEN),
            "second": (1, 1, SOUND_HIDDEN),
        },
    ),
)
"""Networks that `make bench` measures, the smallest last."""


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
