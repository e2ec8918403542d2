"""Small models whose rows depend on each other, and models whose rows do not, as exporters write both.

COUPLED has what published models and their authors do to a batch: they pad to its longest row, scale by its
largest number, sort it, leave a loop when all its rows are done. INDEPENDENT has graphs that look alike, but
keep rows apart: reshapes with computed sizes, windows, heads, states of the batch's size, test-time
augmentation.

A case is a graph in ONNX's text form. A weight's values follow from its name, so a model is always the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper, parser

from support.rowruns import MakeRows

IR_VERSION = 10


@dataclass(frozen=True)
class Case:
    """A model.

    Attributes:
        build: makes it.
        make_rows: makes its inputs, where inputs drawn at random do not show what it does.
    """

    build: Callable[[], ModelProto]
    make_rows: MakeRows | None = None


def _graph(
    text: str,
    *,
    opset: int = 21,
    functions: str = "",
    make_rows: MakeRows | None = None,
    weights: Mapping[str, tuple[int, ...]] | None = None,
    arrays: Mapping[str, Any] | None = None,
) -> Case:
    """Return a model with a graph in text form.

    Args:
        text: the graph.
        opset: the version of ONNX's operators.
        functions: model-local functions of the domain "local".
        make_rows: see `Case`.
        weights: shapes of weights of random numbers by name.
        arrays: other weights by name.
    """

    def build() -> ModelProto:
        domains = f'"" : {opset}, "com.microsoft" : 1, "ai.onnx.ml" : 3, "local" : 1'
        model = parser.parse_model(
            f"<ir_version: {IR_VERSION}, opset_import: [{domains}]> graph {text} {functions}"
        )
        made = {name: _weight(name, shape) for name, shape in (weights or {}).items()} | dict(arrays or {})
        model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in made.items())
        return model

    return Case(build, make_rows)


def _weight(name: str, shape: tuple[int, ...]) -> Any:
    rng = np.random.default_rng(crc32(name.encode()))
    scale = max(1, int(np.prod(shape[1:]))) ** -0.5 if len(shape) > 1 else 1.0
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def _heads(x: str, name: str, bias: str = "") -> str:
    """Return attention with two heads of four over [N, T, 8], with sizes computed as torch does."""
    added = f"{name}_s = Add({name}_r, {bias})" if bias else f"{name}_s = Identity({name}_r)"
    return f"""
        {name}_shape = Shape({x})
        {name}_n = Gather <axis = 0> ({name}_shape, i0)
        {name}_t = Gather <axis = 0> ({name}_shape, i1)
        {name}_n1 = Unsqueeze({name}_n, axes0)
        {name}_t1 = Unsqueeze({name}_t, axes0)
        {name}_split = Concat <axis = 0> ({name}_n1, {name}_t1, two, four)
        {name}_q0 = MatMul({x}, Wq)
        {name}_q1 = Reshape({name}_q0, {name}_split)
        {name}_q = Transpose <perm = [0, 2, 1, 3]> ({name}_q1)
        {name}_k0 = MatMul({x}, Wk)
        {name}_k1 = Reshape({name}_k0, {name}_split)
        {name}_k = Transpose <perm = [0, 2, 3, 1]> ({name}_k1)
        {name}_v0 = MatMul({x}, Wv)
        {name}_v1 = Reshape({name}_v0, {name}_split)
        {name}_v = Transpose <perm = [0, 2, 1, 3]> ({name}_v1)
        {name}_qk = MatMul({name}_q, {name}_k)
        {name}_r = Mul({name}_qk, half)
        {added}
        {name}_p = Softmax <axis = -1> ({name}_s)
        {name}_o0 = MatMul({name}_p, {name}_v)
        {name}_o1 = Transpose <perm = [0, 2, 1, 3]> ({name}_o0)
        {name}_joined = Concat <axis = 0> ({name}_n1, {name}_t1, eight)
        {name}_o2 = Reshape({name}_o1, {name}_joined)
        {name}_o3 = MatMul({name}_o2, Wo)
        {name} = Add({name}_o3, {x})
    """


_HEADS = """int64 i0 = {0}, int64 i1 = {1}, int64[1] axes0 = {0}, int64[1] axes1 = {1}, int64[1] axes2 = {2},
    int64[2] axes12 = {1, 2}, int64[1] two = {2}, int64[1] four = {4}, int64[1] eight = {8},
    float half = {0.5}, float one = {1}"""
_HEAD_WEIGHTS: Mapping[str, tuple[int, ...]] = {"Wq": (8, 8), "Wk": (8, 8), "Wv": (8, 8), "Wo": (8, 8)}


def _lengths(
    limit: int, *floats: tuple[str, tuple[int, ...]], name: str = "lengths", dtype: Any = np.int64
) -> MakeRows:
    """Return a maker of rows with lengths from 1 to the limit, and floats."""

    def make(rng: np.random.Generator, count: int) -> dict[str, Any]:
        made = {each: rng.uniform(-1, 1, (count, *shape)).astype(np.float32) for each, shape in floats}
        return made | {name: rng.integers(1, limit + 1, count).astype(dtype)}

    return make


def _indices(low: int, high: int, *shape: int) -> MakeRows:
    """Return a maker of rows with indices; 0 and -1 are indices of a batch of any size."""

    def make(rng: np.random.Generator, count: int) -> dict[str, Any]:
        index = rng.integers(low, high, (count, *shape))
        return {"x": rng.uniform(-1, 1, (count, 4)).astype(np.float32), "index": index}

    return make


COUPLED: dict[str, Case] = {
    # --- Lengths of the batch
    "sorted_by_length": _graph(
        """(float[N, 6, 4] x, int64[N] lengths) => (float[N, 8] y) <int64[1] zero = {0}> {
            count = Shape(lengths)
            sorted, order = TopK <axis = 0> (lengths, count)
            rows = Gather <axis = 0> (x, order)
            times = Transpose <perm = [1, 0, 2]> (rows)
            lens = Cast <to = 6> (sorted)
            all, last, cell = LSTM <hidden_size = 8> (times, W, R, , lens)
            y = Squeeze(last, zero)
        }""",
        weights={"W": (1, 32, 4), "R": (1, 32, 8)},
        make_rows=_lengths(6, ("x", (6, 4))),
    ),
    "packed_to_longest": _graph(
        """(float[N, 6, 4] x, int64[N] lengths) => (float[N, M, 8] y)
            <int64[1] zero = {0}, int64[1] one = {1}> {
            count = Shape(lengths)
            sorted, order = TopK <axis = 0> (lengths, count)
            rows = Gather <axis = 0> (x, order)
            times = Transpose <perm = [1, 0, 2]> (rows)
            lens = Cast <to = 6> (sorted)
            all, last, cell = LSTM <hidden_size = 8> (times, W, R, , lens)
            steps = Squeeze(all, one)
            batch = Transpose <perm = [1, 0, 2]> (steps)
            negative = Neg(order)
            back, unsorted = TopK <axis = 0> (negative, count)
            restored = Gather <axis = 0> (batch, unsorted)
            longest = ReduceMax <keepdims = 1> (lengths)
            y = Slice(restored, zero, longest, one)
        }""",
        weights={"W": (1, 32, 4), "R": (1, 32, 8)},
        make_rows=_lengths(6, ("x", (6, 4))),
    ),
    "length_over_longest": _graph(
        """(int64[N] lengths) => (float[N] y) {
            floats = Cast <to = 1> (lengths)
            longest = ReduceMax <keepdims = 0> (floats)
            y = Div(floats, longest)
        }"""
    ),
    "mask_to_longest": _graph(
        """(int64[N] lengths) => (float[N, M] y) <int64 zero = {0}, int64 one = {1}, int64[1] last = {1}> {
            longest = ReduceMax <keepdims = 0> (lengths)
            positions = Range(zero, longest, one)
            column = Unsqueeze(lengths, last)
            mask = Less(positions, column)
            y = Cast <to = 1> (mask)
        }"""
    ),
    "mean_over_longest": _graph(
        """(float[N, 6] x, int64[N] lengths) => (float[N] y) <int64[1] last = {1}> {
            sum = ReduceSum <keepdims = 0> (x, last)
            longest = ReduceMax <keepdims = 0> (lengths)
            divisor = Cast <to = 1> (longest)
            y = Div(sum, divisor)
        }""",
        make_rows=_lengths(6, ("x", (6,))),
    ),
    "trimmed_to_longest_and_padded": _graph(
        """(float[N, 6] x, int64[N] lengths) => (float[N, 6] y)
            <int64[1] zero = {0}, int64[1] one = {1}, int64[1] six = {6}, int64[3] zeros = {0, 0, 0}> {
            longest = ReduceMax <keepdims = 1> (lengths)
            trimmed = Slice(x, zero, longest, one)
            scores = Softmax <axis = 1> (trimmed)
            missing = Sub(six, longest)
            pads = Concat <axis = 0> (zeros, missing)
            y = Pad(scores, pads)
        }""",
        make_rows=_lengths(6, ("x", (6,))),
    ),
    "loop_as_long_as_longest": _graph(
        """(float[N, 4] x, int64[N] lengths) => (float[N, 4] y) <bool go = {1}> {
            longest = ReduceMax <keepdims = 0> (lengths)
            y = Loop (longest, go, x) <body = step
                (int64 trip, bool going, float[N, 4] state) => (bool on, float[N, 4] next) {
                    on = Identity(going)
                    hidden = MatMul(state, w)
                    next = Tanh(hidden)
                }>
        }""",
        weights={"w": (4, 4)},
        make_rows=_lengths(6, ("x", (4,))),
    ),
    "loop_until_all_are_done": _graph(
        """(int64[N] first) => (int64[N] last) <int64 most = {50}, bool go = {1}> {
            last = Loop (most, go, first) <body = step
                (int64 trip, bool going, int64[N] ids) => (bool on, int64[N] next)
                <int64 three = {3}, int64 one = {1}, int64 end = {17}, int64 modulus = {23}> {
                    tripled = Mul(ids, three)
                    added = Add(tripled, one)
                    next = Mod(added, modulus)
                    is_over = Equal(next, end)
                    over = Cast <to = 7> (is_over)
                    fewest = ReduceMin <keepdims = 0> (over)
                    on = Less(fewest, one)
                }>
        }"""
    ),
    "reverse_sequence_over_rows": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <int64[1] four = {4}, int64[1] zero = {0}, int64[1] one = {1}> {
            shape = Shape(x)
            rows = Slice(shape, zero, one)
            lengths = Expand(rows, four)
            y = ReverseSequence <batch_axis = 1, time_axis = 0> (x, lengths)
        }"""
    ),
    # --- Booleans of the batch
    "branch_if_any": _graph(
        """(bool[N] flags, float[N, 4] x) => (float[N, 4] y) {
            numbers = Cast <to = 6> (flags)
            most = ReduceMax <keepdims = 0> (numbers)
            any = Cast <to = 9> (most)
            y = If (any) <
                then_branch = doubled () => (float[N, 4] a) { a = Add(x, x) },
                else_branch = same () => (float[N, 4] b) { b = Identity(x) }>
        }"""
    ),
    "or_with_any": _graph(
        """(bool[N, 3] flags) => (bool[N, 3] y) {
            numbers = Cast <to = 6> (flags)
            most = ReduceMax <axes = [0], keepdims = 1> (numbers)
            any = Cast <to = 9> (most)
            y = Or(flags, any)
        }""",
        opset=13,
    ),
    "replaced_if_any_is_nan": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <float zero = {0}> {
            is_nan = IsNaN(x)
            numbers = Cast <to = 6> (is_nan)
            most = ReduceMax <keepdims = 0> (numbers)
            any = Cast <to = 9> (most)
            y = Where(any, zero, x)
        }"""
    ),
    "where_all_are_positive": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <float zero = {0}> {
            least = ReduceMin <keepdims = 0> (x)
            positive = Greater(least, zero)
            root = Sqrt(x)
            y = Where(positive, root, x)
        }"""
    ),
    # --- Numbers of the batch
    "over_brightest": _graph(
        """(uint8[N, 4, 4] pixels) => (float[N, 4, 4] y) <float one = {1}> {
            floats = Cast <to = 1> (pixels)
            brightest = ReduceMax <keepdims = 0> (floats)
            divisor = Max(brightest, one)
            y = Div(floats, divisor)
        }"""
    ),
    "nan_of_any_row": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <float zero = {0}> {
            sum = ReduceSum <keepdims = 0> (x)
            nothing = Mul(sum, zero)
            y = Add(x, nothing)
        }"""
    ),
    "clipped_over_largest": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <float zero = {0}, float one = {1}, float small = {0.001}> {
            clipped = Clip(x, zero, one)
            largest = ReduceMax <keepdims = 0> (clipped)
            divisor = Max(largest, small)
            y = Div(clipped, divisor)
        }"""
    ),
    "static_int8_mean": _graph(
        """(float[N, 4] x) => (float[N, 4] y)
            <float scale = {0.02}, int8 point = {0}, float[1, 4] g = {1, 2, 3, 4}, int64[1] rows = {0}> {
            quantized = QuantizeLinear(x, scale, point)
            floats = DequantizeLinear(quantized, scale, point)
            mean = ReduceMean <keepdims = 1> (floats, rows)
            y = Sub(floats, mean)
        }"""
    ),
    "log_mel_floor": _graph(
        """(float[N, 8, 5] power) => (float[N, 8, 5] y)
            <float least = {0.0000000001}, float range = {8}, float four = {4}, float ten = {0.4342945}> {
            clipped = Max(power, least)
            natural = Log(clipped)
            decimal = Mul(natural, ten)
            loudest = ReduceMax <keepdims = 0> (decimal)
            floor = Sub(loudest, range)
            floored = Max(decimal, floor)
            raised = Add(floored, four)
            y = Div(raised, four)
        }"""
    ),
    "scores_beside_boxes": _graph(
        """(float[N, 6] x) => (float[N, 4] boxes, float[N, 2] scores)
            <float side = {640}, int64[2] parts = {4, 2}> {
            corners, logits = Split <axis = 1> (x, parts)
            boxes = Mul(corners, side)
            scores = Softmax <axis = 0> (logits)
        }"""
    ),
    "batch_normalization_in_training": _graph(
        """(float[N, 3, 4] x) => (float[N, 3, 4] y) {
            y, mean, variance = BatchNormalization <training_mode = 1> (x, scale, bias, m, v)
        }""",
        arrays={
            "scale": np.ones(3, np.float32),
            "bias": np.zeros(3, np.float32),
            "m": np.zeros(3, np.float32),
            "v": np.ones(3, np.float32),
        },
    ),
    "mean_variance_normalization": _graph(
        "(float[N, 3, 4, 4] x) => (float[N, 3, 4, 4] y) { y = MeanVarianceNormalization(x) }"
    ),
    "layer_normalization_of_all": _graph(
        """(float[N, 4] x) => (float[N, 4] y) {
            mean = ReduceMean(x)
            delta = Sub(x, mean)
            square = Mul(delta, delta)
            variance = ReduceMean(square)
            deviation = Sqrt(variance)
            y = Div(delta, deviation)
        }"""
    ),
    "norm_over_rows": _graph(
        "(float[N, 4] x) => (float[N, 4] y) { y = LpNormalization <axis = 0, p = 2> (x) }"
    ),
    "dynamic_quantization": _graph(
        """(float[N, 4] x) => (float[N, 3] y) {
            q, scale, point = DynamicQuantizeLinear(x)
            product = MatMulInteger(q, w, point)
            floats = Cast <to = 1> (product)
            y = Mul(floats, scale)
        }""",
        arrays={"w": np.arange(-6, 6, dtype=np.int8).reshape(4, 3)},
    ),
    "dynamic_quantization_fused": _graph(
        "(float[N, 4] x) => (float[N, 3] y) { y = com.microsoft.DynamicQuantizeMatMul(x, w, s) }",
        arrays={"w": np.arange(-6, 6, dtype=np.int8).reshape(4, 3), "s": np.array([0.1], np.float32)},
    ),
    "scale_of_the_batch": _graph(
        """(float[N, 4] x) => (float[N, 4] y)
            <float most = {127}, float least = {0.000001}, int8 point = {0}> {
            size = Abs(x)
            largest = ReduceMax <keepdims = 0> (size)
            step = Div(largest, most)
            scale = Max(step, least)
            quantized = QuantizeLinear(x, scale, point)
            y = DequantizeLinear(quantized, scale, point)
        }"""
    ),
    # --- Rows as another axis
    "softmax_over_rows": _graph("(float[N, 4] x) => (float[N, 4] y) { y = Softmax <axis = 0> (x) }"),
    "softmax_of_opset_11": _graph(
        "(float[N, 4] x) => (float[N, 4] y) { y = Softmax <axis = 0> (x) }", opset=11
    ),
    "log_softmax_over_rows": _graph("(float[N, 4] x) => (float[N, 4] y) { y = LogSoftmax <axis = 0> (x) }"),
    "hardmax_over_rows": _graph("(float[N, 4] x) => (float[N, 4] y) { y = Hardmax <axis = 0> (x) }"),
    "cumulative_sum_over_rows": _graph(
        "(float[N, 4] x) => (float[N, 4] y) <int64 rows = {0}> { y = CumSum(x, rows) }"
    ),
    "lstm_over_rows": _graph(
        """(float[N, 4] x) => (float[N, 8] y) <int64[1] one = {1}, int64[2] middle = {1, 2}> {
            times = Unsqueeze(x, one)
            all, last, cell = LSTM <hidden_size = 8> (times, W, R)
            y = Squeeze(all, middle)
        }""",
        weights={"W": (1, 32, 4), "R": (1, 32, 8)},
    ),
    "gru_of_batch_first": _graph(
        """(float[N, 5, 4] x) => (float[N, 5, 8] y) <int64[1] one = {1}> {
            all, last = GRU <hidden_size = 8> (x, W, R)
            y = Squeeze(all, one)
        }""",
        weights={"W": (1, 24, 4), "R": (1, 24, 8)},
    ),
    "attention_over_rows": _graph(
        """(float[N, 5, 4] x) => (float[N, 5, 4] y) {
            times = Transpose <perm = [1, 0, 2]> (x)
            keys = Transpose <perm = [0, 2, 1]> (times)
            products = MatMul(times, keys)
            weights = Softmax <axis = -1> (products)
            sums = MatMul(weights, times)
            y = Transpose <perm = [1, 0, 2]> (sums)
        }"""
    ),
    "scan_over_rows": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <float[4] start = {0, 0, 0, 0}> {
            final, y = Scan <num_scan_inputs = 1, body = step
                (float[4] state, float[4] row) => (float[4] next, float[4] out) {
                    next = Add(state, row)
                    out = Identity(next)
                }> (start, x)
        }"""
    ),
    "convolution_over_rows": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <int64[1] zero = {0}> {
            columns = Transpose <perm = [1, 0]> (x)
            image = Unsqueeze(columns, zero)
            mixed = Conv <kernel_shape = [3], pads = [1, 1]> (image, w)
            flat = Squeeze(mixed, zero)
            y = Transpose <perm = [1, 0]> (flat)
        }""",
        weights={"w": (4, 4, 3)},
    ),
    "global_max_pool_over_rows": _graph(
        """(float[N, 3, 4] x) => (float[N, 3, 4] y) {
            moved = Transpose <perm = [1, 2, 0]> (x)
            largest = GlobalMaxPool(moved)
            difference = Sub(moved, largest)
            y = Transpose <perm = [2, 0, 1]> (difference)
        }"""
    ),
    "max_pool_over_rows": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <int64[1] zero = {0}> {
            columns = Transpose <perm = [1, 0]> (x)
            image = Unsqueeze(columns, zero)
            pooled = MaxPool <kernel_shape = [3], pads = [1, 1]> (image)
            flat = Squeeze(pooled, zero)
            y = Transpose <perm = [1, 0]> (flat)
        }"""
    ),
    "channels_of_all_rows_normalized": _graph(
        """(float[N, 3, 4] x) => (float[N, 3, 4] y)
            <int64[3] flat = {1, 3, -1}, float[3] scale = {1, 1, 1}, float[3] bias = {0, 0, 0}> {
            channels = Transpose <perm = [1, 0, 2]> (x)
            shape = Shape(channels)
            image = Reshape(channels, flat)
            normal = InstanceNormalization(image, scale, bias)
            back = Reshape(normal, shape)
            y = Transpose <perm = [1, 0, 2]> (back)
        }"""
    ),
    # --- Reshapes
    "softmax_of_flattened": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <int64[2] flat = {1, -1}> {
            shape = Shape(x)
            row = Reshape(x, flat)
            scores = Softmax <axis = 1> (row)
            y = Reshape(scores, shape)
        }"""
    ),
    "reshape_in_wrong_order": _graph(
        """(float[N, 2, 3] x) => (float[N, 2, 3] y) <int64[3] wrong = {2, -1, 3}> {
            pairs = Reshape(x, wrong)
            y = Transpose <perm = [1, 0, 2]> (pairs)
        }"""
    ),
    "flattened_transposed": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <int64[2] rows = {-1, 4}> {
            columns = Transpose <perm = [1, 0]> (x)
            y = Reshape(columns, rows)
        }"""
    ),
    "windows_of_all_rows": _graph(
        """(float[N, 4, 4] x) => (float[N, 4, 4] y)
            <int64[3] split = {-1, 2, 8}, int64[3] rows = {-1, 4, 4}> {
            pairs = Reshape(x, split)
            moved = Transpose <perm = [1, 0, 2]> (pairs)
            windows = Softmax <axis = 1> (moved)
            back = Transpose <perm = [1, 0, 2]> (windows)
            y = Reshape(back, rows)
        }"""
    ),
    "augmentation_in_wrong_order": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <int64[3] pairs = {-1, 2, 4}, int64[1] one = {1}> {
            opposite = Neg(x)
            rooted = Abs(opposite)
            both = Concat <axis = 0> (x, rooted)
            grouped = Reshape(both, pairs)
            y = ReduceMean <keepdims = 0> (grouped, one)
        }"""
    ),
    # --- Products of rows with rows
    "attention_without_batch": _graph(
        """(float[N, 4] x) => (float[N, 4] y) {
            columns = Transpose <perm = [1, 0]> (x)
            products = MatMul(x, columns)
            weights = Softmax <axis = -1> (products)
            y = MatMul(weights, x)
        }"""
    ),
    "similarities": _graph(
        """(float[N, 4] x) => (float[N, N] y) {
            columns = Transpose <perm = [1, 0]> (x)
            y = MatMul(x, columns)
        }"""
    ),
    "gram_matrix": _graph(
        """(float[N, 4] x) => (float[N, 4] y) {
            columns = Transpose <perm = [1, 0]> (x)
            gram = MatMul(columns, x)
            y = MatMul(x, gram)
        }"""
    ),
    "gram_by_gemm": _graph(
        """(float[N, 4] x) => (float[N, 4] y) {
            gram = Gemm <transA = 1> (x, x)
            y = MatMul(x, gram)
        }"""
    ),
    "einsum_over_rows": _graph(
        '(float[N, 4] x) => (float[N, 4] y) { y = Einsum <equation = "ni,mi,mj->nj"> (x, x, x) }'
    ),
    "nearest_row": _graph(
        """(float[N, 4] x) => (float[N] y) <int64[1] one = {1}, int64[1] zero = {0}, int64[1] two = {2}> {
            left = Unsqueeze(x, one)
            right = Unsqueeze(x, zero)
            difference = Sub(left, right)
            square = Mul(difference, difference)
            distance = ReduceSum <keepdims = 0> (square, two)
            y = ReduceMax <keepdims = 0> (distance, one)
        }"""
    ),
    # --- Number and order of rows
    "branch_on_number_of_rows": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <int64 zero = {0}, int64 one = {1}> {
            shape = Shape(x)
            rows = Gather(shape, zero)
            several = Greater(rows, one)
            y = If (several) <
                then_branch = doubled () => (float[N, 4] a) { a = Add(x, x) },
                else_branch = same () => (float[N, 4] b) { b = Identity(x) }>
        }"""
    ),
    "over_number_of_rows": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <int64 zero = {0}> {
            shape = Shape(x)
            rows = Gather(shape, zero)
            divisor = Cast <to = 1> (rows)
            y = Div(x, divisor)
        }"""
    ),
    "position_in_batch_added": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <int64 zero = {0}, int64 one = {1}, int64[1] last = {1}> {
            shape = Shape(x)
            rows = Gather(shape, zero)
            positions = Range(zero, rows, one)
            column = Unsqueeze(positions, last)
            floats = Cast <to = 1> (column)
            y = Add(x, floats)
        }"""
    ),
    "small_position_added": _graph(
        """(float[N, 4] x) => (float[N, 4] y)
            <int64 zero = {0}, int64 one = {1}, int64[1] last = {1}, float small = {0.01}> {
            shape = Shape(x)
            rows = Gather(shape, zero)
            positions = Range(zero, rows, one)
            column = Unsqueeze(positions, last)
            floats = Cast <to = 1> (column)
            added = Mul(floats, small)
            y = Add(x, added)
        }"""
    ),
    "first_row_subtracted": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <int64[1] zero = {0}, int64[1] one = {1}> {
            first = Slice(x, zero, one)
            y = Sub(x, first)
        }"""
    ),
    "last_row_subtracted": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <int64[1] last = {-1}> {
            row = Gather <axis = 0> (x, last)
            y = Sub(x, row)
        }"""
    ),
    "reversed_rows": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <int64 zero = {0}, int64 one = {1}> {
            shape = Shape(x)
            rows = Gather(shape, zero)
            positions = Range(zero, rows, one)
            highest = Sub(rows, one)
            reversed = Sub(highest, positions)
            y = Gather <axis = 0> (x, reversed)
        }"""
    ),
    "rolled_rows": _graph(
        """(float[N, 4] x) => (float[N, 4] y)
            <int64[1] zero = {0}, int64[1] one = {1}, int64[1] end = {1000}> {
            first = Slice(x, zero, one)
            others = Slice(x, one, end)
            y = Concat <axis = 0> (others, first)
        }"""
    ),
    "shifted_rows": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <int64[4] pads = {1, 0, -1, 0}> {
            before = Pad(x, pads)
            y = Sub(x, before)
        }"""
    ),
    "sorted_rows": _graph(
        """(float[N] x) => (float[N] y) {
            rows = Shape(x)
            y, order = TopK <axis = 0> (x, rows)
        }"""
    ),
    "best_row": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <float[2] values = {0, 1}> {
            best = ArgMax <axis = 0, keepdims = 0> (x)
            shape = Shape(x)
            rows = Shape <start = 0, end = 1> (x)
            y = OneHot <axis = 0> (best, rows, values)
        }"""
    ),
    "rank_in_batch": _graph(
        """(float[N] x) => (float[N] y) <int64[1] one = {1}> {
            column = Unsqueeze(x, one)
            less = Less(x, column)
            floats = Cast <to = 1> (less)
            y = ReduceSum <keepdims = 0> (floats, one)
        }"""
    ),
    "sequence_of_rows_first": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <int64 zero = {0}> {
            rows = SplitToSequence <axis = 0> (x)
            first = SequenceAt(rows, zero)
            y = Sub(x, first)
        }"""
    ),
    # --- Defaults and negative axes
    "default_axis_of_a_vector": _graph(
        """(float[N] x) => (float[N] y) {
            y = Softmax(x)
        }"""
    ),
    "norm_of_a_vector": _graph(
        """(float[N] x) => (float[N] y) {
            y = LayerNormalization <axis = -1> (x, one)
        }""",
        arrays={"one": np.ones(1, np.float32)},
    ),
    "negative_axis": _graph(
        """(float[N, 4] x) => (float[N, 4] y) {
            y = Softmax <axis = -2> (x)
        }"""
    ),
    "negative_axis_of_an_operand": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <int64[1] rows = {-2}> {
            mean = ReduceMean <keepdims = 1> (x, rows)
            y = Sub(x, mean)
        }"""
    ),
    "no_axes_as_empty_tensor": _graph(
        """(float[N, 4] x) => (float[N, 4] y) {
            mean = ReduceMean <keepdims = 1> (x, none)
            y = Sub(x, mean)
        }""",
        arrays={"none": np.zeros(0, np.int64)},
    ),
    "argmax_without_axis": _graph(
        """(float[N, 4] x) => (float[N, 4] y) {
            best = ArgMax(x)
            floats = Cast <to = 1> (best)
            y = Add(x, floats)
        }"""
    ),
    "transposed_without_permutation": _graph(
        """(float[N, 4] x) => (float[N, 4] y) {
            columns = Transpose(x)
            scores = Softmax(columns)
            y = Transpose(scores)
        }"""
    ),
    "flattened_at_axis_0": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <int64[2] rows = {-1, 4}> {
            flat = Flatten <axis = 0> (x)
            scores = Softmax(flat)
            y = Reshape(scores, rows)
        }"""
    ),
    "softmax_of_opset_11_in_the_middle": _graph(
        """(float[N, 5, 4] x) => (float[N, 5, 4] y) {
            times = Transpose <perm = [1, 0, 2]> (x)
            scores = Softmax <axis = 1> (times)
            y = Transpose <perm = [1, 0, 2]> (scores)
        }""",
        opset=11,
    ),
    "gathered_without_axis": _graph(
        """(float[N, 4] x, int64[N, 4] index) => (float[N, 4] y) {
            y = GatherElements(x, index)
        }""",
        make_rows=_indices(-1, 1, 4),
    ),
    "scattered_without_axis": _graph(
        """(float[N, 4] x, int64[N, 4] index) => (float[N, 4] y) {
            y = ScatterElements <reduction = "add"> (x, index, x)
        }""",
        make_rows=_indices(-1, 1, 4),
    ),
    "rows_gathered_by_index": _graph(
        """(float[N, 4] x, int64[N] index) => (float[N, 4] y) {
            y = Gather(x, index)
        }""",
        make_rows=_indices(-1, 1),
    ),
    "reverse_sequence_without_axes": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <int64[1] four = {4}> {
            rows = Shape <start = 0, end = 1> (x)
            lengths = Expand(rows, four)
            y = ReverseSequence(x, lengths)
        }"""
    ),
    # --- Broadcasts
    "squeezed_without_axes": _graph(
        """(float[N, 1, 4] x) => (float[N, 4] y) {
            y = Squeeze(x)
        }"""
    ),
    "vector_along_columns": _graph(
        """(float[N, 4] x, float[N] bias) => (float[N, 4] y) {
            y = Add(x, bias)
        }"""
    ),
    "vector_beside_column": _graph(
        """(float[N, 1] x, float[N] bias) => (float[N] y) <int64[1] one = {1}> {
            all = Add(x, bias)
            y = ReduceMax <keepdims = 0> (all, one)
        }"""
    ),
    "rows_in_front_of_rows": _graph(
        """(float[N, 4] x, float[N, 1, 4] other) => (float[N, 4] y) <int64[1] one = {1}> {
            all = Mul(x, other)
            y = ReduceSum <keepdims = 0> (all, one)
        }"""
    ),
    "product_of_vectors": _graph(
        """(float[N] x, float[N] other) => (float[N] y) {
            product = MatMul(x, other)
            y = Mul(x, product)
        }"""
    ),
    "mask_of_all_rows": _graph(
        """(float[N, T, T] scores, float[N, T] mask) => (float[N, T, T] y)
            <int64[1] zero = {0}, int64[1] one = {1}> {
            wide = Unsqueeze(mask, zero)
            most = ReduceMax <keepdims = 1> (wide, one)
            y = Add(scores, most)
        }"""
    ),
    # --- Rows in another order, repeated or shifted
    "tiled_and_grouped": _graph(
        """(float[N, 4] x) => (float[N, 4] y)
            <int64[2] twice = {2, 1}, int64[3] pairs = {-1, 2, 4}, int64[1] one = {1}> {
            both = Tile(x, twice)
            grouped = Reshape(both, pairs)
            y = ReduceMax <keepdims = 0> (grouped, one)
        }"""
    ),
    "tiled_and_every_second": _graph(
        """(float[N, 4] x) => (float[N, 4] y)
            <int64[2] twice = {2, 1}, int64[1] zero = {0}, int64[1] end = {1000}, int64[1] two = {2}> {
            both = Tile(x, twice)
            y = Slice(both, zero, end, zero, two)
        }"""
    ),
    "constant_row_before": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <int64[1] zero = {0}, int64[1] last = {-1}> {
            longer = Concat <axis = 0> (token, x)
            y = Slice(longer, zero, last, zero)
        }""",
        weights={"token": (1, 4)},
    ),
    "even_rows_before_odd_ones": _graph(
        """(float[N, 4] x) => (float[N, 4] y)
            <int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] end = {1000}> {
            even = Slice(x, zero, end, zero, two)
            odd = Slice(x, one, end, zero, two)
            y = Concat <axis = 0> (even, odd)
        }"""
    ),
    "restored_in_wrong_order": _graph(
        """(float[N, 3, 4] x) => (float[N, 3, 4] y) <int64[2] flat = {-1, 4}> {
            shape = Shape(x)
            times = Transpose <perm = [1, 0, 2]> (x)
            words = Reshape(times, flat)
            active = Tanh(words)
            y = Reshape(active, shape)
        }"""
    ),
    "resized_rows": _graph(
        """(float[N, 4] x) => (float[N, 4] y)
            <float[2] scales = {2, 1}, int64[1] zero = {0}, int64[1] end = {1000}, int64[1] two = {2}> {
            large = Resize <mode = "linear"> (x, , scales)
            y = Slice(large, zero, end, zero, two)
        }"""
    ),
    "loop_over_rows_with_state": _graph(
        """(float[N, 4] x) => (float[N, 4] y)
            <int64 i0 = {0}, bool go = {1}, float[4] start = {0, 0, 0, 0}> {
            shape = Shape(x)
            rows = Gather(shape, i0)
            final, y = Loop (rows, go, start) <body = step
                (int64 trip, bool going, float[4] state) => (bool on, float[4] next, float[4] out) {
                    on = Identity(going)
                    row = Gather <axis = 0> (x, trip)
                    next = Add(state, row)
                    out = Identity(next)
                }>
        }"""
    ),
    # --- Positions and numbers of elements
    "identity_matrix_added": _graph(
        """(float[N, 4] x) => (float[N, 4] y) {
            eye = EyeLike(x)
            y = Add(x, eye)
        }"""
    ),
    "triangle_of_rows": _graph(
        """(float[N, 4] x) => (float[N, 4] y) {
            y = Trilu(x)
        }"""
    ),
    "over_number_of_elements": _graph(
        """(float[N, 4] x) => (float[N, 4] y) {
            count = Size(x)
            divisor = Cast <to = 1> (count)
            y = Div(x, divisor)
        }"""
    ),
    "positions_of_flattened_words": _graph(
        """(int64[N, 5] ids) => (int64[N, 5] y)
            <int64 zero = {0}, int64 one = {1}, int64[1] flat = {-1}> {
            shape = Shape(ids)
            count = Size(ids)
            positions = Range(zero, count, one)
            words = Reshape(ids, flat)
            added = Add(words, positions)
            y = Reshape(added, shape)
        }"""
    ),
    "branch_of_first_row": _graph(
        """(bool[N] flags, float[N, 4] x) => (float[N, 4] y) <int64 i0 = {0}> {
            flag = Gather(flags, i0)
            y = If (flag) <
                then_branch = doubled () => (float[N, 4] a) { a = Add(x, x) },
                else_branch = same () => (float[N, 4] b) { b = Identity(x) }>
        }"""
    ),
    "cropped_to_number_of_rows": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <int64[1] one = {1}, int64[1] four = {4}> {
            rows = Shape <start = 0, end = 1> (x)
            width = Min(rows, four)
            cropped = CenterCropPad <axes = [1]> (x, width)
            sum = ReduceSum <keepdims = 1> (cropped, one)
            y = Mul(x, sum)
        }"""
    ),
    "fused_gram_matrix": _graph(
        """(float[N, 4] x) => (float[N, 4] y) {
            gram = com.microsoft.FusedMatMul <transA = 1> (x, x)
            y = MatMul(x, gram)
        }"""
    ),
    "einsum_sum_of_rows": _graph(
        """(float[N, 4] x) => (float[N, 4] y) {
            sum = Einsum <equation = "ni->i"> (x)
            y = Sub(x, sum)
        }"""
    ),
    # --- Shared accumulators and compaction
    "shared_counts": _graph(
        """(int64[N] ids) => (float[N] y) <int64[1] many = {1001}, int64[1] last = {1}, int64 zero = {0}> {
            rows = Shape(ids)
            counts = ConstantOfShape(many)
            ones = ConstantOfShape <value = float[1] {1}> (rows)
            column = Unsqueeze(ids, last)
            summed = ScatterND <reduction = "add"> (counts, column, ones)
            y = Gather(summed, ids)
        }""",
        make_rows=lambda rng, count: {"ids": rng.integers(0, 4, count)},
    ),
    "scattered_over_each_other": _graph(
        """(int64[N, 1] ids, float[N, 1] x) => (float[N, 1] y)
            <int64[2] shape = {4, 1}, int64[1] flat = {-1}> {
            table = ConstantOfShape(shape)
            written = ScatterElements <axis = 0, reduction = "max"> (table, ids, x)
            index = Reshape(ids, flat)
            y = Gather(written, index)
        }""",
        make_rows=lambda rng, count: {
            "ids": rng.integers(0, 4, (count, 1)),
            "x": rng.uniform(0, 1, (count, 1)).astype(np.float32),
        },
    ),
    "index_in_unique": _graph(
        """(int64[N] ids) => (int64[N] y) { values, first, y, counts = Unique <sorted = 1> (ids) }"""
    ),
    "compacted_rows": _graph(
        """(float[N, 4] x, bool[N] keep) => (float[M, 4] y) { y = Compress <axis = 0> (x, keep) }"""
    ),
    "non_zero_rows_first": _graph(
        """(float[N] x, bool[N] keep) => (float[N] y)
            <int64[1] one = {1}, int64[1] zero = {0}, int64[1] flat = {-1}> {
            found = NonZero(keep)
            index = Transpose <perm = [1, 0]> (found)
            kept = GatherND(x, index)
            rows = Shape(x)
            some = Shape(kept)
            missing = Sub(rows, some)
            pads = Concat <axis = 0> (zero, missing)
            y = Pad(kept, pads)
        }"""
    ),
    "boxes_of_all_pictures": _graph(
        """(float[N, 5, 4] boxes, float[N, 1, 5] scores) => (int64[M, 3] y)
            <int64 most = {3}, float overlap = {0.5}, float least = {0.1}> {
            y = NonMaxSuppression(boxes, scores, most, overlap, least)
        }"""
    ),
    "words_padded_to_most": _graph(
        """(string[N] text) => (string[N, M] words) {
            words = com.microsoft.Tokenizer
                <mark = 0, mincharnum = 1, pad_value = "#", separators = [" "]> (text)
        }"""
    ),
    "parts_padded_to_most": _graph(
        """(string[N] text) => (string[N, M] parts, int64[N] counts) {
            parts, counts = StringSplit <delimiter = " "> (text)
        }"""
    ),
    # --- Random numbers
    "noise_added": _graph(
        "(float[N, 4] x) => (float[N, 4] y) { noise = RandomNormalLike(x) y = Add(x, noise) }"
    ),
    "dropout_in_training": _graph(
        """(float[N, 8] x) => (float[N, 8] y) <float ratio = {0.5}, bool training = {1}> {
            y, mask = Dropout(x, ratio, training)
        }"""
    ),
    "sampled_class": _graph(
        """(float[N, 4] x) => (int32[N, 1] y) {
            logits = Softmax(x)
            y = Multinomial <sample_size = 1> (logits)
        }"""
    ),
    "bernoulli": _graph("(float[N, 4] x) => (float[N, 4] y) { p = Sigmoid(x) y = Bernoulli(p) }"),
    # --- In a function, in a subgraph
    "mean_in_a_function": _graph(
        "(float[N, 4] x) => (float[N, 4] y) { y = local.center(x) }",
        functions="""<domain: "local", opset_import: ["" : 21]> center (a) => (b) {
            rows = Constant <value_ints = [0]> ()
            mean = ReduceMean <keepdims = 1> (a, rows)
            b = Sub(a, mean)
        }""",
    ),
    "softmax_in_a_branch": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <bool always = {1}> {
            y = If (always) <
                then_branch = over_rows () => (float[N, 4] a) { a = Softmax <axis = 0> (x) },
                else_branch = same () => (float[N, 4] b) { b = Identity(x) }>
        }"""
    ),
    "mean_in_a_loop": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <int64 trips = {3}, bool go = {1}, int64[1] rows = {0}> {
            y = Loop (trips, go, x) <body = step
                (int64 trip, bool going, float[N, 4] state) => (bool on, float[N, 4] next) {
                    on = Identity(going)
                    mean = ReduceMean <keepdims = 1> (state, rows)
                    next = Sub(state, mean)
                }>
        }"""
    ),
    "softmax_in_a_scan": _graph(
        """(float[N, 3, 4] x) => (float[N, 4] y) {
            times = Transpose <perm = [1, 0, 2]> (x)
            start = ReduceMax <axes = [1], keepdims = 0> (x)
            y, outs = Scan <num_scan_inputs = 1, body = step
                (float[N, 4] state, float[N, 4] row) => (float[N, 4] next, float[N, 4] out) {
                    scores = Softmax <axis = 0> (row)
                    next = Add(state, scores)
                    out = Identity(next)
                }> (start, times)
        }""",
        opset=13,
    ),
}
"""Models whose rows depend on each other, by what they do."""

