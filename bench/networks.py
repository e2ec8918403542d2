"""Five networks of the kinds that are published, made on the spot: to be loaded, prepared, and loaded again.

Their weights are random with fixed seeds, so they are the same bytes in every run; what counts is their size,
their operators and how many of these there are.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from bench import models
from bench.layers import Layers

Body = tuple[int, bytes]
"""The length of the JSON, and all of a request's body, which begins with it."""

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

SPECTRUM = 256
# Each stage halves the spectrum.
SOUND_CHANNELS = (32, 48, 64, 64)
SOUND_HIDDEN = 128


@dataclass(frozen=True, slots=True)
class Network:
    """A network that is measured.

    Args:
        name: Its model id.
        what: What the table calls it.
        build: Returns the ONNX file; it takes up to a second.
        inputs: The shapes of what one inference brings, all FP32, by name.
    """

    name: str
    what: str
    build: Callable[[], bytes]
    inputs: Mapping[str, tuple[int, ...]]

    def request(self) -> Body:
        """Return an inference in binary form, on noise."""
        noise = np.random.default_rng(1)
        values = {name: noise.standard_normal(shape, dtype=np.float32) for name, shape in self.inputs.items()}
        tensors = [
            {
                "name": name,
                "shape": shape,
                "datatype": "FP32",
                "parameters": {"binary_data_size": 4 * math.prod(shape)},
            }
            for name, shape in self.inputs.items()
        ]
        asked = {"inputs": tensors, "parameters": {"binary_data_output": True}}
        head = json.dumps(asked, separators=(",", ":")).encode()
        return len(head), head + b"".join(value.tobytes() for value in values.values())


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
    """Append what brings a coarse scale into a finer one."""
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
    """Return a network of 2 MB that says what of a spectrum is noise, and is given what it remembers.

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
    """Append what knows of the spectra before; return its output, and the states for the next one."""
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
    Network("cnn", "CNN", models.convnet, {"image": (1, 3, 224, 224)}),
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
"""What `make bench` measures, the smallest last."""
