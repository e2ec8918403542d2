"""External data of an ONNX file: its locations are found and checked before ONNX Runtime reads the file.

A model can keep tensors in other files, and a hostile one names `../../etc/shadow`. This walks the protobuf
wire format through the few fields that lead to tensors (onnx.proto3 of ONNX 1.23) and skips everything else
by its length, so it never reads the weights. It does not validate: it finds a superset of the locations
that a runtime can see.
"""

import mmap
import os
import stat
from collections.abc import Iterator
from enum import Enum
from pathlib import Path, PurePosixPath

from runtime.errors import LoadRefused

MAX_DEPTH = 100
"""Nesting of messages; protobuf's own parsers stop here, too."""
MAX_VARINT_BYTES = 10
"""Bytes of a 64-bit varint, with seven bits each."""
MAX_TAG = 2**32 - 1
"""C++ parsers truncate a longer tag, and would then read another field."""
VARINT, FIXED64, LENGTH, START_GROUP, END_GROUP, FIXED32 = 0, 1, 2, 3, 4, 5


class Unparsable(ValueError):
    """The file is no protobuf message, or is nested too deeply."""


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


def check_external_data(path: Path, folder: Path, root: Path) -> bool:
    """Refuse a model with external data outside of its folder.

    Args:
        path: the ONNX file.
        folder: the version's folder, from which locations are relative.
        root: the repository's root, without links.

    Returns:
        Whether the whole file was parsed. If not, there may be more locations: the file must not be given to
        anything that follows them.

    Raises:
        LoadRefused: `unsafe_file`, for a location that is absolute, leaves the folder, or is not a regular
            file inside the repository.
    """
    try:
        for location in external_locations(path):
            _check_location(location, folder, root)
    except Unparsable:
        return False
    return True


def external_locations(path: Path) -> Iterator[str]:
    """Yield each external-data location in an ONNX file, used or not, in the order of the file.

    Raises:
        Unparsable: the locations up to then may be incomplete.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise Unparsable("the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield from _walk(data)


def inside(path: Path, root: Path) -> bool:
    """Whether a path, with all links followed, is beneath the root (itself without links)."""
    return Path(os.path.realpath(path)).is_relative_to(root)


def _check_location(location: str, folder: Path, root: Path) -> None:
    pure = PurePosixPath(location)
    # "*/_ORT_MEM_ADDR_/*" makes ONNX Runtime take the offset for an address in its own memory.
    if not location or "\0" in location or "*" in location or pure.is_absolute() or ".." in pure.parts:
        raise LoadRefused("unsafe_file", f"external data at {location!r} is not inside the model's folder")
    if not inside(folder / location, root):
        raise LoadRefused("unsafe_file", f"external data at {location!r} leads out of the repository")
    try:
        regular = stat.S_ISREG((folder / location).stat().st_mode)
    except (OSError, ValueError):
        regular = False
    if not regular:
        raise LoadRefused("unsafe_file", f"external data at {location!r} is not a regular file")


def _walk(data: mmap.mmap) -> Iterator[str]:
    """Walk the messages depth first with an explicit stack of (kind, position, end)."""
    stack = [(MessageKind.MODEL, 0, len(data))]
    while stack:
        kind, position, end = stack.pop()
        if kind is MessageKind.EXTERNAL_DATA:
            yield from _location(data, position, end)
            continue
        inner = FIELDS[kind]
        while position < end:
            number, start, position = read_field(data, position, end)
            if number in inner and start >= 0:
                if len(stack) >= MAX_DEPTH:
                    raise Unparsable("nested too deeply")
                stack.append((kind, position, end))
                stack.append((inner[number], start, position))
                break


def _location(data: mmap.mmap, position: int, end: int) -> Iterator[str]:
    """Read one entry of external data; the last of repeated fields counts."""
    key, value = b"", b""
    while position < end:
        number, start, position = read_field(data, position, end)
        if start >= 0 and number == KEY:
            key = data[start:position]
        elif start >= 0 and number == VALUE:
            value = data[start:position]
    if key == b"location":
        yield os.fsdecode(value)


def read_field(data: mmap.mmap | memoryview, position: int, end: int) -> tuple[int, int, int]:
    """Read one field: its number, where its bytes start (-1 if it has no length), where the next one is.

    Raises:
        Unparsable: there is no field of protobuf, or it does not end before `end`.
    """
    tag, position = _varint(data, position, end)
    number, wire = tag >> 3, tag & 7
    start = -1
    if wire == LENGTH:
        length, start = _varint(data, position, end)
        position = start + length
    elif wire == VARINT:
        _, position = _varint(data, position, end)
    elif wire in {FIXED64, FIXED32}:
        position += 8 if wire == FIXED64 else 4
    elif wire == START_GROUP:
        position = _after_group(data, number, position, end)
    else:
        raise Unparsable("a wire type that nothing here uses")
    if number == 0 or tag > MAX_TAG or position > end:
        raise Unparsable("a field that cannot be, or ends outside of its message")
    return number, start, position


def _after_group(data: mmap.mmap | memoryview, number: int, position: int, end: int) -> int:
    """Skip a group and the groups in it; return the position of the next field.

    ONNX has none, so protobuf treats each as an unknown field.
    """
    open_groups = [number]
    while open_groups:
        tag, after = _varint(data, position, end)
        if tag & 7 == START_GROUP:
            open_groups.append(tag >> 3)
        elif tag & 7 == END_GROUP:
            if open_groups.pop() != tag >> 3:
                raise Unparsable("a group that ends another")
        else:
            _, _, after = read_field(data, position, end)
        if len(open_groups) > MAX_DEPTH:
            raise Unparsable("nested too deeply")
        position = after
    return position


def _varint(data: mmap.mmap | memoryview, position: int, end: int) -> tuple[int, int]:
    result = shift = 0
    for offset in range(position, min(end, position + MAX_VARINT_BYTES)):
        byte = data[offset]
        result |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004 - the bit that says another byte follows
            return result, offset + 1
        shift += 7
    raise Unparsable("a number without an end")
