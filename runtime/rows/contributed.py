"""Rules of `ai.onnx.ml`, and of operators that ONNX Runtime contributes and its tools write into files."""

from collections.abc import Callable, Sequence

from runtime.rows.axes import gemm, keep_along, multiply, transposed
from runtime.rows.elements import broadcast
from runtime.rows.joining import concat, pad
from runtime.rows.layers import conv, keep_open, per_item, spatial_rule
from runtime.rows.sizes import Number
from runtime.rows.values import (
    Call,
    Coupling,
    Kind,
    NotKnown,
    Rule,
    RuleOfSeveral,
    Value,
    changed,
    laid_out,
    moved,
    same,
    shape_of,
)


def features(*, outputs: Callable[[Call], Sequence[Sequence[Number]]]) -> Rule:
    """Return the rule of an operator of classical machine learning: each row of features alone.

    One dimension alone would be a single row.
    """

    def rule(call: Call) -> Sequence[Value]:
        value = call.plain(0)
        if value.kind is Kind.SAME:
            return [same()] * len(call.node.outputs)
        old = shape_of(value)
        if len(old) != 2:
            raise NotKnown(f"its input has {len(old)} dimensions")
        if value.axis != 0:
            call.refuse_axis(value.axis)
        return [moved(value, (old[0], *rest), 0) for rest in outputs(call)]

    return rule


def feature_elements(call: Call) -> Value:
    """Array operators of ai.onnx.ml that change each element alone, by its place in the last axis."""
    value = call.plain(0)
    if value.kind is Kind.SAME:
        return same(value.shape)
    if len(shape_of(value)) != 2:
        raise NotKnown(f"its input has {len(shape_of(value))} dimensions")
    if value.axis != 0:
        call.refuse_axis(value.axis)
    return moved(value, shape_of(value), value.axis)


def extract_features(call: Call) -> Value:
    """ArrayFeatureExtractor: the same elements of the last axis in each row, or one of a table by row."""
    value, indices = call.plain(0), call.plain(1)
    old, at = shape_of(value), shape_of(indices)
    made = (*(old[:-1] or (1,)), call.symbols.product(at))
    if indices.kind is Kind.SAME:
        if value.kind is Kind.ROWS and value.axis == len(old) - 1:
            call.refuse_axis(value.axis)
        return moved(value, made, value.axis)
    if value.kind is not Kind.SAME:
        raise NotKnown("indices of rows select among rows")
    before, after = call.symbols.product(at[: indices.axis]), call.symbols.product(at[indices.axis + 1 :])
    outer, inner = call.symbols.multiply(before, indices.outer), call.symbols.multiply(indices.inner, after)
    return laid_out(made, len(made) - 1, outer, inner)


def one_hot_features(call: Call) -> Value:
    """OneHotEncoder of ai.onnx.ml: a new last axis."""
    value = call.plain(0)
    names = call.attribute("cats_int64s") or call.attribute("cats_strings") or ()
    return moved(value, (*shape_of(value), len(names) or call.symbols.unknown()), value.axis)


def join_features(call: Call) -> Value:
    """FeatureVectorizer: joins columns."""
    first = call.plain(0)
    for at in range(len(call.inputs)):
        call.need_rows(at, first)
        if len(call.shape(at)) != 2:
            raise NotKnown(f"its input {at} has {len(call.shape(at))} dimensions")
    return moved(first, (shape_of(first)[0], call.symbols.unknown()), 0)


def class_scores(call: Call) -> Sequence[Sequence[Number]]:
    """Return the shapes of a class for each row, and of its scores: for each class, or pair of classes."""
    return [(), (call.symbols.unknown(),)]


def targets(call: Call) -> Sequence[Sequence[Number]]:
    return [(call.attribute("n_targets", call.attribute("targets", 1)),)]


# Fused operators of com.microsoft


