"""Builds networks of the layers that published ones have."""

from collections.abc import Mapping, Sequence

import onnx
from onnx import TensorProto, helper

from bench import models
from bench.models import ConvNet

Shape = Sequence[int | str]


class Layers(ConvNet):
    """Builds a network of other layers, too."""

    def silu(self, source: str) -> str:
        """Append what exporters make of the activation that detectors have."""
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
        """Append what makes a picture, or a spectrum, of twice the size along each dimension."""
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
            graph, opset_imports=[helper.make_opsetid("", models.OPSET)], ir_version=models.IR_VERSION
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