_LAYER_NORM = """
    {y}_mean = ReduceMean <axes = [-1]> ({x})
    {y}_delta = Sub({x}, {y}_mean)
    {y}_square = Mul({y}_delta, {y}_delta)
    {y}_variance = ReduceMean <axes = [-1]> ({y}_square)
    {y}_sum = Add({y}_variance, epsilon)
    {y}_deviation = Sqrt({y}_sum)
    {y} = Div({y}_delta, {y}_deviation)
"""
"""LayerNormalization as exporters wrote it before opset 17, with `axes` as an attribute, before opset 18."""


def _texts(rng: np.random.Generator, count: int) -> dict[str, Any]:
    """Return ids and the mask of texts of different lengths, padded to twelve words."""
    lengths = rng.integers(1, 13, (count, 1))
    mask = np.arange(12) < lengths
    return {"ids": rng.integers(1, 20, (count, 12)) * mask, "mask": mask.astype(np.int64)}


def _pictures(name: str, *shape: int) -> MakeRows:
    """Return a maker of pictures from black to white, and of noise."""

    def make(rng: np.random.Generator, count: int) -> dict[str, Any]:
        scales = 10.0 ** rng.integers(-3, 3, (count, *(1 for _ in shape)))
        return {name: (rng.uniform(-1, 1, (count, *shape)) * scales).astype(np.float32)}

    return make


