"""Metadata of an ONNX file, read without ONNX Runtime: other files, inputs and outputs, its kind.

A model can keep tensors in other files, and a hostile model names `../../etc/shadow`. `check_external_data`
walks through the fields that lead to tensors (onnx.proto3 of ONNX 1.23; `runtime.onnxfields`). It does not
validate: it finds a superset of the locations that a runtime can see. `read_tensors` reads inputs and
    outputs,
within bounds, of a file that was never loaded. `describe_foreign_content` recognises other formats.
"""

import mmap
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import overload

from msgspec.structs import replace

from runtime.errors import LoadRefused, MissingData
from runtime.onnxfields import (
    FIELDS,
    KEY,
    LENGTH,
    MARK,
    MAX_DEPTH,
    VALUE,
    Field,
    FieldReader,
    FileBytes,
    MessageKind,
    ReferenceReader,
    TooManyFields,
    Unparsable,
    read_tag_and_length,
)
from runtime.wire import BY_ONNX, MAX_DIMENSIONS, MAX_NAME_CHARACTERS, TensorSpec

SUFFIX = ".onnx"
MODEL_FILE = "model.onnx"
"""The usual name of the file of a version's folder that sessions are created from; it names the others."""
SIGNATURE_SUFFIX = ".sig"
"""Suffix of a file that signs a version, as OpenSSF model signing has it."""
MAX_LOCATION_BYTES = 4096
"""PATH_MAX: no file has a longer path."""
MAX_SHOWN = 100
"""Characters of such a path in an error."""
FOREIGN_HEAD_BYTES = 2**16
"""Bytes that `describe_foreign_content` needs: the graph begins in them, unless a description is longer."""
MAX_QUOTED = 60
"""Characters of a text that an error quotes: the first words of a web server's answer."""
MAX_TENSOR_FIELDS = 200_000
"""Fields that are read for inputs and outputs, in 0.4 s: one for each operator and three for each weight."""
MAX_TENSOR_CHARACTERS = 2**16
"""Limit of all names and types together, since they are kept: 1,000 inputs with names of 40 characters."""
MAX_DIMENSION_NAME_BYTES = 256
"""Longest name of a dimension that is read."""
DIMENSION_NAME = re.compile(r"(?!unk__|None$)[A-Za-z_]\w{0,63}")
"""A dimension's name for people, without formulas and without names that a converter numbers."""
MAX_TYPE_DEPTH = 8
"""Nesting of sequences, maps and optional values; ONNX Runtime itself accepts three levels."""
WINDOW_BYTES = 2**12
"""Bytes of a file read at once: the names of two weights are a page apart."""
_IR_VERSION, _GRAPH, _OPERATOR_SET = 1, 7, 8
"""Fields of a model."""
_DOMAIN = 1
"""Field of an operator set."""
_INITIALIZER, _INPUT, _OUTPUT, _SPARSE_INITIALIZER = 5, 11, 12, 15
"""Fields of a graph."""
_TENSOR_LENGTH, _TENSOR_NAME, _SPARSE_VALUES = 1, 8, 1
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TENSOR_TYPE, _SEQUENCE_TYPE, _MAP_TYPE, _SPARSE_TYPE, _OPTIONAL_TYPE = 1, 4, 5, 8, 9
"""Fields of a type."""
_ELEMENT, _SHAPE, _MAP_VALUE = 1, 2, 2
"""Fields of each type; the first of a map is the type of its keys."""
_DIMENSION, _LENGTH, _LENGTH_NAME = 1, 1, 2
OVERRIDABLE_SINCE = 4
"""IR version from which on an input with a default value may be given; before, each weight was an input."""
_ELEMENT_NAMES = (
    "float uint8 int8 uint16 int16 int32 int64 string bool float16 double uint32 uint64 complex64 complex128"
    " bfloat16 float8e4m3fn float8e4m3fnuz float8e5m2 float8e5m2fnuz uint4 int4 float4e2m1"
)
ELEMENTS = dict(enumerate(_ELEMENT_NAMES.split(), start=1))
"""ONNX Runtime's names of the element types of onnx.proto3."""
UNKNOWN = "unknown"
"""A type that the file does not declare, or that is newer than this list."""
OPTIONAL = re.compile(r"optional\((.*)\)")
"""ONNX Runtime's type of an optional input or output; an input may be given with a value or left out."""
_FIRST_TAG = b"\x08"
"""Tag of an ONNX file's IR version, and of a SavedModel's; files of other formats begin differently."""
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
"""Position of the mark of a file's format, the mark, the name of the format, and what to do."""
_PICKLE = re.compile(rb"\x80[\x02-\x05](?:\x95|[}\])(cq]|\x8a\x0al\xfc\x9cF)")
"""A protocol of pickle and the first operation, or the magic number of old PyTorch files."""
_MARKUP = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html|head|body|\?xml)", re.IGNORECASE)
_HTML = re.compile(rb"<(?:!doctype html|html)", re.IGNORECASE)
_SAFETENSORS = re.compile(rb'\s*\{\s*(?:"|\})')
_META_GRAPH_TAG = 2 << 3 | LENGTH
_MIN_META_GRAPH_BYTES = 1024
"""Field 2 of an ONNX file is the name of its producer, which is shorter; in TensorFlow's it is a graph."""