def per_row(
    *batched: int, outputs: Callable[[Call], Sequence[Sequence[Number]]], optional: Sequence[int] = ()
) -> RuleOfSeveral:
    """Return the rule of a fused operator whose inputs have rows along axis 0.

    Args:
        batched: inputs with rows.
        outputs: returns the shapes of the outputs but for axis 0.
        optional: inputs that may have rows along axis 0, or none at all.
    """

    def rule(call: Call) -> Sequence[Value]:
        values = {at: call.plain(at) for at in (*batched, *optional) if call.optional(at) is not None}
        call.need_same(*(at for at in range(len(call.inputs)) if at not in values))
        if all(value.kind is Kind.SAME for value in values.values()):
            return [same()] * len(call.node.outputs)
        first = next(value for value in values.values() if value.kind is Kind.ROWS)
        for at, value in values.items():
            if value.kind is Kind.SAME and at in optional:
                if len(shape_of(value)) < 2 or shape_of(value)[0] != 1:
                    raise NotKnown(f"its input {at} may have several rows, or mean something else for them")
                continue
            call.need_rows(at, first)
        length = shape_of(first)[0]
        return [moved(first, (length, *rest), 0) for rest in outputs(call)]

    return rule


def normalise_skip(call: Call) -> Sequence[Value]:
    """SkipLayerNormalization: the sum of two inputs is normalised over the last axis."""
    total = broadcast(call, [call.input(0), call.input(1)])
    first, second = call.rows_of(call.input(0)), call.rows_of(call.input(1))
    if total.kind is not Kind.ROWS or first.kind is not Kind.ROWS:
        raise NotKnown("its first input has no rows")
    old = shape_of(total)
    if len(shape_of(second)) > len(shape_of(first)):
        raise NotKnown("inputs with different numbers of dimensions")
    if total.axis == len(old) - 1:
        call.refuse_axis(total.axis)
    call.need_same(2, 3, 4)
    statistics = moved(total, (*old[:-1], 1), total.axis)
    return [total, statistics, statistics, total]


def fused_matmul(call: Call) -> Value:
    """FusedMatMul: a product, of which either matrix may be transposed."""
    if call.attribute("transBatchA", 0) or call.attribute("transBatchB", 0):
        raise NotKnown("it moves the first axis between those of its matrices")
    left, right = (
        transposed(call.plain(at)) if call.attribute(name, 0) else call.plain(at)
        for at, name in enumerate(("transA", "transB"))
    )
    return multiply(call, left, right)


def matmul_weights(call: Call) -> Value:
    """MatMulNBits and MatMulBnb4: the product with packed weights of `N` columns."""
    if not call.flag("transB", default=True):
        raise NotKnown("weights whose columns are not packed")
    value = call.plain(0)
    call.need_same(*range(1, len(call.inputs)))
    old = shape_of(value)
    if value.kind is Kind.ROWS and value.axis == len(old) - 1:
        raise Coupling(f"sums over axis {value.axis}, along which the rows lie")
    return moved(value, (*old[:-1], call.attribute("N", 0)), value.axis)


def fused_conv(call: Call) -> Value:
    """FusedConv: a Conv, a sum with another tensor of the same shape, and an activation."""
    (made,) = conv(call.with_inputs(0, 1, 2))
    return made if call.optional(3) is None else broadcast(call, [made, call.input(3)])


def multi_head_attention(call: Call) -> Sequence[Value]:
    """MultiHeadAttention of ONNX Runtime: queries, keys, values, masks and earlier keys by row."""

    def outputs(each: Call) -> Sequence[Sequence[Number]]:
        old = shape_of(each.input(0))
        length, width = old[1], each.symbols.unknown()
        past = (each.symbols.unknown(), each.symbols.unknown(), each.symbols.unknown())
        return [(length, width), past, past, past]

    return per_row(0, 1, 2, 6, 7, outputs=outputs, optional=(4, 5))(call)


def quantised_single(call: Call) -> Value:
    """An activation of quantised elements; scales and zero points follow the input."""
    call.need_same(*range(1, len(call.inputs)))
    return keep_along(call, call.plain(0), [])


