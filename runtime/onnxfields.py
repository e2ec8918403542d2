"""The fields of an ONNX file that lead to external data, found in the protobuf wire format.

All other fields are skipped by their length, so weights are never read. A message without the bytes
`location`, the key of such a reference, leads to no reference and is not walked, and a regular expression
skips runs of short fields. The attributes of a tree ensemble with 1,000,000 branches have 13 million fields:
one by one they take 27 s, so skipped 0.4 s (measured). The number of fields read of one file is bounded.
"""

import mmap
import re
from collections.abc import Container, Iterator
from enum import Enum
from typing import NamedTuple, Protocol, overload

MAX_DEPTH = 100
"""Nesting of messages; protobuf's own parsers stop here, too."""
MAX_VARINT_BYTES = 10
"""Bytes of a 64-bit varint, with seven bits each."""
MAX_TAG = 2**32 - 1
"""C++ parsers truncate a longer tag, and would then read another field."""
MAX_FIELDS = 1_000_000
"""Fields that are read of one file, one by one, in 2 s. A graph of 100,000 operators has 100,000, and 4 more
for each tensor in another file. Of the graphs of the `onnx` package, Inception v2 has most: 190."""
MAX_SHORT_BYTES = 2**30
"""Bytes of short fields that are skipped by runs, in 15 s; those beyond them are read one by one. It is half
of what protobuf parses, and a tree ensemble of 25 million branches."""
MARK = b"location"
"""The key of an entry of external data that names a file."""
WINDOW_BYTES = 2**12
"""Bytes that are searched for the mark at a time."""
SEARCHED_BYTES = 2**16
"""Longest message that is searched before it is walked: longer ones have weights, or other long fields."""
MAX_SHORT_LENGTH = 2**8
"""More bytes than a short field has."""
VARINT, FIXED64, LENGTH, START_GROUP, END_GROUP, FIXED32 = 0, 1, 2, 3, 4, 5
LENGTH_TAGS = frozenset(number << 3 | LENGTH for number in range(1, 16))
"""Tags of one byte, of fields with a length."""
MORE = 0x80
"""The bit that says that another byte of a number follows."""
SHORT_BYTES = 2**12
"""Longest message that is copied to read its fields: an operator has some 100 bytes."""


class Unparsable(ValueError):
    """The file is no protobuf message, or is nested too deeply."""


class TooManyFields(ValueError):
    """The file has more fields to read than any model."""

    def __init__(self, most: int, purpose: str) -> None:
        super().__init__(f"it has more than {most:,} fields to read for {purpose}")


class FileBytes(Protocol):
    """The bytes of a file: a mapping, or a reader of its parts."""

    @overload
    def __getitem__(self, at: int, /) -> int: ...

    @overload
    def __getitem__(self, at: slice, /) -> bytes | memoryview: ...


MessageKind = Enum("MessageKind", "MODEL TRAINING GRAPH FUNCTION NODE ATTRIBUTE SPARSE TENSOR EXTERNAL_DATA")
"""The ONNX messages that lead to a tensor."""
FIELDS: dict[MessageKind, dict[int, MessageKind]] = {
    MessageKind.MODEL: {7: MessageKind.GRAPH, 20: MessageKind.TRAINING, 25: MessageKind.FUNCTION},
    MessageKind.TRAINING: {1: MessageKind.GRAPH, 2: MessageKind.GRAPH},
    MessageKind.GRAPH: {1: MessageKind.NODE, 5: MessageKind.TENSOR, 15: MessageKind.SPARSE},
    MessageKind.FUNCTION: {7: MessageKind.NODE, 11: MessageKind.ATTRIBUTE},
    MessageKind.NODE: {5: MessageKind.ATTRIBUTE},
    MessageKind.ATTRIBUTE: {
        5: MessageKind.TENSOR,
        6: MessageKind.GRAPH,
        10: MessageKind.TENSOR,
        11: MessageKind.GRAPH,
        22: MessageKind.SPARSE,
        23: MessageKind.SPARSE,
    },
    MessageKind.SPARSE: {1: MessageKind.TENSOR, 2: MessageKind.TENSOR},
    MessageKind.TENSOR: {13: MessageKind.EXTERNAL_DATA},
}
KEY, VALUE = 1, 2
"""Fields of an entry of external data (StringStringEntryProto)."""


