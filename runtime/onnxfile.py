"""External data of an ONNX file: its locations are found and checked before ONNX Runtime reads the file.

A model can keep tensors in other files, and a hostile one names `../../etc/shadow`. This walks through the
fields that lead to tensors (onnx.proto3 of ONNX 1.23; `runtime.onnxfields`). It does not validate: it finds a
superset of the locations that a runtime can see.
"""

import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from runtime.errors import LoadRefused
from runtime.onnxfields import (
    FIELDS,
    KEY,
    MARK,
    MAX_DEPTH,
    VALUE,
    FieldReader,
    MessageKind,
    TooManyFields,
    Unparsable,
)

MAX_LOCATION_BYTES = 4096
"""PATH_MAX: no file has a longer path."""
MAX_SHOWN = 100
"""Characters that an error has of such a path."""


def check_external_data(path: Path, folder: Path, root: Path) -> bool:
    """Refuse a model with external data outside of its folder.

    Args:
        path: the ONNX file.
        folder: the version's folder, from which locations are relative.
        root: the repository's root, without links.

    Returns:
        Whether the file was parsed as far as it may have locations. If not, there may be more of them: the
        file must not be given to anything that follows them.

    Raises:
        LoadRefused: `unsafe_file`, for a location that is absolute, leaves the folder, or is not a regular
            file inside the repository; `invalid_model`, for more fields than are read.
    """
    checked = set[PurePosixPath]()
    try:
        for location in external_locations(path):
            place = _place_of(location)
            if place not in checked:
                _check_place(place, folder, root)
                checked.add(place)
    except Unparsable:
        return False
    except TooManyFields as problem:
        raise LoadRefused("invalid_model", f"{path.name} cannot be loaded: {problem}") from None
    return True


def external_locations(path: Path) -> Iterator[str]:
    """Yield each external-data location in an ONNX file, used or not, in the order of the file.

    Raises:
        Unparsable: the locations up to then may be incomplete.
        TooManyFields: likewise.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise Unparsable("the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield from _walk(FieldReader(data), len(data))


def _place_of(location: str) -> PurePosixPath:
    """Return the path of a location, which many spellings name."""
    beginning = location[:MAX_SHOWN]
    if len(os.fsencode(location)) > MAX_LOCATION_BYTES:
        raise LoadRefused("unsafe_file", f"external data at {beginning!r}… has a path that is too long")
    place = PurePosixPath(location)
    # "*/_ORT_MEM_ADDR_/*" makes ONNX Runtime take the offset for an address in its own memory.
    if not location or "\0" in location or "*" in location or place.is_absolute() or ".." in place.parts:
        raise LoadRefused("unsafe_file", f"external data at {location!r} is not inside the model's folder")
    return place


def _check_place(place: PurePosixPath, folder: Path, root: Path) -> None:
    """Refuse what is no regular file in the repository; one that is missing ends the walk at once."""
    try:
        is_regular = stat.S_ISREG((folder / place).stat().st_mode)
    except OSError:
        is_regular = False
    if not (is_regular and Path(os.path.realpath(folder / place)).is_relative_to(root)):
        reason = f"external data at {str(place)!r} is not a regular file in the repository"
        raise LoadRefused("unsafe_file", reason)


def _walk(reader: FieldReader, end: int) -> Iterator[str]:
    """Walk the messages depth first, with an explicit stack."""
    stack = [(MessageKind.MODEL, reader.find(FIELDS[MessageKind.MODEL], 0, end))]
    while stack:
        kind, fields = stack[-1]
        field = next(fields, None)
        if field is None:
            stack.pop()
            continue
        inner = FIELDS[kind][field.number]
        if inner is MessageKind.EXTERNAL_DATA:
            entry = reader.read_entry(field.start, field.next)
            if entry[KEY] == MARK:
                yield os.fsdecode(entry[VALUE])
            continue
        if len(stack) >= MAX_DEPTH:
            raise Unparsable("nested too deeply")
        stack.append((inner, reader.find(FIELDS[inner], field.start, field.next)))