def find_model_file(names: Iterable[str]) -> str | None:
    """Return the model file of a version, given the paths of all files; None if none or several could be.

    The model file is `model.onnx`, or else the only `.onnx` file in the version's own folder.
    """
    found = list_model_files(names)
    if MODEL_FILE in found:
        return MODEL_FILE
    return found[0] if len(found) == 1 else None


def list_model_files(names: Iterable[str]) -> list[str]:
    """Return the files of a version that look like models by their names, sorted, without hidden files."""
    return sorted(
        name for name in names if name.endswith(SUFFIX) and "/" not in name and not name.startswith(".")
    )


def is_signature_beside(path: str) -> bool:
    """Whether a path, relative to the model's folder, names a signature beside the model."""
    return "/" not in path and path.endswith(SIGNATURE_SUFFIX)


def list_model_folders(paths: Iterable[PurePosixPath]) -> list[PurePosixPath]:
    """Return the folders of the ONNX files nearest to the top of a tree, sorted, without hidden files."""
    models = [path for path in paths if path.suffix == SUFFIX and not path.name.startswith(".")]
    depth = min((len(path.parts) for path in models), default=0)
    return sorted({path.parent for path in models if len(path.parts) == depth})


def check_external_data(path: Path, folder: Path, root: Path) -> bool:
    """Refuse a model with external data outside of its folder.

    Args:
        path: the ONNX file.
        folder: the version's folder, from which locations are relative.
        root: the repository's root, without links.

    Returns:
        Whether the file was parsed as far as it may have locations. If not, it may have more of them, and
        must not be given to a reader that follows them.

    Raises:
        LoadRefused: `unsafe_file`, for a location that is absolute, leaves the folder, or is not a regular
            file inside the repository; `invalid_model`, a file is missing (`MissingData`); too many fields.
    """
    checked = set[PurePosixPath]()
    try:
        for location in external_locations(path):
            data = normalise_location(location)
            if data not in checked:
                _check_location(data, folder, root)
                checked.add(data)
    except Unparsable:
        return False
    except TooManyFields as problem:
        raise LoadRefused("invalid_model", f"{path.name} cannot be loaded: {problem}") from None
    return True


