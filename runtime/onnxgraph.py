"""The graph of an ONNX file, read without `onnx`: operators, their attributes, constants, functions.

A worker has no library that could parse the format, and a file may be hostile, so the number of fields is
bounded (`runtime.onnxfields`). Weights are not read: a tensor keeps its values only if they are few, as those
of shapes and scales are, also in another file. An attribute is read when a rule asks for it. Field numbers
are those of onnx.proto3 (ONNX 1.23).
"""

import math
import mmap
import os
import re
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from runtime.errors import LoadRefused
from runtime.onnxfields import FIXED32, MAX_VARINT_BYTES, Field, FieldReader, Unparsable
from runtime.onnxfile import normalise_location

MAX_GRAPH_FIELDS = 2_000_000
"""Fields that are read of one graph, in 2 s: twenty for each operator, five for each weight."""
MAX_RANK = 64
"""Dimensions of a tensor; numpy has no more, and exporters write six."""
MAX_ATTRIBUTE_TYPE = 14
"""The highest AttributeType of onnx.proto3."""
MAX_VALUES = 1024
"""Numbers of a tensor that are kept: no shape, list of axes or scales is longer."""
MAX_LIST_BYTES = 2**16
"""Longest attribute that is read: those of tree ensembles are lists of millions."""
SHORT_BYTES = 2**10
"""Longest attribute of which each field is read, to find its name."""
LIST_WINDOW_BYTES = 2**14
"""Bytes of a list that are matched at a time: a greedy quantifier keeps a state for each element."""

ELEMENTS: Mapping[int, str] = {
    1: "<f4",
    2: "u1",
    3: "i1",
    4: "<u2",
    5: "<i2",
    6: "<i4",
    7: "<i8",
    9: "?",
    10: "<f2",
    11: "<f8",
    12: "<u4",
    13: "<u8",
}
"""numpy's types of ONNX's element types, without texts, complex numbers, and those that numpy lacks."""
FLOAT, INT32, INT64, BOOL = 1, 6, 7, 9
"""ONNX's element types of numbers that are computed with as shapes, scales and conditions are."""


LONG = object()
"""The value of an attribute with a list that is not read."""


class ConstantTensor(NamedTuple):
    """A constant.

    Attributes:
        element: ONNX's element type.
        shape: its dimensions.
        values: its numbers, or None if they are many, texts, or of a type that numpy lacks.
    """

    element: int
    shape: tuple[int, ...]
    values: Any


class Reference(NamedTuple):
    """An attribute of a function's operator whose value is that of an attribute of the function."""

    name: str


class TypedName(NamedTuple):
    """A tensor of a graph: its ONNX element type, 0 if it is no tensor, and its dimensions.

    A dimension is -1 if it may have any length, and has a name, or an empty one, in `names`; without declared
    dimensions `shape` is None. The shape of a sequence or an optional is that of its elements.
    """

    name: str
    element: int
    shape: tuple[int, ...] | None
    names: tuple[str, ...] = ()


class OperatorNode(msgspec.Struct, frozen=True, eq=False):
    """An operator: its names of inputs and outputs, "" for one that is left out, and its attributes.

    An attribute is a number, text (bytes), `ConstantTensor`, `Graph`, `Reference`, or a tuple of numbers or
    texts.
    """

    operator: str
    domain: str
    name: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    overload: str
    _places: Mapping[str, tuple[int, int]]
    _file: "_GraphReader"
    _known: dict[str, Any] = {}

    def attribute_names(self) -> Collection[str]:
        return self._places.keys()

    def attribute(self, name: str) -> Any:
        """Return an attribute's value; None if the operator does not have it, LONG if its list is too long.

        Raises:
            Unparsable, TooManyFields: as for `read_model`.
        """
        if name not in self._places:
            return None
        if name not in self._known:
            self._known[name] = self._file.read_attribute(*self._places[name])
        return self._known[name]


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A graph or subgraph.

    Attributes:
        nodes: its operators in their order.
        inputs: its inputs.
        outputs: the names of its outputs.
        constants: its constants by name.
        declared: the shapes that the file declares, of other tensors and of outputs, by name.
    """

    nodes: Sequence[OperatorNode]
    inputs: Sequence[TypedName]
    outputs: Sequence[str]
    constants: Mapping[str, ConstantTensor]
    declared: Mapping[str, Sequence[tuple[int, ...]]]


@dataclass(frozen=True, slots=True, eq=False)
class Function:
    """A function of the model: names of inputs, outputs and attributes, defaults, and its operators.

    `defaults` is an operator of no type that has the default values as its attributes.
    """

    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: Sequence[str]
    defaults: OperatorNode
    nodes: Sequence[OperatorNode]
    opsets: Mapping[str, int]


@dataclass(frozen=True, slots=True, eq=False)
class OnnxModel:
    """A model: its graph, functions by domain, name and overload, and versions of operator sets by domain."""

    ir_version: int
    opsets: Mapping[str, int]
    graph: Graph
    functions: Mapping[tuple[str, str, str], Function]


class GraphFile:
    """An open file of a model; its graph can be read until the file is closed.

    Raises:
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise Unparsable("the file is empty")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __enter__(self) -> OnnxModel:
        """Read the model.

        Raises:
            Unparsable: it is no ONNX file, or one that no exporter writes.
            TooManyFields: the file has more fields than are read.
        """
        try:
            return _GraphReader(self._data, self._path.parent).read_model()
        except BaseException:
            self._data.close()
            raise

    def __exit__(self, *_: object) -> None:
        self._data.close()


