"""External data of an ONNX file: its locations are found and checked before ONNX Runtime reads the file.

A model can keep tensors in other files, and a hostile one names `../../etc/shadow`. This walks through the
fields that lead to tensors (onnx.proto3 of ONNX 1.23; `runtime.onnxfields`). It does not validate: it finds a
superset of the locations that a runtime can see.
"""

import mmap
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from runtime.errors import LoadRefused
from runtime.onnxfields import (
    FIELDS,
    KEY,
    LENGTH,
    MARK,
    MAX_DEPTH,
    VALUE,
    FieldReader,
    MessageKind,
    TooManyFields,
    Unparsable,
    read_tag_and_length,
)

MAX_LOCATION_BYTES = 4096
"""PATH_MAX: no file has a longer path."""
MAX_SHOWN = 100
"""Characters that an error has of such a path."""
FOREIGN_HEAD_BYTES = 2**16
"""What `describe_foreign_content` needs of a file: its graph begins there, unless a description is longer."""
MAX_QUOTED = 60
"""Characters of a text that an error quotes: the first words of a web server's answer."""
_FIRST_TAG = b"\x08"
"""Of an ONNX file's IR version, and of a SavedModel's; other formats do not begin so."""
_MAGIC = (
    (
        0,
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer in place of the file: run `git lfs pull` where it was cloned, then copy it again",
    ),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes it: convert it with tf2onnx"),
    (4, b"TFL3", "a TensorFlow Lite model: convert it with tf2onnx"),
    (4, b"ORTM", "a model in ONNX Runtime's own format (.ort): use the ONNX file that it was made from"),
    (0, b"GGUF", "a GGUF file, of llama.cpp: it cannot be loaded here"),
    (0, b"\x93NUMPY", "a numpy array, and no model"),
    (0, b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (257, b"ustar", "a tar archive: unpack it first"),
)
"""Where the mark of a file's format stands, the mark, and what the file is, with what to do."""
_PICKLE = re.compile(rb"\x80[\x02-\x05](?:\x95|[}\])(cq]|\x8a\x0al\xfc\x9cF)")
"""A protocol of pickle and the first operation, or the magic number of old PyTorch files."""
_MARKUP = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html|head|body|\?xml)", re.IGNORECASE)
_HTML = re.compile(rb"<(?:!doctype html|html)", re.IGNORECASE)
_SAFETENSORS = re.compile(rb'\s*\{\s*(?:"|\})')
_META_GRAPH_TAG = 2 << 3 | LENGTH
_MIN_META_GRAPH_BYTES = 1024
"""Field 2 of an ONNX file is the name of its producer, which is shorter; TensorFlow has a graph there."""


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


def describe_foreign_content(head: bytes, size: int) -> str | None:
    """Return what a file is instead of a complete ONNX file, and what to do; None if it may be one.

    The text goes on after the file's name: "is empty: copy it again".

    Args:
        head: the first `FOREIGN_HEAD_BYTES` of the file, or all of a shorter one.
        size: of the file, in bytes.
    """
    if size == 0:
        return "is empty: copy it again"
    if _is_safetensors(head, size):
        return "is a safetensors file, which has weights and no graph: export the model to ONNX"
    if head.startswith(_FIRST_TAG):
        return _describe_fields(head, size)
    known = next((what for at, mark, what in _MAGIC if head.startswith(mark, at)), None)
    if known is not None:
        return f"is {known}"
    if _MARKUP.match(head):
        is_html = _HTML.search(head[:MAX_LOCATION_BYTES]) is not None
        what = "an HTML page" if is_html else "an XML document"
        return f"is {what}, perhaps the answer of a server that did not send the file: download it again"
    if head.startswith(b"PK\x03\x04"):
        return f"is {_describe_zip(head)}"
    if _PICKLE.match(head):
        return "is a pickle, as PyTorch and scikit-learn write it: export the model to ONNX"
    if not any(head):
        return "begins with nothing but zero bytes, as after a download that broke off: copy it again"
    return _describe_text(head)


def _describe_zip(head: bytes) -> str:
    if b"data.pkl" in head or b"/version" in head[:MAX_LOCATION_BYTES]:
        return "a PyTorch checkpoint: export the model with torch.onnx.export"
    if b".weights.h5" in head or b"config.json" in head[:MAX_LOCATION_BYTES]:
        return "a Keras model: convert it with tf2onnx"
    return "a zip archive: unpack it first"


def _is_safetensors(head: bytes, size: int) -> bool:
    """Whether this is the length of a JSON object, and its beginning."""
    length = int.from_bytes(head[:8], "little")
    return 0 < length <= size - 8 and _SAFETENSORS.match(head, 8) is not None


def _describe_text(head: bytes) -> str | None:
    """Recognise a text: a sentence of a web server, JSON; protobuf has control characters."""
    text = head.removesuffix(b"\n").decode("ascii", "replace") if head.isascii() else ""
    if not text or any(not (letter.isprintable() or letter in "\t\r\n") for letter in text):
        return None
    quoted = " ".join(text[: 2 * MAX_QUOTED].split())
    return f"is a text and no model: {quoted[:MAX_QUOTED]!r}{'…' if len(quoted) > MAX_QUOTED else ''}"


def _describe_fields(head: bytes, size: int) -> str | None:
    """Recognise a SavedModel of TensorFlow, and a file that ends within one of its fields."""
    position = 0
    while position < len(head):
        try:
            tag, start, end = read_tag_and_length(head, position)
        except Unparsable:
            return None
        is_long = tag == _META_GRAPH_TAG and end - start >= _MIN_META_GRAPH_BYTES
        if is_long and head.startswith(b"\x08\x01") and head.startswith(b"\x0a", start):
            return "is a SavedModel of TensorFlow: convert it with tf2onnx"
        if end > size:
            return f"ends after {size:,} bytes, within a part of it that goes on to {end:,}: copy it again"
        position = end
    return None


def read_head(path: Path) -> tuple[bytes, int]:
    """Return what `describe_foreign_content` needs of a file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return file.read(FOREIGN_HEAD_BYTES), os.fstat(file.fileno()).st_size


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