def external_locations(path: Path) -> Iterator[str]:
    """Yield each external-data location in an ONNX file, used or not, in the order of the file.

    Raises:
        Unparsable: the locations yielded before may be incomplete.
        TooManyFields: likewise.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise Unparsable("the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield from _walk(ReferenceReader(data), len(data))


@dataclass(frozen=True, slots=True)
class ModelTensors:
    """Inputs and outputs as a model's file declares them; inputs with a default come last, as in `Loaded`."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class FileWindows:
    """The bytes of an open file, read in parts.

    A mapping would end the process if somebody cut the file short.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._begin, self._window = 0, b""

    @overload
    def __getitem__(self, at: int, /) -> int: ...

    @overload
    def __getitem__(self, at: slice, /) -> bytes: ...

    def __getitem__(self, at: int | slice) -> int | bytes:
        """Return bytes of the file; a slice ends at the file's end, and an index beyond it is an error."""
        if isinstance(at, slice):
            return os.pread(self._descriptor, at.stop - at.start, at.start)
        offset = at - self._begin
        if not 0 <= offset < len(self._window):
            self._begin, self._window, offset = at, os.pread(self._descriptor, WINDOW_BYTES, at), 0
        if not self._window:
            raise Unparsable("the file was cut short")
        return self._window[offset]


def describe_tensor(name: str, kind: str, shape: Iterable[object]) -> TensorSpec:
    """Return the description of an input or output.

    Args:
        name: its name.
        kind: ONNX Runtime's name of its type.
        shape: for each dimension its length or name; any other value stands for any length.
    """
    inner, shape = OPTIONAL.fullmatch(kind), tuple(shape)
    names = tuple(str(each) if DIMENSION_NAME.fullmatch(str(each)) else "" for each in shape)
    datatype = BY_ONNX.get(kind if inner is None else inner[1])
    return TensorSpec(
        name,
        kind if datatype is None else datatype.name,
        tuple(length if isinstance(length, int) and length >= 0 else -1 for length in shape),
        optional=inner is not None,
        dimensions=names if any(names) else (),
    )


def read_tensors(data: FileBytes, size: int) -> ModelTensors:
    """Read the inputs and outputs that an ONNX file declares, without running or validating the model.

    Raises:
        Unparsable: the file is no ONNX file, or has no graph.
        TooManyFields: the file has more fields than any model.
        OSError: the file cannot be read.
    """
    return _TensorReader(data, size).read()