def quantised_pair(call: Call) -> Value:
    """QLinearAdd and QLinearMul: two tensors with scale and zero point each, and those of the result."""
    call.need_same(1, 2, 4, 5, 6, 7)
    return broadcast(call, [call.input(0), call.input(3)])


def quantised_concat(call: Call) -> Value:
    """QLinearConcat: scale and zero point of the result, then each tensor with its own."""
    tensors = list(range(2, len(call.inputs), 3))
    call.need_same(*(at for at in range(len(call.inputs)) if at not in tensors))
    return concat(call.with_inputs(*tensors))


def quantised_gemm(call: Call) -> Value:
    """QGemm: a Gemm of quantised matrices with scale and zero point each."""
    call.need_same(1, 2, 4, 5, 6, 7, 8)
    return gemm(call.with_inputs(0, 3, 6))


def quantised_where(call: Call) -> Value:
    call.need_same(2, 3, 5, 6, 7, 8)
    return broadcast(call, [call.input(0), call.input(1), call.input(4)])


def quantised_softmax(call: Call) -> Value:
    value = call.plain(0)
    call.need_same(*range(1, len(call.inputs)))
    rank = len(shape_of(value))
    axis = call.axis(call.attribute("axis", -1), rank)
    old_form = call.attribute("opset", 0) < 13  # as Softmax of that operator set
    return keep_along(call, value, range(axis, rank) if old_form else [axis])


def distances(call: Call) -> Value:
    """CDist: between each row of one matrix and each of another."""
    return multiply(call, call.plain(0), transposed(call.plain(1)))


def unfold(call: Call) -> Value:
    """UnfoldTensor: windows along one axis, as a new last axis."""
    value = call.plain(0)
    old = list(shape_of(value))
    axis = call.axis(call.attribute("dim", -1), len(old))
    if value.kind is Kind.ROWS and value.axis == axis:
        call.refuse_axis(axis)
    old[axis] = call.symbols.unknown()
    return moved(value, (*old, call.attribute("size")), value.axis)


def gather_quantised(call: Call) -> Value:
    """GatherBlockQuantized: rows of indices into a table of weights."""
    call.need_same(0, 2, 3)
    table, indices = call.shape(0), call.plain(1)
    axis = call.axis(call.attribute("gather_axis", 0), len(table))
    rest = [*table[axis + 1 :]]
    if rest:
        rest[-1] = call.symbols.unknown()  # several weights may be packed into one element
    return moved(indices, (*table[:axis], *shape_of(indices), *rest), axis + indices.axis)


def pad_pairs(call: Call) -> Value:
    """Pad of com.microsoft, in the form of ONNX's version 11."""
    return pad(Call(call.node, 11, call.inputs, call.symbols, call.attribute))


def pads_to_longest(call: Call) -> Sequence[Value]:
    """Tokenizer: all rows get as many tokens as the longest has."""
    if call.input(0).kind is Kind.SAME:
        return [same()]
    raise Coupling("pads each row to the longest of the batch")


def attention_packed(mask: int, past: int, *more: int) -> Rule:
    """Return the rule of Attention and QAttention: queries, keys and values come from one input."""

    def rule(call: Call) -> Sequence[Value]:
        if call.optional(past) is not None:
            raise NotKnown("earlier keys are among its inputs")

        def outputs(each: Call) -> Sequence[Sequence[Number]]:
            return [(each.shape(0)[1], each.symbols.unknown())]

        made = list(per_row(0, outputs=outputs, optional=(mask, *more))(call))
        if made[0].kind is Kind.ROWS:
            rest = [call.symbols.unknown() for _ in range(3)]
            made.append(moved(made[0], (2, shape_of(made[0])[0], *rest), 1))
        return made

    return rule


def grouped_attention(call: Call) -> Sequence[Value]:
    """GroupQueryAttention: lengths by row, and one total length for all."""

    def outputs(each: Call) -> Sequence[Sequence[Number]]:
        old = each.shape(0)
        is_packed = each.optional(1) is None  # queries, keys and values come from one input
        past = (each.symbols.unknown(), each.symbols.unknown(), each.symbols.unknown())
        return [(*old[1:-1], each.symbols.unknown()) if is_packed else old[1:], past, past]

    return per_row(0, 1, 2, 3, 4, 5, 9, outputs=outputs, optional=(10,))(call)


