"""Mutations of files and messages: pure functions of a random generator, so a printed seed repeats them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from support.models import varint

LENGTH_WIRE = 2
EDGES = (
    *(0, 1, 2, 7, 16, 127, 128, 255, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62),
    *(2**63 - 1, 2**63, 2**64 - 1, -1),
)
"""Around the ends of what integers hold."""
NAMES = (
    b"", b"\0", b"/etc/passwd", b"../../../../etc/passwd", b"/proc/self/environ", b"*/_ORT_MEM_ADDR_/*",
    b".", b"model.onnx", b"%s%n%x", b"\xff\xfe\x80", b"\xed\xa0\x80", b"\xe2\x80\xae\xe2\x80\x8b",
    b"a" * 5000, b"-1", b"18446744073709551615", b"9223372036854775807",
)  # fmt: skip
"""Texts for names, locations, offsets and lengths: empty, not UTF-8, of other files, endless."""
OPERATORS = tuple(
    b"""
    Add Div Mod Pow MatMul Gemm Conv ConvTranspose MaxPool AveragePool Resize Pad Tile Expand Range
    Reshape ConstantOfShape Constant Gather GatherND ScatterND ScatterElements Slice Split Concat
    Compress Unique NonZero TopK OneHot EyeLike LSTM GRU RNN Scan Loop If NonMaxSuppression RoiAlign
    GridSample CumSum Einsum DFT STFT MelWeightMatrix HannWindow Upsample DepthToSpace SequenceAt
    SequenceInsert SplitToSequence ConcatFromSequence Optional OptionalGetElement StringNormalizer
    TfIdfVectorizer RegexFullMatch StringSplit ImageDecoder QuantizeLinear DequantizeLinear
    QLinearMatMul Attention RandomNormal Multinomial TreeEnsembleRegressor SVMClassifier LabelEncoder
    CategoryMapper DictVectorizer EPContext MemcpyToHost
""".split()
)
"""Names of operators, which texts are replaced by: they get inputs and attributes that are not theirs."""
DEEP = (2, 30, 99, 101, 400, 3000)
"""How often a message is nested in itself: around the limits of parsers, and beyond."""

Mutation = Callable[[Random, bytes], bytes]


def mutate_bytes(rng: Random, data: bytes) -> bytes:
    """Change some bytes, whatever they mean."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        data = rng.choice(BLIND)(rng, data)
    return data


def flip_bits(rng: Random, data: bytes) -> bytes:
    """Flip a few bits."""
    changed = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(rng: Random, data: bytes) -> bytes:
    """Cut off the end."""
    return data[: rng.randrange(len(data) + 1)]


def delete_range(rng: Random, data: bytes) -> bytes:
    """Delete some bytes."""
    start, end = _some_range(rng, data)
    return data[:start] + data[end:]


def duplicate_range(rng: Random, data: bytes) -> bytes:
    """Repeat some bytes, once or many times."""
    start, end = _some_range(rng, data)
    return data[:end] + data[start:end] * rng.choice((1, 1, 3, 50)) + data[end:]


def move_range(rng: Random, data: bytes) -> bytes:
    """Move some bytes to another place."""
    start, end = _some_range(rng, data)
    rest = data[:start] + data[end:]
    at = rng.randrange(len(rest) + 1)
    return rest[:at] + data[start:end] + rest[at:]


def overwrite(rng: Random, data: bytes) -> bytes:
    """Replace some bytes by noise, zeros, or the encoding of a number at the end of what integers hold."""
    start, end = _some_range(rng, data)
    number = rng.choice(EDGES) % 2**64
    new = rng.choice(
        (rng.randbytes(end - start), bytes(end - start), varint(number), number.to_bytes(8, "little"))
    )
    return data[:start] + new + data[start + len(new) :]


BLIND: tuple[Mutation, ...] = (
    flip_bits,
    flip_bits,
    truncate,
    delete_range,
    duplicate_range,
    move_range,
    overwrite,
)


def _some_range(rng: Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 4, 8, 40, 1000)))


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a protobuf message: its value's bytes, or the fields in them if they are a message.

    `declared` is a length that is written instead of the true one.
    """

    number: int
    wire: int
    value: bytes
    inner: tuple[Field, ...] | None = None
    declared: int | None = None

    def encode(self) -> bytes:
        """Return the field's bytes."""
        tag = varint((self.number << 3 | self.wire) % 2**64)
        if self.wire != LENGTH_WIRE:
            return tag + self.value
        value = self.value if self.inner is None else encode_fields(self.inner)
        return tag + varint((len(value) if self.declared is None else self.declared) % 2**64) + value


def encode_fields(fields: Sequence[Field]) -> bytes:
    """Return the bytes of a message."""
    return b"".join(field.encode() for field in fields)