class _TensorReader:
    def __init__(self, data: FileBytes, size: int) -> None:
        self._data, self._size = data, size
        self._fields = FieldReader(data, MAX_TENSOR_FIELDS, "its inputs and outputs")
        self._characters_left = MAX_TENSOR_CHARACTERS

    def read(self) -> ModelTensors:
        ir_version, graphs = 0, list[Field]()
        for field in self._fields.read_all(0, self._size):
            if field.number == _IR_VERSION:
                ir_version = field.value
            elif field.number == _GRAPH and field.start >= 0:
                graphs.append(field)
        if not graphs:
            raise Unparsable("it has no graph")
        found: dict[int, list[Field]] = {
            number: [] for number in (_INITIALIZER, _SPARSE_INITIALIZER, _INPUT, _OUTPUT)
        }
        for field in chain.from_iterable(self._fields.read_all(each.start, each.next) for each in graphs):
            if field.number in found and field.start >= 0:
                found[field.number].append(field)
        defaults = self._find_defaults(found) if found[_INPUT] else frozenset()
        inputs = [self._read_value(field) for field in found[_INPUT]]
        optional = [replace(spec, optional=True) for spec in inputs if spec.name in defaults]
        outputs = tuple(self._read_value(field) for field in found[_OUTPUT])
        required = [spec for spec in inputs if spec.name not in defaults]
        return ModelTensors((*required, *(optional if ir_version >= OVERRIDABLE_SINCE else ())), outputs)

    def _find_defaults(self, found: dict[int, list[Field]]) -> frozenset[str]:
        """Return the names of the weights, which may be declared as inputs."""
        sparse = (self._find(field, _SPARSE_VALUES) for field in found[_SPARSE_INITIALIZER])
        tensors = chain(found[_INITIALIZER], filter(None, sparse))
        return frozenset(self._read_text(self._find(tensor, _TENSOR_NAME)) for tensor in tensors)

    def _read_value(self, value: Field) -> TensorSpec:
        name = self._read_text(self._find(value, _VALUE_NAME))
        kind, shape = self._read_type(self._find(value, _VALUE_TYPE), MAX_TYPE_DEPTH)
        spec = describe_tensor(name, kind, shape)
        self._characters_left -= len(name) + len(kind) + 8 * len(shape) + sum(map(len, spec.dimensions))
        if self._characters_left < 0:
            raise TooManyFields(MAX_TENSOR_CHARACTERS, "its inputs and outputs")
        return spec

    def _read_type(self, kind: Field | None, depth: int) -> tuple[str, tuple[int | str, ...]]:
        if depth == 0:
            raise Unparsable("nested too deeply")
        for field in self._fields.read_all(kind.start, kind.next) if kind is not None else ():
            if field.start < 0:
                continue
            if field.number in {_TENSOR_TYPE, _SPARSE_TYPE}:
                name = "tensor" if field.number == _TENSOR_TYPE else "sparse_tensor"
                return f"{name}({self._read_element(field)})", self._read_shape(self._find(field, _SHAPE))
            if field.number in {_SEQUENCE_TYPE, _OPTIONAL_TYPE}:
                name = "seq" if field.number == _SEQUENCE_TYPE else "optional"
                inner, shape = self._read_type(self._find(field, _ELEMENT), depth - 1)
                return f"{name}({inner})", shape if field.number == _OPTIONAL_TYPE else ()
            if field.number == _MAP_TYPE:
                inner, _ = self._read_type(self._find(field, _MAP_VALUE), depth - 1)
                return f"map({self._read_element(field)},{inner})", ()
        return UNKNOWN, ()

    def _read_element(self, kind: Field) -> str:
        fields = self._fields.read_all(kind.start, kind.next)
        numbers = [field.value for field in fields if field.number == _ELEMENT]
        return ELEMENTS.get(numbers[-1], UNKNOWN) if numbers else UNKNOWN

    def _read_shape(self, shape: Field | None) -> tuple[int | str, ...]:
        lengths = list[int | str]()
        for dimension in self._fields.read_all(shape.start, shape.next) if shape is not None else ():
            if dimension.number == _DIMENSION and dimension.start >= 0:
                lengths.append(self._read_length(dimension))
        if len(lengths) > MAX_DIMENSIONS:
            raise TooManyFields(MAX_DIMENSIONS, "a shape")
        return tuple(lengths)

    def _read_length(self, dimension: Field) -> int | str:
        fields = self._fields.read_all(dimension.start, dimension.next)
        given = [each for each in fields if each.number in {_LENGTH, _LENGTH_NAME}]
        if not given:
            return -1
        last = given[-1]  # the last of repeated fields counts
        if (
            last.number == _LENGTH_NAME
            and last.start >= 0
            and last.next - last.start < MAX_DIMENSION_NAME_BYTES
        ):
            return bytes(self._data[last.start : last.next]).decode("utf-8", "replace")
        return last.value if last.value < 2**63 else -1

    def _find(self, message: Field, number: int) -> Field | None:
        """Return the field of a message with this number and a length; the last one counts."""
        fields = self._fields.read_all(message.start, message.next)
        found = [field for field in fields if field.number == number and field.start >= 0]
        return found[-1] if found else None

    def _read_text(self, field: Field | None) -> str:
        if field is None:
            return ""
        if field.next - field.start > 4 * MAX_NAME_CHARACTERS:
            raise Unparsable("a name that is too long")
        try:
            return bytes(self._data[field.start : field.next]).decode()
        except UnicodeDecodeError:
            raise Unparsable("a name that is not UTF-8") from None


