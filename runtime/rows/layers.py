"""Rules of layers, whose batch is axis 0: filters, pools, recurrences, attention, spectra."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from runtime.rows.sizes import Number, Size
from runtime.rows.values import (
    Call,
    Coupling,
    Kind,
    NotKnown,
    Rule,
    RuleOfSeveral,
    Value,
    moved,
    same,
    shape_of,
    unknown,
)

# Filters


def per_item(*batched: int, shape: Callable[[Call], Sequence[Number]] | None = None) -> RuleOfSeveral:
    """Return the rule of an operator that treats each element of axis 0 alone, and has one output.

    Args:
        batched: the inputs whose axis 0 has these elements; others must not depend on the rows.
        shape: returns the result's shape but for axis 0; otherwise that of the first input.
    """

    def rule(call: Call) -> Sequence[Value]:
        given = [at for at in batched if call.optional(at) is not None]
        call.need_same(*(at for at in range(len(call.inputs)) if at not in batched))
        first = call.plain(batched[0])
        old = shape_of(first)
        made = (*old[:1], *(old[1:] if shape is None else shape(call)))
        if all(call.plain(at).kind is Kind.SAME for at in given):
            return [same(made)]
        for at in given:
            call.need_rows(at, first)
        return [moved(first, made, 0)]

    return rule


def spatial_rule(item: RuleOfSeveral) -> RuleOfSeveral:
    """Return a rule of filters: rows along a channel or a place of the picture are computed together."""

    def rule(call: Call) -> Sequence[Value]:
        value = call.plain(0)
        if value.kind is Kind.ROWS and value.axis != 0:
            call.refuse_axis(value.axis)
        return item(call)

    return rule


def windows(call: Call, value: Value, kernel: Sequence[Number], *, floor: bool = True) -> list[Number]:
    """Return the lengths of the result of a filter whose window moves over the picture.

    Args:
        call: the operator, with strides, dilations and pads.
        value: the pictures.
        kernel: the window's lengths.
        floor: whether a last window that is not full is left out.
    """
    lengths = shape_of(value)[2:]
    rank = len(lengths)
    strides = call.attribute("strides", (1,) * rank)
    dilations = call.attribute("dilations", (1,) * rank)
    pads = call.attribute("pads", (0,) * (2 * rank))
    automatic = call.text("auto_pad", "NOTSET")
    if not len(strides) == len(dilations) == len(kernel) == rank or len(pads) != 2 * rank:
        raise NotKnown("numbers that do not fit each other")
    made: list[Number] = []
    for at, length in enumerate(lengths):
        stride, width = strides[at], kernel[at]
        before = 0 if automatic == "VALID" else pads[at]
        padding = before + (0 if automatic == "VALID" else pads[at + rank])
        extent = dilations[at] * (width - 1) + 1 if isinstance(width, int) else None
        if automatic in {"SAME_UPPER", "SAME_LOWER"}:
            known = isinstance(length, int) and dilations[at] == 1
            made.append(-(-length // stride) if known else call.dimension("same", length, stride))
        elif stride == 1 and extent is not None and padding == extent - 1:
            made.append(length)
        elif not isinstance(length, int) or extent is None:
            operands = length, width, stride, dilations[at], padding, int(floor)
            made.append(call.dimension("window", *operands))
        else:
            room = length + padding - extent
            moves = room // stride if floor else -(-room // stride)
            if not floor and moves * stride >= length + before:
                moves -= 1  # the last window would begin in the padding at the end
            made.append(moves + 1)
    return made


def _conv_shape(weights: int) -> Callable[[Call], Sequence[Number]]:
    def shape(call: Call) -> Sequence[Number]:
        kernel = call.shape(weights)
        return [kernel[0], *windows(call, call.input(0), kernel[2:])]

    return shape


def _transposed_shape(call: Call) -> Sequence[Number]:
    kernel, lengths = call.shape(1), call.shape(0)[2:]
    rank = len(lengths)
    channels = call.symbols.multiply(kernel[1], call.attribute("group", 1))
    given = call.attribute("output_shape")
    if given is not None:
        return [channels, *given[-rank:]]
    strides, dilations = (call.attribute(name, (1,) * rank) for name in ("strides", "dilations"))
    pads, extra = call.attribute("pads", (0,) * 2 * rank), call.attribute("output_padding", (0,) * rank)
    automatic = call.text("auto_pad", "NOTSET")
    made: list[Number] = [channels]
    for at, length in enumerate(lengths):
        if automatic in {"SAME_UPPER", "SAME_LOWER"}:
            made.append(call.dimension("transposed", length, strides[at]))
            continue
        padding = 0 if automatic == "VALID" else pads[at] + pads[at + rank]
        if not isinstance(kernel[2 + at], int):
            made.append(call.dimension("transposed", length, kernel[2 + at]))
            continue
        rest = extra[at] + (kernel[2 + at] - 1) * dilations[at] + 1 - padding - strides[at]
        made.append(call.symbols.add(call.symbols.multiply(length, strides[at]), rest))
    return made


def _pool_shape(call: Call) -> Sequence[Number]:
    kernel = call.attribute("kernel_shape")
    if kernel is None:
        raise NotKnown("a window is missing")
    floor = not call.flag("ceil_mode")
    return [call.shape(0)[1], *windows(call, call.input(0), kernel, floor=floor)]


def _global_shape(call: Call) -> Sequence[Number]:
    old = call.shape(0)
    return [old[1], *([1] * (len(old) - 2))]


conv = spatial_rule(per_item(0, shape=_conv_shape(1)))
"""Conv: axis 0 has the items, axis 1 channels."""
conv_quantised = spatial_rule(per_item(0, shape=_conv_shape(3)))
conv_deformed = spatial_rule(per_item(0, 2, 4, shape=_conv_shape(1)))
conv_transposed = spatial_rule(per_item(0, shape=_transposed_shape))
pool = spatial_rule(per_item(0, shape=_pool_shape))
pool_global = spatial_rule(per_item(0, shape=_global_shape))
filter_same = spatial_rule(per_item(0))
"""Filters that keep the shape: InstanceNormalization, GroupNormalization."""


def max_pool(call: Call) -> Sequence[Value]:
    """MaxPool; its optional second output has positions in the whole batch."""
    (made,) = pool(call)
    return [made, made if made.kind is Kind.SAME else unknown("MaxPool returns positions in the whole batch")]


def _to_space(call: Call) -> Sequence[Number]:
    _, channels, height, width = call.shape(0)
    block = call.attribute("blocksize", 1)
    return [
        _part(call, channels, block**2),
        *(call.symbols.multiply(each, block) for each in (height, width)),
    ]


def _to_depth(call: Call) -> Sequence[Number]:
    _, channels, height, width = call.shape(0)
    block = call.attribute("blocksize", 1)
    return [
        call.symbols.multiply(channels, block**2),
        *(_part(call, each, block) for each in (height, width)),
    ]


def _part(call: Call, length: Number, count: int) -> Number:
    exact = call.symbols.divide(length, count)
    return call.dimension("block", length, count) if exact is None else exact


depth_to_space = spatial_rule(per_item(0, shape=_to_space))
space_to_depth = spatial_rule(per_item(0, shape=_to_depth))


def resize(call: Call) -> Value:
    """Resize: the axis of the rows has to keep its length, and its scale of 1."""
    value = call.plain(0)
    old = shape_of(value)
    if call.since < 11 or call.node.operator == "Upsample":
        scales = list(call.attribute("scales", ())) if len(call.inputs) < 2 else call.numbers(1)
        sizes = None
    else:
        given = call.optional(2)
        is_empty = given is None or (given.shape is not None and given.shape == (0,))
        scales = None if is_empty else call.numbers(2)
        sizes = call.numbers(3)
    if call.text("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        raise NotKnown("it cuts parts of the picture that an input names")
    # ONNX Runtime interpolates along all axes there, with weights of 0, and 0 times NaN is NaN.
    smooth = {"linear": 3, "cubic": 2}.get(call.text("mode", "nearest"), 0)
    if value.kind is Kind.ROWS and smooth and (len(old) <= smooth or value.axis != 0):
        raise NotKnown(
            f"it interpolates along axis {value.axis}, along which the rows lie, with weights of 0"
        )
    if call.text("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise NotKnown("one scale for all axes follows from their lengths")
    axes = [call.axis(each, len(old)) for each in call.attribute("axes", tuple(range(len(old))))]
    factors = sizes if scales is None else scales
    if factors is None or len(factors) != len(axes):
        raise NotKnown("numbers that do not fit each other")
    made = list(old)
    for axis, factor in zip(axes, factors, strict=True):
        if scales is None:
            is_kept, made[axis] = factor == old[axis], factor
        else:
            is_kept = factor == 1
            made[axis] = old[axis] if is_kept else _scaled(call, old[axis], factor)
        if value.kind is Kind.ROWS and axis == value.axis and not is_kept:
            if isinstance(factor, Size):
                raise NotKnown(f"it may change the length of axis {axis}, along which the rows lie")
            raise Coupling(f"interpolates along axis {axis}, along which the rows lie")
        if call.symbols.mentions_rows(made[axis]) and not is_kept:
            raise NotKnown("a length depends on the number of rows")
    return moved(value, made, value.axis)


def _scaled(call: Call, length: Number, factor: Number) -> Number:
    symbols = call.symbols
    if isinstance(length, int) and not isinstance(factor, Size):
        return math.floor(np.float32(length) * np.float32(factor))  # as ONNX Runtime computes it
    whole = not isinstance(factor, Size) and float(factor).is_integer()
    return symbols.multiply(length, int(factor)) if whole else call.dimension("scale", length, factor)


grid_sample = per_item(0, 1, shape=lambda call: [call.shape(0)[1], *call.shape(1)[1:-1]])
"""GridSample: a picture and a grid for each item."""


# Recurrences


def recurrent(call: Call) -> Sequence[Value]:
    """RNN, GRU and LSTM: rows along axis 1, or 0 with `layout` 1; the other of the two is time."""
    value = call.plain(0)
    batch = 0 if call.flag("layout") else 1
    call.need_same(1, 2, 3, 7)  # weights
    places = {4: 0, 5: batch, 6: batch}  # the lengths of the sequences, and their first states
    given = [at for at in places if call.optional(at) is not None]
    if value.kind is Kind.SAME:
        call.need_same(*given)
        return [same()] * 3
    if value.axis == 1 - batch:
        raise Coupling(f"takes axis {value.axis}, along which the rows lie, for time")
    if value.axis != batch:
        call.refuse_axis(value.axis)
    for at in given:
        call.need_rows(at, value, places[at])
    old, weights = shape_of(value), call.shape(2)
    directions, hidden = weights[0], weights[2]
    if batch == 0:
        last = moved(value, (old[0], directions, hidden), 0)
        return [moved(value, (*old[:2], directions, hidden), 0), last, last]
    last = moved(value, (directions, old[1], hidden), 1)
    return [moved(value, (old[0], directions, old[1], hidden), 2), last, last]


# Attention


def attention(call: Call) -> Sequence[Value]:
    """Attention of ONNX: queries, keys, values and lengths by row; a mask for all rows or for each."""
    values = {at: call.plain(at) for at in (0, 1, 2, 4, 5, 6) if call.optional(at) is not None}
    mask = None if call.optional(3) is None else call.plain(3)
    query = values[0]
    if all(value.kind is Kind.SAME for value in [*values.values(), *([] if mask is None else [mask])]):
        return [same()] * 4
    for at in values:
        call.need_rows(at, query)
    if mask is not None:  # aligned at its end with rows, heads, queries, keys
        has_batch = len(shape_of(mask)) == 4
        if mask.kind is Kind.SAME and has_batch and shape_of(mask)[0] != 1:
            raise NotKnown("its mask has a dimension where the rows lie")
        if mask.kind is Kind.ROWS:
            call.need_rows(3, query)
            if not has_batch:
                raise NotKnown("the rows of its mask meet another axis than that of the rows")
    old, unknown_length = shape_of(query), call.symbols.unknown
    width = shape_of(values[2])[-1] if len(old) == 4 else unknown_length()
    past = moved(query, (old[0], *(unknown_length() for _ in range(3))), 0)
    return [moved(query, (*old[:-1], width), 0), past, past, past]


def rotary(call: Call) -> Value:
    """RotaryEmbedding: positions by row, or caches that have been selected for each row."""
    value = call.plain(0)
    if value.kind is Kind.SAME:
        call.need_same(1, 2, 3)
        return same(value.shape)
    if value.axis != 0:
        call.refuse_axis(value.axis)
    for at in (1, 2, 3):
        other = None if call.optional(at) is None else call.plain(at)
        if other is None:
            continue
        if other.kind is Kind.SAME:
            if at == 3 or len(shape_of(other)) != 2:
                raise NotKnown(f"its input {at} has no rows")
        else:
            call.need_rows(at, value)
    return value


# Signals and pictures


def open_lengths(count: int) -> Callable[[Call], Sequence[Number]]:
    """Return a function that gives this many lengths of which nothing else is known."""
    return lambda call: [call.symbols.unknown() for _ in range(count)]


def keep_open(call: Call) -> Sequence[Number]:
    """Return open lengths, as many as the first input has behind axis 0."""
    return [call.symbols.unknown() for _ in call.shape(0)[1:]]


def window(call: Call) -> Value:
    """HannWindow and its kin: a vector of a given length."""
    call.need_same(0)
    return same([call.number_or_unknown(0)])


def filter_bank(call: Call) -> Value:
    """MelWeightMatrix: weights of frequencies for each band."""
    call.need_same(*range(5))
    return same([call.symbols.unknown(), call.number_or_unknown(0)])


def normalise_text(call: Call) -> Value:
    """StringNormalizer: each text alone, unless it leaves out some of them."""
    if call.attribute("stopwords"):
        raise NotKnown("it leaves out texts")
    value = call.plain(0)
    return moved(value, shape_of(value), value.axis)


def loss(call: Call) -> Sequence[Value]:
    """NegativeLogLikelihoodLoss and SoftmaxCrossEntropyLoss: of each row, unless it reduces them."""
    how = call.text("reduction", "mean")
    if how != "none" and call.plain(0).kind is Kind.ROWS:
        raise Coupling(f"returns the {how} of all rows")
    made = per_item(0, 1, shape=lambda each: each.shape(1)[1:])(call)
    return [*made, moved(call.plain(0), call.shape(0), 0)] if made[0].kind is Kind.ROWS else [*made, same()]


def split_text(call: Call) -> Sequence[Value]:
    """StringSplit: as many parts as the longest text of the batch has, and how many each text has."""
    value = call.plain(0)
    if value.kind is Kind.SAME:
        return [same(), same(value.shape)]
    return [unknown("StringSplit pads each text to as many parts as another one has"), value]


def one_row(call: Call) -> Sequence[Sequence[Number]]:
    """Return one output with one more dimension, of a length that is not followed."""
    return [(call.symbols.unknown(),)]


def fourier(call: Call) -> Value:
    """DFT: along one axis; the last one has real and imaginary parts."""
    value = call.plain(0)
    call.need_same(1, 2)
    old = list(shape_of(value))
    if call.since < 20:
        axis = call.axis(call.attribute("axis", 1), len(old))
    else:
        given = call.integers(2)
        axis = call.axis(-2 if given is None else given[0], len(old))
    if value.kind is Kind.ROWS and value.axis in {axis, len(old) - 1}:
        call.refuse_axis(value.axis)
    old[axis], old[-1] = call.symbols.unknown(), call.symbols.unknown()
    return moved(value, old, value.axis)


def matrix_each(count: int) -> Rule:
    """Return the rule of an operator on each matrix of the last two axes, of which `count` axes stay."""

    def rule(call: Call) -> Value:
        value = call.plain(0)
        old = shape_of(value)
        if value.kind is Kind.ROWS and value.axis >= len(old) - 2:
            call.refuse_axis(value.axis)
        return moved(value, old[: len(old) - 2 + count], value.axis)

    return rule


def affine_grid(call: Call) -> Sequence[Value]:
    """AffineGrid: a grid for each transformation; the size's first number is that of the rows."""
    value, sizes = call.plain(0), call.needed_numbers(1)
    made = [*sizes[2:], len(sizes) - 2]
    if value.kind is Kind.SAME:
        return [same((sizes[0], *made))]
    if value.axis != 0 or sizes[0] != shape_of(value)[0]:
        raise NotKnown("the size of its grids does not have the number of rows")
    return [moved(value, (sizes[0], *made), 0)]