def normalise_domain(domain: str) -> str:
    """Return a domain of operators; ONNX's own has two names."""
    return "" if domain == "ai.onnx" else domain


class _GraphReader:
    def __init__(self, data: mmap.mmap, folder: Path) -> None:
        self._data, self._folder = data, folder
        self._fields = FieldReader(data, MAX_GRAPH_FIELDS, "its graph")

    def read_model(self) -> OnnxModel:
        ir_version, graphs, opsets = 0, list[tuple[int, int]](), list[tuple[int, int]]()
        functions = list[tuple[int, int]]()
        places = {7: graphs, 8: opsets, 25: functions}
        for number, start, end, value in self._fields.read_all(0, len(self._data)):
            if number == 1:
                ir_version = _number(value)
            elif number in places and start >= 0:
                places[number].append((start, end))
        if len(graphs) != 1:
            raise Unparsable("it has no graph, or several")
        versions = self._read_opsets(opsets)
        made = dict(self._read_function(*place) for place in functions)
        return OnnxModel(ir_version, versions, self._read_graph(*graphs[0]), made)

    def _read_opsets(self, places: Iterable[tuple[int, int]]) -> dict[str, int]:
        found = dict[str, int]()
        for place in places:
            domain, version = "", 0
            for number, start, end, value in self._fields.read_all(*place):
                if number == 1:
                    domain = self._text(start, end)
                elif number == 2:
                    version = _number(value)
            found[normalise_domain(domain)] = version
        return found

    def _read_function(self, begin: int, stop: int) -> tuple[tuple[str, str, str], Function]:
        texts: dict[int, list[str]] = {number: [] for number in (1, 4, 5, 6, 10, 13)}
        opsets, nodes, defaults = list[tuple[int, int]](), list[OperatorNode](), dict[str, tuple[int, int]]()
        for number, start, end, _ in self._fields.read_all(begin, stop):
            if start < 0:
                continue
            if number in texts:
                texts[number].append(self._text(start, end))
            elif number == 7:
                nodes.append(self._read_node(start, end))
            elif number == 9:
                opsets.append((start, end))
            elif number == 11:
                default = self._attribute_name(start, end)
                if default in defaults:
                    raise Unparsable("a default that is given twice")
                defaults[default] = start, end
        name, domain, overload = ((texts[number] or [""])[-1] for number in (1, 10, 13))
        made = OperatorNode("", "", "", (), (), "", defaults, self)
        function = Function(
            texts[4], texts[5], (*texts[6], *defaults), made, nodes, self._read_opsets(opsets)
        )
        return (normalise_domain(domain), name, overload), function

    def _read_graph(self, begin: int, stop: int) -> Graph:
        count = 0
        nodes, inputs, outputs, constants = (
            list[OperatorNode](),
            list[TypedName](),
            list[str](),
            dict[str, ConstantTensor](),
        )
        declared = dict[str, list[tuple[int, ...]]]()
        for number, start, end, _ in self._fields.read_all(begin, stop):
            if start < 0:
                continue
            if number == 1:
                nodes.append(self._read_node(start, end))
            elif number == 5:
                name, tensor = self._read_tensor(start, end)
                constants[name], count = tensor, count + 1
            elif number == 11:
                inputs.append(self._read_type(start, end))
            elif number in {12, 13}:
                typed = self._read_type(start, end)
                if number == 12:
                    outputs.append(typed.name)
                if typed.shape is not None:
                    declared.setdefault(typed.name, []).append(typed.shape)
            elif number == 15:
                name, tensor = self._read_sparse(start, end)
                constants[name], count = tensor, count + 1
        names = [name for node in nodes for name in node.outputs if name]
        if len({*names, *constants}) < len(names) + count:
            raise Unparsable("a name that is defined twice")
        return Graph(nodes, inputs, outputs, constants, declared)

    def _read_node(self, begin: int, stop: int) -> OperatorNode:
        data, offset = (self._data[begin:stop], begin) if stop - begin <= SHORT_BYTES else (self._data, 0)
        inputs, outputs, attributes = list[str](), list[str](), dict[str, tuple[int, int]]()
        texts = {3: "", 4: "", 7: "", 8: ""}
        for number, start, end, _ in self._fields.read_all(begin, stop):
            if number == 5:
                attributes[self._attribute_name(_content(start), end)] = start, end
            elif number == 1:
                inputs.append(_text(data, start - offset, end - offset))
            elif number == 2:
                outputs.append(_text(data, start - offset, end - offset))
            elif number in texts:
                texts[number] = _text(data, start - offset, end - offset)
        name, operator, domain, overload = texts.values()
        return OperatorNode(
            operator, normalise_domain(domain), name, inputs, outputs, overload, attributes, self
        )

    def _attribute_name(self, begin: int, stop: int) -> str:
        """Return an attribute's name, which exporters write first; a second one counts, as in protobuf."""
        name, position = "", begin
        while position < stop:
            for number, start, end, _ in self._fields.read_all(position, stop):
                position = end
                if number == 1 and start >= 0:
                    name = self._text(start, end)
                if stop - position <= SHORT_BYTES:
                    continue
                if number == 7:
                    position = self._skip_floats(position, stop)
                    break
                if number in _REPEATED:
                    position = self._skip_list(_REPEATED[number], position, stop)
                    break
        return name

    def _skip_floats(self, position: int, stop: int) -> int:
        """Return the end of a list of floats: all elements are as long, so that every fifth byte is a tag."""
        while position < stop:
            window = min(stop, position + FLOATS_WINDOW_BYTES)
            tags = self._data[position:window:FLOAT_FIELD_BYTES]
            count = len(tags) - len(tags.lstrip(_FLOAT_TAG))
            position += count * FLOAT_FIELD_BYTES
            if count < len(tags):
                break
        return position

    def _skip_list(self, elements: re.Pattern[bytes], position: int, stop: int) -> int:
        """Return the end of a list of integers or texts, whose elements have the same tag."""
        while position < stop:
            found = elements.match(self._data, position, min(stop, position + LIST_WINDOW_BYTES))
            if found is None or found.end() == position:
                break
            position = found.end()
        return position

    def read_attribute(self, begin: int, stop: int) -> Any:
        kind, scalars, lists, reference = 0, dict[int, Any](), dict[int, list[Any]](), ""
        is_long, next_begin = stop - begin > MAX_LIST_BYTES, begin
        for number, start, end, value in self._fields.read_all(begin, stop):
            field_begin, next_begin = next_begin, end
            if number == 20:
                kind = _attribute_type(kind, value)
            elif number == 21:
                reference = self._text(start, end)
            elif number in {2, 3, 4}:
                scalars[number] = self._scalar(number, field_begin, start, end, value)
            elif number in {5, 6}:
                scalars[number] = None
            elif number in {7, 8, 9}:
                if is_long:
                    return LONG
                lists.setdefault(number, []).extend(self._elements(number, field_begin, start, end, value))
        if reference:
            return Reference(reference)
        if not kind:  # files of IR version 1 have no type
            if len(scalars) + len(lists) > 1:
                raise Unparsable("an attribute with several values")
            kind = _KINDS.get(next(iter((*scalars, *lists)), 0), 0)
        if kind in {1, 2, 3}:
            empty: Any = b"" if kind == 3 else 0
            return scalars.get(kind + 1, empty)
        message = self._only(kind + 1, begin, stop) if kind in {4, 5} else None
        if message is not None:
            place = message.start, message.next
            return self._read_graph(*place) if kind == 5 else self._read_tensor(*place)[1]
        return tuple(lists.get(kind + 1, ())) if kind in {6, 7, 8} else None

    def _scalar(self, number: int, begin: int, start: int, end: int, value: int) -> Any:
        if number == 3:
            return _number(value)
        return self._float(number, begin, end) if number == 2 else bytes(self._data[_content(start) : end])

    def _elements(self, number: int, begin: int, start: int, end: int, value: int) -> Iterable[Any]:
        if number == 9:
            return (bytes(self._data[_content(start) : end]),)
        if start < 0:
            return (_number(value) if number == 8 else self._float(number, begin, end),)
        packed = self._data[start:end]
        return _varints(packed) if number == 8 else (each[0] for each in struct.iter_unpack("<f", packed))

    def _read_tensor(self, begin: int, stop: int) -> tuple[str, ConstantTensor]:
        name, element, shape, is_external = "", 0, list[int](), False
        values, entries = list[Field](), dict[str, str]()
        for each in self._fields.read_all(begin, stop):
            number, start, end, value = each
            if number == 1:
                shape += [_number(value)] if start < 0 else _varints(self._data[start:end][: 10 * MAX_RANK])
                if len(shape) > MAX_RANK:
                    raise Unparsable("a tensor with too many dimensions")
            elif number == 2:
                element = _number(value)
            elif number == 8:
                name = self._text(start, end)
            elif number == 13:
                entries.update([self._read_entry(_content(start), end)])
            elif number == 14:
                if value not in {0, 1}:
                    raise Unparsable("a tensor at an unknown place")
                is_external = value == 1
            elif number in _VALUES:
                values.append(each)
        values_of = None
        count = math.prod(shape) if min(shape, default=0) >= 0 else MAX_VALUES + 1
        if element in ELEMENTS and count <= MAX_VALUES:
            values_of = self._values(element, count, entries if is_external else None, values)
        dimensions = tuple(shape)
        return name, ConstantTensor(
            element, dimensions, None if values_of is None else values_of.reshape(dimensions)
        )

    def _values(
        self, element: int, count: int, external: Mapping[str, str] | None, fields: Sequence[Field]
    ) -> Any:
        """Return a tensor's numbers; None if they are not where they should be."""
        kind = np.dtype(ELEMENTS[element])
        if external is not None:
            raw = self._external(external, count * kind.itemsize)
            return None if raw is None else np.frombuffer(raw, kind)
        if len(fields) != 1:
            return np.zeros(0, kind) if count == 0 else None
        number, start, end, _ = fields[0]
        if end - start > count * MAX_VARINT_BYTES:
            return None
        packed = bytes(self._data[start:end]) if start >= 0 else b""
        if number == 9 and len(packed) == count * kind.itemsize:
            return np.frombuffer(packed, kind)
        found: Any = ()
        if number in {4, 10}:
            found = np.frombuffer(packed, "<f4" if number == 4 else "<f8")
        elif number in {5, 7, 11} and element != 10:
            found = list(_varints(packed))
            if number == 5:  # int32_data, of which protobuf takes 32 bits
                found = [(each + 2**31) % 2**32 - 2**31 for each in found]
        return np.array(found).astype(kind) if len(found) == count else None

    def _external(self, entries: Mapping[str, str], length: int) -> bytes | None:
        try:
            path = self._folder / normalise_location(entries.get("location", ""))
            if not path.is_file():
                return None
            with path.open("rb") as file:
                read = os.pread(file.fileno(), length, int(entries.get("offset", "0")))
        except (LoadRefused, OSError, ValueError, OverflowError):
            return None
        return read if len(read) == length else None

    def _read_entry(self, begin: int, stop: int) -> tuple[str, str]:
        texts = {1: "", 2: ""}
        for number, start, end, _ in self._fields.read_all(begin, stop):
            if number in texts and start >= 0:
                texts[number] = self._text(start, end)
        return texts[1], texts[2]

    def _read_sparse(self, begin: int, stop: int) -> tuple[str, ConstantTensor]:
        """Read a sparse constant, without its values."""
        name, element, shape = "", 0, list[int]()
        for number, start, end, value in self._fields.read_all(begin, stop):
            if number == 1 and start >= 0:
                name, (element, _, _) = self._read_tensor(start, end)
            elif number == 3:
                shape += [_number(value)] if start < 0 else _varints(self._data[start:end][: 10 * MAX_RANK])
        return name, ConstantTensor(element, tuple(shape[:MAX_RANK]), None)

    def _read_type(self, begin: int, stop: int) -> TypedName:
        name, element, dimensions = "", 0, None
        for number, start, end, _ in self._fields.read_all(begin, stop):
            if number == 1:
                name = self._text(start, end)
        kind, is_tensor, tensor = self._only(2, begin, stop), True, None
        while kind is not None and (tensor := self._only(1, kind.start, kind.next)) is None:
            # A sequence (4), or an optional (9), has the type of its elements in field 1.
            outer = self._only(4, kind.start, kind.next) or self._only(9, kind.start, kind.next)
            kind, is_tensor = None if outer is None else self._only(1, outer.start, outer.next), False
        if tensor is not None:
            for number, _, _, value in self._fields.read_all(tensor.start, tensor.next):
                if number == 1 and is_tensor:
                    element = _number(value)
            dimensions = self._only(2, tensor.start, tensor.next)
        if dimensions is None:
            return TypedName(name, element, None)
        places = self._fields.read_all(dimensions.start, dimensions.next)
        read = [self._read_dimension(_content(each.start), each.next) for each in places if each.number == 1]
        return TypedName(name, element, tuple(each for each, _ in read), tuple(each for _, each in read))

    def _only(self, number: int, begin: int, stop: int) -> Field | None:
        """Return the only message with this number; protobuf would join several, which no exporter writes."""
        found = [
            each for each in self._fields.read_all(begin, stop) if each.number == number and each.start >= 0
        ]
        if len(found) > 1:
            raise Unparsable("a message in several parts")
        return found[0] if found else None

    def _read_dimension(self, begin: int, stop: int) -> tuple[int, str]:
        """Return a length, -1 if it is open, and then its name."""
        length, name = -1, ""
        for number, start, end, value in self._fields.read_all(begin, stop):
            if number == 1:
                length, name = _number(value), ""
            elif number == 2:
                length, name = -1, self._text(start, end)
        return max(length, -1), name

    def _float(self, number: int, begin: int, end: int) -> float:
        """Return the number of a field of four bytes, which starts with its tag at `begin`.

        Raises:
            Unparsable: the field has another wire type, for which protobuf ignores it.
        """
        if end - begin != FLOAT_FIELD_BYTES or self._data[begin] != number << 3 | FIXED32:
            raise Unparsable("a field that is no float")
        found: float = struct.unpack("<f", self._data[end - 4 : end])[0]
        return found

    def _text(self, start: int, end: int) -> str:
        return _text(self._data, start, end)