def read_domains(path: Path) -> frozenset[str]:
    """Return the operator sets that a model names; empty if the file cannot be parsed up to them.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        windows, size = FileWindows(file.fileno()), os.fstat(file.fileno()).st_size
        found = set[str]()
        with suppress(Unparsable, TooManyFields):
            reader = FieldReader(windows, MAX_TENSOR_FIELDS, "its operator sets")
            for field in reader.read_all(0, size):
                if field.number == _OPERATOR_SET and field.start >= 0:
                    found |= {
                        bytes(windows[each.start : each.next]).decode("utf-8", "replace")
                        for each in reader.read_all(field.start, field.next)
                        if each.number == _DOMAIN
                        and 0 <= each.start <= each.next < each.start + MAX_NAME_CHARACTERS
                    }
    return frozenset(found)


def read_weight_lengths(path: Path) -> dict[int, None]:
    """Return the lengths of the weights' dimensions, in the file's order; fewer if it cannot be parsed.

    Raises:
        OSError: the file cannot be read.
    """
    found = dict[int, None]()
    with path.open("rb") as file, suppress(Unparsable, TooManyFields):
        reader = FieldReader(FileWindows(file.fileno()), MAX_TENSOR_FIELDS, "its weights")
        for graph in reader.read_all(0, os.fstat(file.fileno()).st_size):
            is_graph = graph.number == _GRAPH and graph.start >= 0
            for tensor in reader.read_all(graph.start, graph.next) if is_graph else ():
                if tensor.number == _INITIALIZER and tensor.start >= 0:
                    fields = reader.read_all(tensor.start, tensor.next)
                    found |= dict.fromkeys(field.value for field in fields if field.number == _TENSOR_LENGTH)
    return found


def describe_foreign_content(head: bytes, size: int) -> str | None:
    """Return the format of a file that is no complete ONNX file, and what to do; None if it may be one.

    The text follows the file's name: "is empty: copy it again".

    Args:
        head: the first `FOREIGN_HEAD_BYTES` of the file, or the whole file if shorter.
        size: the file's size in bytes.
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
    """Whether a file begins with the length of a JSON object and the object."""
    length = int.from_bytes(head[:8], "little")
    return 0 < length <= size - 8 and _SAFETENSORS.match(head, 8) is not None


def _describe_text(head: bytes) -> str | None:
    """Recognise a text, such as a web server's sentence or JSON; protobuf has control characters."""
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
    """Return the bytes and size of a file for `describe_foreign_content`.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return file.read(FOREIGN_HEAD_BYTES), os.fstat(file.fileno()).st_size


def describe_foreign_file(path: Path) -> str | None:
    """Return `describe_foreign_content` of a file; None if the file has a graph.

    The outline of the whole file is read, without weights.

    Raises:
        OSError: the file cannot be read.
    """
    foreign = describe_foreign_content(*read_head(path))
    if foreign is not None:
        return foreign
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            has_graph = any(each.number == _GRAPH for each in ReferenceReader(data).read_all(0, len(data)))
        except (Unparsable, TooManyFields):
            has_graph = False
    return None if has_graph else "is no ONNX file, or not all of one"


def normalise_location(location: str) -> PurePosixPath:
    """Return the normalised path of a location of external data, which has many spellings.

    Raises:
        LoadRefused: `unsafe_file`, it is absolute, or leaves the folder.
    """
    beginning = location[:MAX_SHOWN]
    if len(os.fsencode(location)) > MAX_LOCATION_BYTES:
        raise LoadRefused("unsafe_file", f"external data at {beginning!r}… has a path that is too long")
    path = PurePosixPath(location)
    # "*/_ORT_MEM_ADDR_/*" makes ONNX Runtime take the offset for an address in its own memory.
    if not location or "\0" in location or "*" in location or path.is_absolute() or ".." in path.parts:
        raise LoadRefused("unsafe_file", f"external data at {location!r} is not inside the model's folder")
    return path


def _check_location(path: PurePosixPath, folder: Path, root: Path) -> None:
    """Refuse a path that is no regular file in the repository; a missing file ends the walk at once."""
    try:
        is_regular = stat.S_ISREG((folder / path).stat().st_mode)
    except FileNotFoundError:
        reason = f"its external data {str(path)!r} is missing: put that file into the model's folder, too"
        raise MissingData("invalid_model", reason) from None
    except OSError:
        is_regular = False
    if not (is_regular and Path(os.path.realpath(folder / path)).is_relative_to(root)):
        reason = f"external data at {str(path)!r} is not a regular file in the repository"
        raise LoadRefused("unsafe_file", reason)


def _walk(reader: ReferenceReader, end: int) -> Iterator[str]:
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