def crop_pad(call: Call) -> Value:
    """CenterCropPad: the axis of the rows has to keep its length."""
    value, lengths = call.plain(0), call.numbers(1)
    old = shape_of(value)
    axes = [call.axis(each, len(old)) for each in call.attribute("axes", tuple(range(len(old))))]
    made = list(old)
    for axis, length in zip(axes, lengths or (), strict=True):
        if value.kind is Kind.ROWS and axis == value.axis and length != old[axis]:
            raise NotKnown(f"it cuts axis {axis}, along which the rows lie")
        if not call.symbols.is_length(length) or (axis != value.axis and call.symbols.mentions_rows(length)):
            raise NotKnown("a length is computed in a way that is not followed")
        made[axis] = length
    return moved(value, made, value.axis)


def cut_regions(call: Call) -> Value:
    """RoiAlign and CropAndResize: region n has to be from picture n."""
    pictures, places, numbers = call.plain(0), call.plain(1), call.input(2)
    call.need_same(*range(3, len(call.inputs)))
    rows = pictures, places, numbers
    if all(each.kind is Kind.SAME for each in rows):
        return same()
    if numbers.kind is not Kind.INDEX or any(
        (each.axis, each.outer, each.inner) != (0, 1, 1) for each in rows
    ):
        raise NotKnown("which picture a region is cut from is not followed")
    if pictures.kind is not Kind.ROWS or places.kind is not Kind.ROWS:
        raise NotKnown("its pictures or regions have no rows")
    return moved(pictures, (shape_of(pictures)[0], *open_lengths(3)(call)), 0)


def column_image(call: Call) -> Sequence[Value]:
    def shape(each: Call) -> Sequence[Number]:
        return [each.symbols.unknown(), *(each.numbers(1) or ())]

    return per_item(0, shape=shape)(call)