def _tree_ensemble() -> ModelProto:
    """Return a regressor of two trees, as skl2onnx writes a random forest."""
    node = helper.make_node(
        "TreeEnsembleRegressor",
        ["x"],
        ["y"],
        domain="ai.onnx.ml",
        n_targets=1,
        nodes_treeids=[0, 0, 0, 1, 1, 1],
        nodes_nodeids=[0, 1, 2, 0, 1, 2],
        nodes_featureids=[0, 0, 0, 2, 0, 0],
        nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"] * 2,
        nodes_values=[0.5, 0.0, 0.0, -0.25, 0.0, 0.0],
        nodes_truenodeids=[1, 0, 0, 1, 0, 0],
        nodes_falsenodeids=[2, 0, 0, 2, 0, 0],
        target_treeids=[0, 0, 1, 1],
        target_nodeids=[1, 2, 1, 2],
        target_ids=[0, 0, 0, 0],
        target_weights=[1.0, 2.0, 10.0, 20.0],
    )
    return _of_nodes([node], {"x": (TensorProto.FLOAT, 4)}, {"y": (TensorProto.FLOAT, 1)})


def _svm_pipeline() -> ModelProto:
    """Return a scaler and a linear classifier with labels of text, as skl2onnx writes a pipeline."""
    nodes = [
        helper.make_node(
            "Scaler",
            ["x"],
            ["scaled"],
            domain="ai.onnx.ml",
            offset=[1.0, 2.0, 3.0, 4.0],
            scale=[0.5, 0.25, 2.0, 1.0],
        ),
        helper.make_node(
            "LinearClassifier",
            ["scaled"],
            ["label", "scores"],
            domain="ai.onnx.ml",
            classlabels_strings=["no", "yes", "perhaps"],
            coefficients=[*_weight("coefficients", (12,)).tolist()],
            intercepts=[0.1, 0.2, 0.3],
            multi_class=1,
            post_transform="SOFTMAX",
        ),
        helper.make_node("Normalizer", ["scores"], ["probabilities"], domain="ai.onnx.ml", norm="L1"),
    ]
    outputs = {"label": (TensorProto.STRING,), "probabilities": (TensorProto.FLOAT, 3)}
    return _of_nodes(nodes, {"x": (TensorProto.FLOAT, 4)}, outputs)