def _tags(wire: int) -> bytes:
    return b"[" + re.escape(bytes(number << 3 | wire for number in range(1, 16))) + b"]"


def _short_fields() -> re.Pattern[bytes]:
    """Return the pattern of a run of short fields: numbers, and at most 127 bytes with their length.

    Tags have one byte, those of varints at most two. No quantifier is possessive: Python before 3.11.5
    matches wrongly with them (python/cpython#106052). A greedy quantifier keeps a state for each run, but
    `ReferenceReader` matches some KiB at a time, which is as fast.
    """
    lengths = b"|".join(re.escape(bytes([length])) + b".{%d}" % length for length in range(128))
    long_tag, number = (
        b"[" + re.escape(bytes(range(0x80, 0x100, 8))) + rb"][\x01-\x7f]",
        rb"[\x80-\xff]{0,9}[\x00-\x7f]",
    )
    kinds = (
        _tags(LENGTH) + b"(?:" + lengths + b")",
        _tags(VARINT) + number,
        _tags(FIXED32) + b".{4}",
        _tags(FIXED64) + b".{8}",
        long_tag + number,
    )
    runs = b"|".join(b"(?:" + kind + b")+" for kind in kinds)  # twice as fast as single fields
    return re.compile(b"(?:" + runs + b")*", re.DOTALL)


SHORT_FIELDS = _short_fields()


class Field(NamedTuple):
    """A field's number, where its content starts, and the next field.

    `start` is -1 for a field without a length, and `value` for a field without a number.
    """

    number: int
    start: int
    next: int
    value: int


class FieldReader:
    """Reads the fields of one file, one by one, up to a bound.

    Args:
        data: the whole file.
        max_fields: the bound.
        purpose: for the error text: the reader's purpose.
    """

    def __init__(self, data: FileBytes, max_fields: int, purpose: str) -> None:
        self._bytes = data
        self._max_fields = self._fields_left = max_fields
        self._purpose = purpose

    def read_all(self, position: int, end: int) -> Iterator[Field]:
        """Yield all fields of a message, in their order.

        Raises:
            Unparsable: a field is malformed, or does not end before `end`.
            TooManyFields: the bound is reached.
        """
        data, offset = self._bytes, 0
        if end - position <= SHORT_BYTES:
            data, offset = data[position:end], position  # at a third of the time
        make = tuple.__new__  # `Field(...)` takes twice as long
        while position < end:
            # Most fields have a tag of one byte, and a length of one.
            at = position - offset
            tag = data[at]
            length = data[at + 1] if position + 1 < end else MORE
            if length < MORE and tag in LENGTH_TAGS:
                start, position = position + 2, position + 2 + length
                if position > end:
                    raise Unparsable("a field that ends outside of its message")
                self._fields_left -= 1
                if self._fields_left < 0:
                    raise TooManyFields(self._max_fields, self._purpose)
                yield make(Field, (tag >> 3, start, position, -1))
            else:
                field = self._read_field(position, end)
                position = field.next
                yield field

    def _read_field(self, begin: int, end: int) -> Field:
        self._count_field()
        tag, position = _varint(self._bytes, begin, end)
        number, wire = tag >> 3, tag & 7
        start = value = -1
        if wire == LENGTH:
            length, start = _varint(self._bytes, position, end)
            position = start + length
        elif wire == VARINT:
            value, position = _varint(self._bytes, position, end)
        elif wire in {FIXED64, FIXED32}:
            position += 8 if wire == FIXED64 else 4
        elif wire == START_GROUP:
            position = self._skip_group(number, position, end)
        else:
            raise Unparsable("a wire type that nothing here uses")
        if number == 0 or tag > MAX_TAG or position > end:
            raise Unparsable("a field that cannot be, or ends outside of its message")
        return Field(number, start, position, value)

    def _count_field(self) -> None:
        self._fields_left -= 1
        if self._fields_left < 0:
            raise TooManyFields(self._max_fields, self._purpose)

    def _skip_group(self, number: int, position: int, end: int) -> int:
        """Skip a group and the groups in it; return the position of the next field.

        ONNX has no groups, so protobuf treats each as an unknown field.
        """
        open_groups = [number]
        while open_groups:
            self._count_field()
            tag, after = _varint(self._bytes, position, end)
            if tag & 7 == START_GROUP:
                open_groups.append(tag >> 3)
            elif tag & 7 == END_GROUP:
                if open_groups.pop() != tag >> 3:
                    raise Unparsable("a group that ends another")
            else:
                after = self._read_field(position, end).next
            if len(open_groups) > MAX_DEPTH:
                raise Unparsable("nested too deeply")
            position = after
        return position