def _list_pattern(tag: bytes, element: bytes) -> re.Pattern[bytes]:
    return re.compile(b"(?:" + re.escape(tag) + element + b")*", re.DOTALL)


FLOAT_FIELD_BYTES, FLOATS_WINDOW_BYTES = 5, 5 * 2**16
"""Bytes of a float in a list, with its tag, and of a list that are read at a time."""
_FLOAT_TAG = b"\x3d"
_NUMBER = rb"[\x80-\xff]{0,9}[\x00-\x7f]"
_REPEATED: Mapping[int, re.Pattern[bytes]] = {
    8: _list_pattern(b"\x40", _NUMBER),
    9: _list_pattern(
        b"\x4a", b"(?:" + b"|".join(b"%b.{%d}" % (re.escape(bytes([n])), n) for n in range(128)) + b")"
    ),
}
"""Patterns of an attribute's lists of integers and texts."""
_KINDS = {2: 1, 3: 2, 4: 3, 5: 4, 6: 5, 7: 6, 8: 7, 9: 8}
"""AttributeType by the field that has the value."""
_VALUES = {4, 5, 6, 7, 9, 10, 11}
"""Fields of a tensor that have its values."""


def _text(data: mmap.mmap | bytes, start: int, end: int) -> str:
    if start < 0:
        raise Unparsable("a number in place of a text")
    try:
        return data[start:end].decode()
    except UnicodeDecodeError:  # protobuf takes it
        return data[start:end].decode("utf-8", "surrogateescape")


def _content(start: int) -> int:
    """Return where the content of a field with a length starts; `start` is -1 for other fields.

    Raises:
        Unparsable: the field has another wire type, for which protobuf ignores it.
    """
    if start < 0:
        raise Unparsable("a field that has no content")
    return start


def _signed(value: int) -> int:
    if value >= 2**64:
        raise Unparsable("a number of more than 64 bits")
    return value - 2**64 if value >= 2**63 else value


def _attribute_type(before: int, value: int) -> int:
    """Return an attribute's type, which must be known, and stand there once."""
    if before or not 1 <= value <= MAX_ATTRIBUTE_TYPE:
        raise Unparsable("an attribute of an unknown type, or of several")
    return value


def _number(value: int) -> int:
    """Return the number of a varint field; `value` is -1 for other fields.

    Raises:
        Unparsable: the field has another wire type, for which protobuf ignores it.
    """
    if value < 0:
        raise Unparsable("a field that has no number")
    return _signed(value)


def _varints(packed: bytes) -> Iterable[int]:
    result = shift = 0
    for byte in packed:
        if shift >= 7 * MAX_VARINT_BYTES:
            raise Unparsable("a number without an end")
        result |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield _signed(result)
            result = shift = 0