def _label_encoder() -> ModelProto:
    """Return encodings of categories and of numbers beside each other."""
    nodes = [
        helper.make_node(
            "LabelEncoder",
            ["words"],
            ["codes"],
            domain="ai.onnx.ml",
            keys_strings=["a", "be", "batch of rows"],
            values_floats=[1.0, 2.0, 3.0],
            default_float=-1.0,
        ),
        helper.make_node(
            "Imputer",
            ["x"],
            ["known"],
            domain="ai.onnx.ml",
            imputed_value_floats=[0.5],
            replaced_value_float=float("nan"),
        ),
        helper.make_node("Concat", ["codes", "known"], ["joined"], axis=1),
        helper.make_node("Binarizer", ["joined"], ["y"], domain="ai.onnx.ml", threshold=0.75),
    ]
    inputs = {"words": (TensorProto.STRING, 2), "x": (TensorProto.FLOAT, 2)}
    return _of_nodes(nodes, inputs, {"y": (TensorProto.FLOAT, 4)})


Tensors = Mapping[str, tuple[int, ...]]


def _of_nodes(nodes: Sequence[NodeProto], inputs: Tensors, outputs: Tensors) -> ModelProto:
    """Return a model of tensors by name: their type, and their dimensions after the batch's."""
    graph = helper.make_graph(nodes, "graph", _describe(inputs), _describe(outputs))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def _describe(tensors: Tensors) -> list[ValueInfoProto]:
    return [
        helper.make_tensor_value_info(name, element, ["N", *shape])
        for name, (element, *shape) in tensors.items()
    ]