class ReferenceReader(FieldReader):
    """Finds the fields that lead to external data in one file, and skips all others, up to a bound.

    Args:
        data: the whole file.
    """

    def __init__(self, data: mmap.mmap | memoryview) -> None:
        super().__init__(data, MAX_FIELDS, "references to other files")
        self._data = data
        self._short_bytes_left = MAX_SHORT_BYTES
        self._clean_from = self._clean_to = 0
        self._is_marked = False

    def find(self, numbers: Container[int], position: int, end: int) -> Iterator[Field]:
        """Yield a message's fields with a length and one of these numbers that may lead to external data.

        Raises:
            Unparsable: a field is malformed, or does not end before `end`.
            TooManyFields: the bound is reached.
        """
        while position < end:
            stop = min(end, self._find_clean_end(position), position + self._short_bytes_left)
            run = SHORT_FIELDS.match(self._data, position, stop)
            if run is not None and run.end() > position:
                self._short_bytes_left -= run.end() - position
                position = run.end()
                continue
            field = self._read_field(position, end)
            position = field.next
            if field.number in numbers and field.start >= 0 and self._may_have_mark(field.start, field.next):
                yield field

    def read_entry(self, position: int, end: int) -> dict[int, bytes]:
        """Read key and value of one entry of external data; the last of repeated fields counts."""
        entry = {KEY: b"", VALUE: b""}
        for field in self.read_all(position, end):
            if field.number in entry and field.start >= 0:
                entry[field.number] = bytes(self._data[field.start : field.next])
        return entry

    def _may_have_mark(self, start: int, end: int) -> bool:
        """Whether the bytes may have a mark; long messages are not searched."""
        length = end - start
        return length > SEARCHED_BYTES or self._find_clean_end(start, length) < end

    def _find_clean_end(self, position: int, wanted: int = MAX_SHORT_LENGTH) -> int:
        """Return the end of a stretch without a mark: at least `wanted` bytes are searched."""
        if not self._clean_from <= position < self._clean_to:
            self._clean_from = self._clean_to = position
            self._is_marked = False
        while self._clean_to - position < wanted and not self._is_marked:
            window = bytes(self._data[self._clean_to : self._clean_to + WINDOW_BYTES + len(MARK) - 1])
            mark = window.find(MARK)
            self._is_marked = mark >= 0
            self._clean_to += mark if self._is_marked else WINDOW_BYTES
        return self._clean_to


def read_tag_and_length(data: bytes, begin: int) -> tuple[int, int, int]:
    """Return the tag of a field, where its content starts, and where it ends, perhaps outside of the data.

    Raises:
        Unparsable: the bytes are no field of ONNX, or its tag or length is not within the data.
    """
    tag, start = _varint(data, begin, len(data))
    if tag & 7 == LENGTH:
        length, start = _varint(data, start, len(data))
        return tag, start, start + length
    if tag & 7 == VARINT:
        return tag, start, _varint(data, start, len(data))[1]
    raise Unparsable("a field that ONNX does not have there")


def _varint(data: FileBytes, position: int, end: int) -> tuple[int, int]:
    result = shift = 0
    for offset in range(position, min(end, position + MAX_VARINT_BYTES)):
        byte = data[offset]
        result |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004 - the bit that says another byte follows
            return result, offset + 1
        shift += 7
    raise Unparsable("a number without an end")