def embed(call: Call) -> Sequence[Value]:
    """EmbedLayerNormalization: sums of embeddings by row, and their normalisation."""

    def outputs(each: Call) -> Sequence[Sequence[Number]]:
        length, width = each.shape(0)[1], each.shape(2)[1]
        return [(length, width), (), (length, width)]

    return per_row(0, 1, 7, outputs=outputs, optional=(8,))(call)


def rotary_contributed(call: Call) -> Value:
    """RotaryEmbedding of com.microsoft: positions by row, or one offset for all."""
    value, positions = call.plain(0), call.plain(1)
    call.need_same(2, 3)
    if value.kind is Kind.SAME:
        call.need_same(1)
        return changed(value)
    if value.axis != 0:
        call.refuse_axis(value.axis)
    if positions.kind is Kind.SAME and positions.shape != (1,):
        raise NotKnown("its positions have no rows")
    if positions.kind is Kind.ROWS:
        call.need_rows(1, value)
    return value


any_filter = spatial_rule(per_item(0, shape=keep_open))
"""A filter whose lengths are not followed, such as one with channels in the last axis."""


def last_axis(*positions: int, behind: int = 1) -> Rule:
    """Return the rule of a fused operator on these inputs, which computes along the last axes."""

    def rule(call: Call) -> Value:
        given = [at for at in positions if call.optional(at) is not None]
        call.need_same(*(at for at in range(len(call.inputs)) if at not in given))
        first, *others = (call.plain(at) for at in given)
        rank = len(shape_of(first))
        for value in others:
            if (value.kind, value.axis) != (first.kind, first.axis) or len(shape_of(value)) != rank:
                raise NotKnown("not all of its inputs have rows along the same axis")
            if not call.has_layout(value, first):
                raise NotKnown("rows lie in different order in its inputs")
        return keep_along(call, first, range(rank - behind, rank))

    return rule


def recurrent_attention(call: Call) -> Sequence[Value]:
    """LinearAttention: queries, keys, values, gates and the state by row."""

    def outputs(each: Call) -> Sequence[Sequence[Number]]:
        lengths = [each.symbols.unknown() for _ in range(4)]
        return [(each.shape(0)[1], lengths[0]), lengths[1:]]

    return per_row(0, 1, 2, 3, 4, 5, outputs=outputs)(call)


def causal_conv(call: Call) -> Sequence[Value]:
    """CausalConvWithState: channels and a state by row."""

    def outputs(each: Call) -> Sequence[Sequence[Number]]:
        rest = each.shape(0)[1:]
        return [[each.symbols.unknown() for _ in rest] for _ in range(2)]

    return per_row(0, 3, outputs=outputs)(call)


def rotary_multimodal(call: Call) -> Value:
    """MRotaryEmbedding: three positions for each token, along the axis before that of the rows."""
    value, positions = call.plain(0), call.plain(1)
    call.need_same(2, 3)
    if value.kind is Kind.SAME and positions.kind is Kind.SAME:
        return changed(value)
    call.need_rows(0, value)
    call.need_rows(1, value, 1)
    return value


def experts(call: Call) -> Sequence[Value]:
    """MoE: each token goes to experts of its own; with three dimensions tokens of all rows are joined."""
    if len(call.shape(0)) != 2:
        raise NotKnown("its input has three dimensions")
    return per_row(0, 1, outputs=lambda each: [each.shape(0)[1:]])(call)


def like_first_twice(call: Call) -> Sequence[Sequence[Number]]:
    """Return the shapes of two outputs like the first input."""
    return [call.shape(0)[1:]] * 2


def like_second(call: Call) -> Sequence[Sequence[Number]]:
    """Return the shape of an output like the second input."""
    return [call.shape(1)[1:]]