def parse_fields(data: bytes, depth: int = 12) -> tuple[Field, ...] | None:
    """Return the fields of a protobuf message, with those of messages in it; None if it is none.

    Without a schema some texts are taken for messages: that is as good a place to change as any.
    """
    fields, position = [], 0
    while position < len(data):
        found = _parse_field(data, position, depth)
        if found is None:
            return None
        field, position = found
        fields.append(field)
    return tuple(fields)


def _parse_field(data: bytes, position: int, depth: int) -> tuple[Field, int] | None:
    tag = _read_varint(data, position)
    if tag is None or not 0 < tag[0] >> 3 < 2**29:
        return None
    number, wire, start = tag[0] >> 3, tag[0] & 7, tag[1]
    if wire == LENGTH_WIRE:
        length = _read_varint(data, start)
        if length is None or length[0] + length[1] > len(data):
            return None
        end = length[1] + length[0]
        value = data[length[1] : end]
        inner = parse_fields(value, depth - 1) if value and depth else None
        return Field(number, wire, value, inner), end
    size = {1: 8, 5: 4}.get(wire)
    found = _read_varint(data, start) if wire == 0 else None
    end = found[1] if found is not None else start + size if size is not None else len(data) + 1
    return (Field(number, wire, data[start:end]), end) if end <= len(data) else None


MAX_REPEATED_BYTES = 1000
"""Longer fields are not repeated often, or nested deeply: such a file is large, and no more hostile."""


def _read_varint(data: bytes, position: int) -> tuple[int, int] | None:
    result = 0
    for index in range(min(10, len(data) - position)):
        byte = data[position + index]
        result |= (byte & 127) << 7 * index
        if byte < 128:
            return result, position + index + 1
    return None


def mutate_message(rng: Random, data: bytes) -> bytes:
    """Change some fields of a protobuf message, so that the rest of it is still read."""
    fields = parse_fields(data)
    if not fields:
        return mutate_bytes(rng, data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        fields = _mutate_fields(rng, fields)
    return encode_fields(fields)


def _mutate_fields(rng: Random, fields: tuple[Field, ...]) -> tuple[Field, ...]:
    """Change one field, as often a deep one as one at the top."""
    if not fields:
        return fields
    index = rng.randrange(len(fields))
    field = fields[index]
    if field.inner and rng.random() < 0.8:
        changed: tuple[Field, ...] = (replace(field, inner=_mutate_fields(rng, field.inner)),)
    else:
        changed = _mutate_field(rng, field, fields)
    return (*fields[:index], *changed, *fields[index + 1 :])


def _mutate_field(rng: Random, field: Field, others: tuple[Field, ...]) -> tuple[Field, ...]:
    """Return what stands instead of a field: the whole catalogue of lies that the wire format allows."""
    match rng.randrange(9):
        case 0:
            return ()
        case 1:
            return (field,) * rng.choice((2, 3, 300 if len(field.value) < MAX_REPEATED_BYTES else 3))
        case 2:
            return (field, rng.choice(others))
        case 3:
            return (replace(field, number=rng.choice((*range(1, 27), 0, 127, 2**28, 2**29 - 1, 2**33))),)
        case 4 if field.wire == LENGTH_WIRE:
            return (
                replace(field, declared=rng.choice((*EDGES, len(field.value) + 1, len(field.value) - 1))),
            )
        case 5 if field.wire == LENGTH_WIRE and len(field.value) < MAX_REPEATED_BYTES:
            value = field.value
            for _ in range(rng.choice(DEEP)):
                value = replace(field, value=value, inner=None).encode()
            return (replace(field, value=value, inner=None),)
        case 6:
            return (replace(field, wire=rng.randrange(8)),)
    if field.wire == LENGTH_WIRE:
        changed = (
            rng.choice(NAMES),
            rng.choice(OPERATORS),
            rng.choice(OPERATORS),
            mutate_bytes(rng, field.value),
        )
        value = rng.choice((*changed, _mutate_numbers(rng, field.value)))
        return (replace(field, value=value, inner=None),)
    return (replace(field, wire=0, value=varint(rng.choice(EDGES) % 2**64)),)


def _mutate_numbers(rng: Random, data: bytes) -> bytes:
    """Replace one of the 64-bit numbers of a tensor: a size, an index, a divisor."""
    start = 8 * rng.randrange(len(data) // 8 + 1)
    return data[:start] + (rng.choice(EDGES) % 2**64).to_bytes(8, "little") + data[start + 8 :]


def mutate_model(rng: Random, data: bytes) -> bytes:
    """Change an ONNX file: mostly as a message, sometimes as bytes."""
    is_small = len(data) < MAX_PARSED_BYTES
    return (mutate_message if is_small and rng.random() < 0.7 else mutate_bytes)(rng, data)


MAX_PARSED_BYTES = 2**15
"""Larger files would take most of the time to parse here."""