INDEPENDENT: dict[str, Case] = {
    # --- Transformers
    "bert": _graph(
        f"""(int64[N, T] ids, int64[N, T] mask) => (float[N, T, 8] hidden, float[N, 8] pooled)
            <{_HEADS}, float least = {{-10000}}, float epsilon = {{0.00001}}> {{
            shape = Shape(ids)
            length = Gather <axis = 0> (shape, i1)
            length1 = Unsqueeze(length, axes0)
            positions = Slice(table, axes0, length1, axes0)
            places = Gather(Wpos, positions)
            words = Gather(Wword, ids)
            embedded = Add(words, places)
            {_LAYER_NORM.format(x="embedded", y="x")}
            wide = Unsqueeze(mask, axes12)
            floats = Cast <to = 1> (wide)
            opposite = Sub(one, floats)
            bias = Mul(opposite, least)
            {_heads("x", "hidden", "bias")}
            first = Gather <axis = 1> (hidden, i0)
            dense = MatMul(first, Wpool)
            pooled = Tanh(dense)
        }}""",
        opset=17,
        make_rows=_texts,
        arrays={"table": np.arange(16)},
        weights={"Wword": (20, 8), "Wpos": (16, 8), "Wpool": (8, 8), **_HEAD_WEIGHTS},
    ),
    "sentence_embedding_of_masked_mean": _graph(
        f"""(int64[N, T] ids, int64[N, T] mask) => (float[N, 8] y)
            <{_HEADS}, float least = {{0.000000001}}, int64[1] last = {{-1}}> {{
            x = Gather(Wword, ids)
            {_heads("x", "hidden")}
            column = Unsqueeze(mask, last)
            wide = Cast <to = 1> (column)
            shape = Shape(hidden)
            expanded = Expand(wide, shape)
            masked = Mul(hidden, expanded)
            sum = ReduceSum <keepdims = 0> (masked, axes1)
            count = ReduceSum <keepdims = 0> (expanded, axes1)
            divisor = Max(count, least)
            mean = Div(sum, divisor)
            norm = ReduceL2 <axes = [1], keepdims = 1> (mean)
            y = Div(mean, norm)
        }}""",
        opset=17,
        make_rows=_texts,
        weights={"Wword": (20, 8), **_HEAD_WEIGHTS},
    ),
    "vision_transformer": _graph(
        f"""(float[N, 3, 8, 8] picture) => (float[N, 5] y)
            <{_HEADS}, int64[1] minus = {{-1}}, int64[1] one1 = {{1}}> {{
            patches = Conv <kernel_shape = [4, 4], strides = [4, 4]> (picture, Wpatch)
            shape = Shape(patches)
            rows = Gather <axis = 0> (shape, i0)
            rows1 = Unsqueeze(rows, axes0)
            flat = Concat <axis = 0> (rows1, eight, minus)
            columns = Reshape(patches, flat)
            words = Transpose <perm = [0, 2, 1]> (columns)
            size = Concat <axis = 0> (rows1, minus, minus)
            ones = ConstantOfShape <value = int64[1] {{1}}> (three)
            wanted = Mul(ones, size)
            is_open = Equal(size, opened)
            target = Where(is_open, ones, size)
            token = Expand(Wclass, target)
            joined = Concat <axis = 1> (token, words)
            x = Add(joined, Wpos)
            {_heads("x", "hidden")}
            first = Gather <axis = 1> (hidden, i0)
            y = Gemm <transB = 1> (first, Whead)
        }}""",
        arrays={"three": np.array([3]), "opened": np.array([-1])},
        make_rows=_pictures("picture", 3, 8, 8),
        weights={
            "Wpatch": (8, 3, 4, 4),
            "Wclass": (1, 1, 8),
            "Wpos": (1, 5, 8),
            "Whead": (5, 8),
            **_HEAD_WEIGHTS,
        },
    ),
    "clip_text_at_end_of_text": _graph(
        f"""(int64[N, T] ids) => (float[N, 8] y) <{_HEADS}, int64[1] last = {{-1}}> {{
            x = Gather(Wword, ids)
            {_heads("x", "hidden")}
            shape = Shape(hidden)
            rows = Gather <axis = 0> (shape, i0)
            positions = Range(i0, rows, i1)
            ends = ArgMax <axis = -1, keepdims = 0> (ids)
            left = Unsqueeze(positions, last)
            right = Unsqueeze(ends, last)
            index = Concat <axis = -1> (left, right)
            y = GatherND(hidden, index)
        }}""",
        make_rows=lambda rng, count: {"ids": rng.integers(0, 20, (count, 7))},
        weights={"Wword": (20, 8), **_HEAD_WEIGHTS},
    ),
    "causal_decoder": _graph(
        f"""(int64[N, T] ids) => (float[N, T, 20] y) <{_HEADS}, float least = {{-10000}}> {{
            x = Gather(Wword, ids)
            size = Shape(ids)
            length = Gather <axis = 0> (size, i1)
            length1 = Unsqueeze(length, axes0)
            square = Concat <axis = 0> (length1, length1)
            full = ConstantOfShape <value = float[1] {{-10000}}> (square)
            above = Trilu <upper = 1> (full, i1)
            bias = Unsqueeze(above, axes01)
            {_heads("x", "hidden", "bias")}
            y = MatMul(hidden, Wvocabulary)
        }}""",
        arrays={"axes01": np.array([0, 1])},
        make_rows=lambda rng, count: {"ids": rng.integers(0, 20, (count, 7))},
        weights={"Wword": (20, 8), "Wvocabulary": (8, 20), **_HEAD_WEIGHTS},
    ),
    "relative_position_buckets": _graph(
        f"""(float[N, T, 8] x) => (float[N, T, 8] y) <{_HEADS}, int64 most = {{3}}, int64 least = {{-3}}> {{
            shape = Shape(x)
            length = Gather <axis = 0> (shape, i1)
            positions = Range(i0, length, i1)
            rows = Unsqueeze(positions, axes1)
            columns = Unsqueeze(positions, axes0)
            distance = Sub(columns, rows)
            near = Clip(distance, least, most)
            bucket = Add(near, most)
            values = Gather(Wbias, bucket)
            moved = Transpose <perm = [2, 0, 1]> (values)
            bias = Unsqueeze(moved, axes0)
            {_heads("x", "y", "bias")}
        }}""",
        weights={"Wbias": (7, 2), **_HEAD_WEIGHTS},
    ),
    "swin_windows": _graph(
        f"""(float[N, 4, 4, 8] picture) => (float[N, 4, 4, 8] y)
            <{_HEADS}, int64[6] split = {{-1, 2, 2, 2, 2, 8}},
            int64[3] windows = {{-1, 4, 8}}, int64[1] minus = {{-1}}> {{
            parts = Reshape(picture, split)
            moved = Transpose <perm = [0, 1, 3, 2, 4, 5]> (parts)
            x = Reshape(moved, windows)
            {_heads("x", "hidden")}
            shape = Shape(picture)
            rows = Gather <axis = 0> (shape, i0)
            rows1 = Unsqueeze(rows, axes0)
            tail = Concat <axis = 0> (rows1, two, two, two, two, eight)
            grouped = Reshape(hidden, tail)
            back = Transpose <perm = [0, 1, 3, 2, 4, 5]> (grouped)
            y = Reshape(back, shape)
        }}""",
        make_rows=_pictures("picture", 4, 4, 8),
        weights={**_HEAD_WEIGHTS},
    ),
    "shifted_windows": _graph(
        f"""(float[N, 4, 8] x0) => (float[N, 4, 8] y) <{_HEADS}, int64[1] end = {{9223372036854775807}},
            int64[1] minus = {{-1}}, int64[4] split = {{-1, 2, 2, 8}}, int64[3] windows = {{-1, 2, 8}}> {{
            left = Slice(x0, axes1, end, axes1)
            right = Slice(x0, axes0, axes1, axes1)
            rolled = Concat <axis = 1> (left, right)
            parts = Reshape(rolled, split)
            x = Reshape(parts, windows)
            {_heads("x", "hidden")}
            whole = Reshape(hidden, like)
            tail = Slice(whole, minus, end, axes1)
            head = Slice(whole, axes0, minus, axes1)
            y = Concat <axis = 1> (tail, head)
        }}""",
        arrays={"like": np.array([-1, 4, 8])},
        weights={**_HEAD_WEIGHTS},
    ),
    "attention_of_opset_23": _graph(
        """(float[N, T, 8] x) => (float[N, T, 8] y) {
            normal = RMSNormalization <axis = -1> (x, scale)
            q = MatMul(normal, Wq)
            k = MatMul(normal, Wk)
            v = MatMul(normal, Wv)
            y = Attention <q_num_heads = 2, kv_num_heads = 2, is_causal = 1> (q, k, v)
        }""",
        opset=23,
        arrays={"scale": np.ones(8, np.float32)},
        weights={"Wq": (8, 8), "Wk": (8, 8), "Wv": (8, 8)},
    ),
    "attention_of_onnx_runtime": _graph(
        """(float[N, T, 8] x, int32[N, T] mask) => (float[N, T, 8] y) {
            mixed = com.microsoft.Attention <num_heads = 2> (x, Wqkv, bias, mask)
            y, mean, deviation, sum = com.microsoft.SkipLayerNormalization(mixed, x, scale)
        }""",
        arrays={"scale": np.ones(8, np.float32)},
        weights={"Wqkv": (8, 24), "bias": (24,)},
        make_rows=lambda rng, count: {
            "x": rng.uniform(-1, 1, (count, 6, 8)).astype(np.float32),
            "mask": (np.arange(6) < rng.integers(1, 7, (count, 1))).astype(np.int32),
        },
    ),
    # --- Recurrent networks
    "lstm_with_lengths": _graph(
        """(float[N, T, 4] x, int32[N] lengths) => (float[N, T, 8] all, float[N, 8] last)
            <int64 i0 = {0}, int64[1] axes0 = {0}, int64[1] axes1 = {1}, int64[1] one = {1},
            int64[1] eight = {8}> {
            shape = Shape(x)
            rows = Gather <axis = 0> (shape, i0)
            rows1 = Unsqueeze(rows, axes0)
            size = Concat <axis = 0> (one, rows1, eight)
            hidden = ConstantOfShape <value = float[1] {0}> (size)
            cell = ConstantOfShape <value = float[1] {0}> (size)
            times = Transpose <perm = [1, 0, 2]> (x)
            steps, state, end = LSTM <hidden_size = 8> (times, W, R, , lengths, hidden, cell)
            flat = Squeeze(steps, axes1)
            all = Transpose <perm = [1, 0, 2]> (flat)
            last = Squeeze(state, axes0)
        }""",
        make_rows=_lengths(6, ("x", (6, 4)), dtype=np.int32),
        weights={"W": (1, 32, 4), "R": (1, 32, 8)},
    ),
    "gru_of_two_directions": _graph(
        """(float[N, T, 4] x) => (float[N, T, 16] y) <int64[3] flat = {0, 0, -1}> {
            times = Transpose <perm = [1, 0, 2]> (x)
            steps, state = GRU
                <hidden_size = 8, direction = "bidirectional", linear_before_reset = 1> (times, W, R, B)
            rows = Transpose <perm = [2, 0, 1, 3]> (steps)
            y = Reshape(rows, flat)
        }""",
        weights={"W": (2, 24, 4), "R": (2, 24, 8), "B": (2, 48)},
    ),
    "rnn_in_reverse": _graph(
        """(float[N, T, 4] x) => (float[N, T, 8] y) <int64[1] one = {1}> {
            times = Transpose <perm = [1, 0, 2]> (x)
            steps, state = RNN <hidden_size = 8, direction = "reverse"> (times, W, R)
            flat = Squeeze(steps, one)
            y = Transpose <perm = [1, 0, 2]> (flat)
        }""",
        weights={"W": (1, 8, 4), "R": (1, 8, 8)},
    ),
    "crnn": _graph(
        """(float[N, 1, 8, W] picture) => (float[N, S, 6] y)
            <int64[1] two = {2}, int64[1] one = {1}, int64[3] flat = {0, 0, -1}> {
            features = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (picture, Wconv)
            active = Relu(features)
            pooled = MaxPool <kernel_shape = [8, 2], strides = [8, 2]> (active)
            row = Squeeze(pooled, two)
            times = Transpose <perm = [2, 0, 1]> (row)
            steps, hidden, cell = LSTM <hidden_size = 8, direction = "bidirectional"> (times, Wrnn, R)
            rows = Transpose <perm = [2, 0, 1, 3]> (steps)
            joined = Reshape(rows, flat)
            logits = MatMul(joined, Whead)
            y = Softmax <axis = 2> (logits)
        }""",
        weights={"Wconv": (4, 1, 3, 3), "Wrnn": (2, 32, 4), "R": (2, 32, 8), "Whead": (16, 6)},
        make_rows=_pictures("picture", 1, 8, 16),
    ),
    "scan_over_time": _graph(
        """(float[N, 5, 4] x) => (float[N, 5, 4] y) <float zero = {0}, int64[1] one = {1}> {
            times = Transpose <perm = [1, 0, 2]> (x)
            first = ReduceMax <keepdims = 0> (x, one)
            start = Mul(first, zero)
            final, steps = Scan <num_scan_inputs = 1, body = step
                (float[N, 4] state, float[N, 4] word) => (float[N, 4] next, float[N, 4] out) {
                    mixed = MatMul(state, w)
                    sum = Add(mixed, word)
                    next = Tanh(sum)
                    out = Identity(next)
                }> (start, times)
            y = Transpose <perm = [1, 0, 2]> (steps)
        }""",
        weights={"w": (4, 4)},
    ),
    "loop_over_time": _graph(
        """(float[N, T, 4] x) => (float[N, T, 4] y)
            <int64 i0 = {0}, int64 i1 = {1}, bool go = {1}, int64[1] axes0 = {0}, int64[1] four = {4}> {
            shape = Shape(x)
            length = Gather <axis = 0> (shape, i1)
            rows = Gather <axis = 0> (shape, i0)
            rows1 = Unsqueeze(rows, axes0)
            size = Concat <axis = 0> (rows1, four)
            start = ConstantOfShape <value = float[1] {0}> (size)
            final, steps = Loop (length, go, start) <body = step
                (int64 trip, bool going, float[N, 4] state) => (bool on, float[N, 4] next, float[N, 4] out) {
                    on = Identity(going)
                    word = Gather <axis = 1> (x, trip)
                    mixed = MatMul(state, w)
                    sum = Add(mixed, word)
                    next = Tanh(sum)
                    out = Identity(next)
                }>
            y = Transpose <perm = [1, 0, 2]> (steps)
        }""",
        weights={"w": (4, 4)},
    ),
    "greedy_decoder_of_fixed_length": _graph(
        """(int64[N] first) => (int64[N, 5] y) <int64 trips = {5}, bool go = {1}> {
            final, steps = Loop (trips, go, first) <body = step
                (int64 trip, bool going, int64[N] ids) => (bool on, int64[N] next, int64[N] out) {
                    on = Identity(going)
                    words = Gather(Wword, ids)
                    logits = MatMul(words, Wvocabulary)
                    next = ArgMax <axis = 1, keepdims = 0> (logits)
                    out = Identity(next)
                }>
            y = Transpose <perm = [1, 0]> (steps)
        }""",
        make_rows=lambda rng, count: {"first": rng.integers(0, 20, count)},
        weights={"Wword": (20, 8), "Wvocabulary": (8, 20)},
    ),
    # --- Pictures
    "static_int8_network": _graph(
        """(float[N, 3, 8, 8] picture) => (float[N, 5] y)
            <float in = {0.02}, float out = {0.05}, float step = {0.01}, uint8 point = {128},
            int8 zero = {0}> {
            q = QuantizeLinear(picture, in, point)
            x = DequantizeLinear(q, in, point)
            w = DequantizeLinear(Wq, step, zero)
            features = Conv <kernel_shape = [3, 3]> (x, w)
            active = Relu(features)
            q1 = QuantizeLinear(active, out, point)
            x1 = DequantizeLinear(q1, out, point)
            pooled = GlobalAveragePool(x1)
            q2 = QuantizeLinear(pooled, out, point)
            x2 = DequantizeLinear(q2, out, point)
            flat = Flatten(x2)
            v = DequantizeLinear(Vq, step, zero)
            y = MatMul(flat, v)
        }""",
        make_rows=_pictures("picture", 3, 8, 8),
        arrays={
            "Wq": np.random.default_rng(0).integers(-127, 128, (4, 3, 3, 3), np.int8),
            "Vq": np.random.default_rng(1).integers(-127, 128, (4, 5), np.int8),
        },
    ),
    "static_int8_operators": _graph(
        """(float[N, 4] x) => (float[N, 3] y)
            <float in = {0.02}, float out = {0.05}, float step = {0.01}, uint8 point = {128},
            int8 zero = {0}> {
            q = QuantizeLinear(x, in, point)
            product = QLinearMatMul(q, in, point, Wq, step, zero, out, point)
            y = DequantizeLinear(product, out, point)
        }""",
        arrays={"Wq": np.random.default_rng(0).integers(-127, 128, (4, 3), np.int8)},
    ),
    "u_net": _graph(
        """(float[N, 2, H, W] picture) => (float[N, 2, H, W] y) <int64[1] two = {2}, int64[1] four = {4},
            int64[1] zero = {0}, int64[1] one = {1}> {
            skip = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (picture, Wdown)
            small = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (skip)
            deep = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (small, Wdeep)
            shape = Shape(skip)
            sides = Slice(shape, two, four, zero)
            current = Shape(deep)
            head = Slice(current, zero, two, zero)
            size = Concat <axis = 0> (head, sides)
            large = Resize <mode = "linear", coordinate_transformation_mode = "half_pixel"> (deep, , , size)
            both = Concat <axis = 1> (skip, large)
            y = Conv <kernel_shape = [1, 1]> (both, Wup)
        }""",
        weights={"Wdown": (4, 2, 3, 3), "Wdeep": (4, 4, 3, 3), "Wup": (2, 8, 1, 1)},
        make_rows=_pictures("picture", 2, 8, 12),
    ),
    "ssd_heads": _graph(
        """(float[N, 4, 4, 4] features) => (float[N, B, 4] boxes, float[N, B, 3] scores)
            <int64 i0 = {0}, int64[1] axes0 = {0}, int64[1] minus = {-1}, int64[1] four = {4},
            int64[1] three = {3}> {
            small = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (features)
            b1 = Conv <kernel_shape = [1, 1]> (features, Wbox)
            b2 = Conv <kernel_shape = [1, 1]> (small, Wbox)
            c1 = Conv <kernel_shape = [1, 1]> (features, Wclass)
            c2 = Conv <kernel_shape = [1, 1]> (small, Wclass)
            shape = Shape(features)
            rows = Gather <axis = 0> (shape, i0)
            rows1 = Unsqueeze(rows, axes0)
            as_boxes = Concat <axis = 0> (rows1, minus, four)
            as_scores = Concat <axis = 0> (rows1, minus, three)
            b3 = Transpose <perm = [0, 2, 3, 1]> (b1)
            b4 = Transpose <perm = [0, 2, 3, 1]> (b2)
            c3 = Transpose <perm = [0, 2, 3, 1]> (c1)
            c4 = Transpose <perm = [0, 2, 3, 1]> (c2)
            b5 = Reshape(b3, as_boxes)
            b6 = Reshape(b4, as_boxes)
            c5 = Reshape(c3, as_scores)
            c6 = Reshape(c4, as_scores)
            boxes = Concat <axis = 1> (b5, b6)
            logits = Concat <axis = 1> (c5, c6)
            scores = Softmax <axis = 2> (logits)
        }""",
        weights={"Wbox": (8, 4, 1, 1), "Wclass": (6, 4, 1, 1)},
        make_rows=_pictures("features", 4, 4, 4),
    ),
    "yolo_head": _graph(
        """(float[N, 4, 2, 3] features) => (float[N, 18, 7] y) <int64 i0 = {0}, int64[1] axes0 = {0},
            int64[1] three = {3}, int64[1] seven = {7}, int64[1] two = {2}, int64[1] minus = {-1},
            int64[3] parts = {2, 2, 3}, float scale = {2}, float half = {0.5}> {
            maps = Conv <kernel_shape = [1, 1]> (features, Whead)
            shape = Shape(maps)
            rows = Gather <axis = 0> (shape, i0)
            rows1 = Unsqueeze(rows, axes0)
            size = Concat <axis = 0> (rows1, three, seven, two, three)
            split = Reshape(maps, size)
            moved = Transpose <perm = [0, 1, 3, 4, 2]> (split)
            active = Sigmoid(moved)
            xy, wh, rest = Split <axis = 4> (active, parts)
            xy2 = Mul(xy, scale)
            xy3 = Add(xy2, grid)
            wh2 = Mul(wh, scale)
            wh3 = Mul(wh2, wh2)
            wh4 = Mul(wh3, anchors)
            joined = Concat <axis = 4> (xy3, wh4, rest)
            flat = Concat <axis = 0> (rows1, minus, seven)
            y = Reshape(joined, flat)
        }""",
        weights={"Whead": (21, 4, 1, 1), "grid": (1, 3, 2, 3, 2), "anchors": (1, 3, 1, 1, 2)},
        make_rows=_pictures("features", 4, 2, 3),
    ),
    "group_normalization_by_reshape": _graph(
        """(float[N, 4, H, W] x) => (float[N, 4, H, W] y)
            <int64[3] groups = {0, 2, -1}, float[2] one = {1, 1}, float[2] zero = {0, 0}> {
            shape = Shape(x)
            grouped = Reshape(x, groups)
            normal = InstanceNormalization(grouped, one, zero)
            whole = Reshape(normal, shape)
            scaled = Mul(whole, scale)
            y = Add(scaled, bias)
        }""",
        weights={"scale": (4, 1, 1), "bias": (4, 1, 1)},
        make_rows=_pictures("x", 4, 4, 4),
    ),
    "pixel_shuffle": _graph(
        """(float[N, 8, H, W] x) => (float[N, 2, H2, W2] y) <int64 i0 = {0}, int64 i2 = {2}, int64 i3 = {3},
            int64[1] axes0 = {0}, int64[1] two = {2}, int64 double = {2}> {
            shape = Shape(x)
            rows = Gather <axis = 0> (shape, i0)
            height = Gather <axis = 0> (shape, i2)
            width = Gather <axis = 0> (shape, i3)
            rows1 = Unsqueeze(rows, axes0)
            height1 = Unsqueeze(height, axes0)
            width1 = Unsqueeze(width, axes0)
            split = Concat <axis = 0> (rows1, two, two, two, height1, width1)
            parts = Reshape(x, split)
            moved = Transpose <perm = [0, 1, 4, 2, 5, 3]> (parts)
            height2 = Mul(height1, double)
            width2 = Mul(width1, double)
            whole = Concat <axis = 0> (rows1, two, height2, width2)
            y = Reshape(moved, whole)
        }""",
        make_rows=_pictures("x", 8, 3, 5),
    ),
    "depth_to_space_and_back": _graph(
        """(float[N, 8, H, W] x) => (float[N, 8, H, W] y) {
            large = DepthToSpace <blocksize = 2, mode = "CRD"> (x)
            mixed = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (large, w)
            y = SpaceToDepth <blocksize = 2> (mixed)
        }""",
        weights={"w": (2, 2, 3, 3)},
        make_rows=_pictures("x", 8, 3, 5),
    ),
    "depthwise_convolutions": _graph(
        """(float[N, 4, H, W] x) => (float[N, 4, H, W] y) {
            deep = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 4> (x, Wdeep)
            normal = BatchNormalization(deep, scale, bias, mean, variance)
            hard = HardSwish(normal)
            pooled = GlobalAveragePool(hard)
            squeezed = Conv <kernel_shape = [1, 1]> (pooled, Wsqueeze)
            gate = HardSigmoid(squeezed)
            gated = Mul(hard, gate)
            y = Conv <kernel_shape = [1, 1]> (gated, Wpoint)
        }""",
        arrays={"variance": np.ones(4, np.float32)},
        weights={
            "scale": (4,),
            "bias": (4,),
            "mean": (4,),
            "Wdeep": (4, 1, 3, 3),
            "Wsqueeze": (4, 4, 1, 1),
            "Wpoint": (4, 4, 1, 1),
        },
        make_rows=_pictures("x", 4, 5, 5),
    ),
    "channel_shuffle": _graph(
        """(float[N, 4, 3, 5] x) => (float[N, 4, 3, 5] y)
            <int64[5] split = {-1, 2, 2, 3, 5}, int64[4] whole = {-1, 4, 3, 5}> {
            left, right = Split <axis = 1, num_outputs = 2> (x)
            mixed = Conv <kernel_shape = [1, 1]> (right, w)
            joined = Concat <axis = 1> (left, mixed)
            parts = Reshape(joined, split)
            moved = Transpose <perm = [0, 2, 1, 3, 4]> (parts)
            y = Reshape(moved, whole)
        }""",
        weights={"w": (2, 2, 1, 1)},
        make_rows=_pictures("x", 4, 3, 5),
    ),
    "upsampled_twice": _graph(
        """(float[N, 2, H, W] x) => (float[N, 2, H2, W2] y) <float[4] scales = {1, 1, 2, 2}> {
            large = Resize
                <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">
                (x, , scales)
            y = ConvTranspose <kernel_shape = [2, 2], strides = [2, 2]> (large, w)
        }""",
        weights={"w": (2, 2, 2, 2)},
        make_rows=_pictures("x", 2, 4, 4),
    ),
    "spatial_transformer": _graph(
        """(float[N, 2, 6, 6] x) => (float[N, 2, 6, 6] y)
            <int64[3] affine = {-1, 2, 3}, int64[1] sides = {2}, int64[1] end = {4}, int64[1] zero = {0}> {
            pooled = GlobalAveragePool(x)
            flat = Flatten(pooled)
            angles = MatMul(flat, Wangle)
            near = Tanh(angles)
            theta = Reshape(near, affine)
            size = Shape(x)
            grid = AffineGrid(theta, size)
            y = GridSample <mode = "linear"> (x, grid)
        }""",
        weights={"Wangle": (2, 6)},
        make_rows=_pictures("x", 2, 6, 6),
    ),
    "test_time_augmentation": _graph(
        """(float[N, 3, 4, 4] picture) => (float[N, 5] y) <int64[1] minus = {-1}, int64[1] three = {3},
            int64[1] lowest = {-9223372036854775807}, int64[1] zero = {0}, int64[3] pairs = {2, -1, 5}> {
            mirrored = Slice(picture, minus, lowest, three, minus)
            both = Concat <axis = 0> (picture, mirrored)
            features = Conv <kernel_shape = [4, 4]> (both, Wconv)
            flat = Flatten(features)
            logits = MatMul(flat, Whead)
            scores = Softmax <axis = 1> (logits)
            grouped = Reshape(scores, pairs)
            y = ReduceMean <keepdims = 0> (grouped, zero)
        }""",
        weights={"Wconv": (4, 3, 4, 4), "Whead": (4, 5)},
        make_rows=_pictures("picture", 3, 4, 4),
    ),
    "frames_of_a_video": _graph(
        """(float[N, T, 3, 4, 4] video) => (float[N, 5] y)
            <int64[4] frames = {-1, 3, 4, 4}, int64 i0 = {0}, int64 i1 = {1}, int64[1] axes0 = {0},
            int64[1] five = {5}, int64[1] axes1 = {1}> {
            flat = Reshape(video, frames)
            features = Conv <kernel_shape = [4, 4]> (flat, Wconv)
            shape = Shape(video)
            rows = Gather(shape, i0)
            length = Gather(shape, i1)
            rows1 = Unsqueeze(rows, axes0)
            length1 = Unsqueeze(length, axes0)
            size = Concat <axis = 0> (rows1, length1, five)
            words = Reshape(features, size)
            y = ReduceMax <keepdims = 0> (words, axes1)
        }""",
        weights={"Wconv": (5, 3, 4, 4)},
        make_rows=_pictures("video", 3, 3, 4, 4),
    ),
    "log_mel_floor_of_the_row": _graph(
        """(float[N, 8, 5] power) => (float[N, 8, 5] y)
            <float least = {0.0000000001}, float range = {8}, float four = {4}, int64[2] axes = {1, 2}> {
            clipped = Max(power, least)
            natural = Log(clipped)
            loudest = ReduceMax <keepdims = 1> (natural, axes)
            floor = Sub(loudest, range)
            floored = Max(natural, floor)
            raised = Add(floored, four)
            y = Div(raised, four)
        }"""
    ),
    "over_brightest_of_the_row": _graph(
        """(uint8[N, 4, 4] pixels) => (float[N, 4, 4] y) <float one = {1}, int64[2] axes = {-1, -2}> {
            floats = Cast <to = 1> (pixels)
            brightest = ReduceMax <keepdims = 1> (floats, axes)
            divisor = Max(brightest, one)
            y = Div(floats, divisor)
        }"""
    ),
    "spectrum": _graph(
        """(float[N, 32] samples) => (float[N, F, 9] y)
            <int64 step = {8}, int64 length = {16}, int64[1] last = {-1}> {
            parts = STFT(samples, step, window, length)
            square = Mul(parts, parts)
            y = ReduceSum <keepdims = 0> (square, last)
        }""",
        arrays={"window": np.hanning(16).astype(np.float32)},
    ),
    # --- Lengths, labels, choices of a row
    "mean_of_a_text_by_length": _graph(
        """(float[N, 6, 4] x, int64[N] lengths) => (float[N, 4] y) <int64 zero = {0}, int64 one = {1},
            int64 i1 = {1}, int64[1] axes1 = {1}, int64[1] last = {-1}> {
            shape = Shape(x)
            length = Gather(shape, i1)
            positions = Range(zero, length, one)
            column = Unsqueeze(lengths, axes1)
            mask = Less(positions, column)
            floats = Cast <to = 1> (mask)
            wide = Unsqueeze(floats, last)
            masked = Mul(x, wide)
            sum = ReduceSum <keepdims = 0> (masked, axes1)
            count = ReduceSum <keepdims = 1> (floats, axes1)
            y = Div(sum, count)
        }""",
        make_rows=_lengths(6, ("x", (6, 4))),
    ),
    "last_word_by_length": _graph(
        """(float[N, 6, 4] x, int64[N] lengths) => (float[N, 4] y)
            <int64 one = {1}, int64[2] axes12 = {1, 2}, int64[1] axes1 = {1}, int64[1] four = {4},
            int64[1] zero = {0}, int64[1] unit = {1}> {
            index = Sub(lengths, one)
            wide = Unsqueeze(index, axes12)
            rows = Shape(lengths)
            size = Concat <axis = 0> (rows, unit, four)
            expanded = Expand(wide, size)
            word = GatherElements <axis = 1> (x, expanded)
            y = Squeeze(word, axes1)
        }""",
        make_rows=_lengths(6, ("x", (6, 4))),
    ),
    "reverse_sequence_of_the_row": _graph(
        "(float[N, 6, 4] x, int64[N] lengths) => (float[N, 6, 4] y)"
        " { y = ReverseSequence <batch_axis = 0, time_axis = 1> (x, lengths) }",
        make_rows=_lengths(6, ("x", (6, 4))),
    ),
    "one_hot_embedding": _graph(
        """(int64[N, T] ids) => (float[N, T, 4] y) <int64 depth = {20}, float[2] values = {0, 1}> {
            hot = OneHot <axis = -1> (ids, depth, values)
            y = MatMul(hot, Wword)
        }""",
        weights={"Wword": (20, 4)},
    ),
    "best_of_the_row": _graph(
        """(float[N, 6] x) => (float[N, 3] best, int64[N, 3] index, float[N, 3] again)
            <int64[1] three = {3}> {
            best, index = TopK <axis = 1> (x, three)
            again = GatherElements <axis = 1> (x, index)
        }"""
    ),
    "gathered_by_batch": _graph(
        """(float[N, 6, 4] x, int64[N, 2, 1] index) => (float[N, 2, 4] y) {
            y = GatherND <batch_dims = 1> (x, index)
        }""",
        make_rows=lambda rng, count: {
            "x": rng.uniform(-1, 1, (count, 6, 4)).astype(np.float32),
            "index": rng.integers(0, 6, (count, 2, 1)),
        },
    ),
    "scattered_into_own_row": _graph(
        """(float[N, 4] x, int64[N] column) => (float[N, 4] y)
            <int64 zero = {0}, int64 one = {1}, int64[1] last = {-1}> {
            rows = Shape(column)
            count = Squeeze(rows)
            positions = Range(zero, count, one)
            left = Unsqueeze(positions, last)
            right = Unsqueeze(column, last)
            index = Concat <axis = -1> (left, right)
            marks = ConstantOfShape <value = float[1] {7}> (rows)
            y = ScatterND(x, index, marks)
        }""",
        make_rows=lambda rng, count: {
            "x": rng.uniform(-1, 1, (count, 4)).astype(np.float32),
            "column": rng.integers(0, 4, count),
        },
    ),
    "cumulative_sum_of_the_row": _graph(
        "(float[N, 6] x) => (float[N, 6] y) <int64 axis = {1}> { y = CumSum(x, axis) }"
    ),
    "distances_to_neighbours": _graph(
        """(float[N, 4] x) => (int64[N] label, float[N, 3] near)
            <int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3}> {
            wide = Unsqueeze(x, one)
            difference = Sub(wide, neighbours)
            square = Mul(difference, difference)
            sum = ReduceSum <keepdims = 0> (square, two)
            distance = Sqrt(sum)
            near, index = TopK <axis = 1, largest = 0> (distance, three)
            votes = Gather(classes, index)
            hot = OneHot <axis = -1> (votes, depth, values)
            counts = ReduceSum <keepdims = 0> (hot, one)
            label = ArgMax <axis = 1, keepdims = 0> (counts)
        }""",
        weights={"neighbours": (1, 7, 4)},
        arrays={
            "classes": np.array([0, 1, 2, 0, 1, 2, 1]),
            "depth": np.array(3),
            "values": np.array([0, 1], np.float32),
        },
    ),
    "texts_joined": _graph(
        """(string[N, 2] text) => (string[N, 2] joined, bool[N, 2] known) {
            joined = StringConcat(text, suffix)
            known = RegexFullMatch <pattern = "[a-z ]+"> (text)
        }""",
        arrays={"suffix": np.array("!", np.object_)},
    ),
    "random_forest": Case(_tree_ensemble),
    "scaler_and_classifier": Case(_svm_pipeline),
    "encoders_of_columns": Case(_label_encoder),
    "softmax_of_opset_11": _graph(
        "(float[N, 4] x) => (float[N, 4] y) { y = Softmax <axis = 1> (x) }", opset=11
    ),
    "four_bit_weights": _graph(
        """(float[N, 32] x) => (float[N, 4] y) {
            y = com.microsoft.MatMulNBits <K = 32, N = 4, bits = 4, block_size = 16> (x, Wq, step)
        }""",
        arrays={
            "Wq": np.random.default_rng(0).integers(0, 256, (4, 2, 8), np.uint8),
            "step": np.full((8,), 0.1, np.float32),
        },
    ),
    # --- Axes, branches, sequences
    "batch_in_the_middle": _graph(
        """(float[N, 5, 4] x) => (float[N, 5, 4] y) <int64[1] axes1 = {1}> {
            times = Transpose <perm = [1, 0, 2]> (x)
            mean = ReduceMean <keepdims = 1> (x, axes1)
            middle = Transpose <perm = [1, 0, 2]> (mean)
            centered = Sub(times, middle)
            scores = Softmax <axis = 0> (centered)
            y = Transpose <perm = [1, 0, 2]> (scores)
        }"""
    ),
    "rows_as_second_axis": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <int64[1] zero = {0}> {
            wide = Unsqueeze(x, zero)
            product = MatMul(wide, w)
            y = Squeeze(product, zero)
        }""",
        weights={"w": (1, 4, 4)},
    ),
    "einsum_of_the_row": _graph(
        '(float[N, 3, 4] x) => (float[N, 3, 3] y) { y = Einsum <equation = "nij,nkj->nik"> (x, x) }'
    ),
    "branch_on_a_constant": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <bool training = {0}> {
            y = If (training) <
                then_branch = over_rows () => (float[N, 4] a) { a = Softmax <axis = 0> (x) },
                else_branch = same () => (float[N, 4] b) { b = Identity(x) }>
        }"""
    ),
    "squeezed_if_one_channel": _graph(
        """(float[N, 1, 4] x) => (float[N, 4] y) <int64 i1 = {1}, int64[1] axes1 = {1}> {
            shape = Shape(x)
            channels = Gather(shape, i1)
            single = Equal(channels, i1)
            y = If (single) <
                then_branch = squeezed () => (float[N, 4] a) { a = Squeeze(x, axes1) },
                else_branch = same () => (float[N, 1, 4] b) { b = Identity(x) }>
        }"""
    ),
    "branches_of_the_same_rows": _graph(
        """(float[N, T, 4] x) => (float[N, 4] y) <int64 i1 = {1}, int64 four = {4}, int64[1] axes1 = {1}> {
            shape = Shape(x)
            length = Gather(shape, i1)
            long = Greater(length, four)
            y = If (long) <
                then_branch = largest () => (float[N, 4] a) { a = ReduceMax <keepdims = 0> (x, axes1) },
                else_branch = mean () => (float[N, 4] b) { b = ReduceMean <keepdims = 0> (x, axes1) }>
        }"""
    ),
    "sequence_of_columns": _graph(
        """(float[N, 3, 4] x) => (float[N, 3, 4] y) <int64 i0 = {0}, int64 i2 = {2}> {
            words = SplitToSequence <axis = 1, keepdims = 0> (x)
            first = SequenceAt(words, i0)
            longer = SequenceInsert(words, first)
            shorter = SequenceErase(longer, i2)
            y = ConcatFromSequence <axis = 1, new_axis = 1> (shorter)
        }"""
    ),
    "normalized_in_a_function": _graph(
        "(float[N, 4] x) => (float[N, 4] y) { y = local.center(x) }",
        functions="""<domain: "local", opset_import: ["" : 21]> center (a) => (b) {
            columns = Constant <value_ints = [1]> ()
            mean = ReduceMean <keepdims = 1> (a, columns)
            b = Sub(a, mean)
        }""",
    ),
    "tiled_state": _graph(
        """(float[N, 4] x) => (float[N, 8] y) <int64[1] one = {1}> {
            rows = Shape <start = 0, end = 1> (x)
            times = Concat <axis = 0> (rows, one)
            states = Tile(Wstate, times)
            y = Concat <axis = 1> (x, states)
        }""",
        weights={"Wstate": (1, 4)},
    ),
    "repeated_for_samples": _graph(
        """(float[N, 4] x) => (float[N, 4] y)
            <int64[1] one = {1}, int64[3] wide = {1, 2, 1}, int64[2] flat = {-1, 4},
            int64[3] pairs = {-1, 2, 4}> {
            column = Unsqueeze(x, one)
            both = Tile(column, wide)
            rows = Reshape(both, flat)
            hidden = MatMul(rows, w)
            grouped = Reshape(hidden, pairs)
            y = ReduceMax <keepdims = 0> (grouped, one)
        }""",
        weights={"w": (4, 4)},
    ),
    "constant_row_before_and_removed": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <int64[1] zero = {0}, int64[1] one = {1},
            int64[1] end = {9223372036854775807}> {
            longer = Concat <axis = 0> (token, x)
            scores = Softmax(longer)
            y = Slice(scores, one, end, zero)
        }""",
        weights={"token": (1, 4)},
    ),
    "no_axes_and_no_operation": _graph(
        """(float[N, 4] x) => (float[N, 4] y) {
            y = ReduceMean <keepdims = 1, noop_with_empty_axes = 1> (x, none)
        }""",
        arrays={"none": np.zeros(0, np.int64)},
    ),
    "words_of_all_rows_as_a_list": _graph(
        """(float[N, T, 4] x) => (float[N, T, 4] y) <int64[2] flat = {-1, 4}> {
            shape = Shape(x)
            words = Reshape(x, flat)
            hidden = MatMul(words, w)
            scores = Softmax(hidden)
            y = Reshape(scores, shape)
        }""",
        weights={"w": (4, 4)},
    ),
    "words_of_all_rows_in_time_order": _graph(
        """(float[N, T, 4] x) => (float[N, T, 4] y) <int64[2] flat = {-1, 4}> {
            times = Transpose <perm = [1, 0, 2]> (x)
            shape = Shape(times)
            words = Reshape(times, flat)
            hidden = MatMul(words, w)
            restored = Reshape(hidden, shape)
            y = Transpose <perm = [1, 0, 2]> (restored)
        }""",
        weights={"w": (4, 4)},
    ),
    "gathered_from_own_row": _graph(
        """(float[N, 4] x, int64[N, 4] index) => (float[N, 4] y) {
            y = GatherElements <axis = 1> (x, index)
        }""",
        make_rows=_indices(0, 4, 4),
    ),
    "halves_swapped": _graph(
        """(float[N, 4] x) => (float[N, 4] y) {
            left, right = Split <axis = -1, num_outputs = 2> (x)
            y = Concat <axis = 1> (right, left)
        }"""
    ),
    "loop_until_a_count_that_words_give": _graph(
        """(float[N, T, 4] x) => (float[N, 4] y)
            <int64 i0 = {0}, int64 i1 = {1}, bool go = {1}, int64[1] axes1 = {1}> {
            start = ReduceMax <keepdims = 0> (x, axes1)
            shape = Shape(x)
            most = Gather(shape, i1)
            count, y = Loop (most, go, i0, start) <body = step
                (int64 trip, bool going, int64 done, float[N, 4] state)
                => (bool on, int64 more, float[N, 4] next) <int64 one = {1}, int64 three = {3}> {
                    more = Add(done, one)
                    on = Less(more, three)
                    hidden = MatMul(state, w)
                    next = Tanh(hidden)
                }>
        }""",
        weights={"w": (4, 4)},
    ),
    "mixture_of_experts": _graph(
        """(float[N, 4] x) => (float[N, 3] y) {
            gates = MatMul(x, Wgate)
            weights = Softmax(gates)
            y = Einsum <equation = "ni,eio,ne->no"> (x, Wexperts, weights)
        }""",
        weights={"Wgate": (4, 2), "Wexperts": (2, 4, 3)},
    ),
    "nan_replaced": _graph(
        """(float[N, 4] x) => (float[N, 4] y) <float zero = {0}, int64[1] axes1 = {1}> {
            is_nan = IsNaN(x)
            known = Where(is_nan, zero, x)
            least = ReduceMin <keepdims = 1> (known, axes1)
            y = Sub(known, least)
        }"""
    ),
}
"""Models whose rows do not depend on each other, by what they are."""
