"""How a worker makes an optimised model: ONNX Runtime writes its graph, and the weights are aligned.

The graph is written after all optimisations for this machine, with the weights in a file beside it, as they
are and as the kernels packed them. A load maps that file instead of reading and packing.

ONNX Runtime writes weights at any offset. It maps only aligned ones, and copies others: workers of five
networks then have 0.9 to 1.0 of the original's private memory, else 0.06 to 0.6 (measured with 1.32). Up to
1.31 its matrix kernels read packed ones in aligned steps: of a 250 by 250 matrix the process dies of SIGSEGV,
and only if it is run on two rows at once. So all weights are copied to aligned offsets, and the protobuf
messages that lead to tensors are rewritten; all others stay as they are.
"""

import errno
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnxruntime as ort

from runtime.errors import LoadRefused
from runtime.memory import free_disk_bytes
from runtime.onnxfields import (
    FIELDS,
    KEY,
    LENGTH,
    MAX_DEPTH,
    VALUE,
    Field,
    MessageKind,
    ReferenceReader,
    TooManyFields,
    Unparsable,
)
from runtime.onnxfile import MODEL_FILE, external_locations
from runtime.wire import Optimise, Optimised
from runtime.worker import sessions

ALIGNMENT = 64
"""In bytes, as ONNX Runtime's own allocations, for the widest registers."""
PAGE_BYTES = 4096
PAGED_FROM_BYTES = 2**20
"""Weights of this length or more start at a page, as in ONNX Runtime's own files."""
PIECE_BYTES = 8 * 2**20
"""Bytes per write, so that a file system with large pages uses them: an inference of an MLP whose weights are
mapped from them takes 0.98 of a bare one, else 1.07 (measured with ext4)."""
EXTERNAL_DATA_FIELD = 13
"""Field of a tensor with entries for location, offset, length and packed weights."""
PACKED = re.compile(r"prepacked_\d+")
BLOB = re.compile(r"(\d+);(\d+);([^;|]*)")
"""Offset, length and a 0: one of a weight's packed buffers."""
MORE, BITS = 128, 127
"""Bits of a varint's byte: whether more follow, and its value."""
NUMBER = re.compile(r"\d{1,19}")


WEIGHTS_FILE, UNALIGNED_FILE = "weights.bin", "unaligned.bin"
FILES = (MODEL_FILE, WEIGHTS_FILE, UNALIGNED_FILE)
"""All that a worker can write: they are made before it is confined, and it may make no others. A hostile one
fills a disk with as many files as it may make, however short each has to be."""
WEIGHTS_FROM_BYTES = 16 * 2**10
"""Least size of a weight in the weights file. From 128 bytes to 64 KiB, loads and memory are the same; at 1
MiB they are 2 to 10 ms and 4 to 8 MB more (measured with six networks of 1 to 54 MB). ONNX Runtime 1.31 has
to see some shapes in the graph: with no tensor left there, every fifth conformance model does not load."""
MOST_BYTES = 64 * 2**20
"""Limit of a file, or `MOST_TIMES` its sources if that is more: constant folding has no limit."""
MOST_TIMES = 4
"""Weights and their packed copies are twice the size of the sources."""
PROBE_BYTES = 2**16
FULL = {errno.ENOSPC, errno.EDQUOT}


def align_weights(folder: Path) -> None:
    """Move the weights to a file of their own at aligned offsets, and update the references in the model.

    Without weights, the model's file is the only one that stays.

    Raises:
        LoadRefused: `optimise_failed`, for anything that ONNX Runtime is not known to write.
        OSError: they cannot be written.
    """
    model, weights, unaligned = (folder / name for name in FILES)
    if unaligned.exists():
        moves = _Moves()
        try:
            data = _Rewriting(memoryview(model.read_bytes()), moves).rewrite()
        except (Unparsable, TooManyFields) as problem:
            raise _not_known(str(problem)) from None
        moves.copy(unaligned, weights)
        model.write_bytes(data)
        unaligned.unlink()
    else:  # without weights, ONNX Runtime removes it
        weights.unlink()


class _Moves:
    """New offsets of a file's weights, assigned in order of request."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, int], int] = {}
        self._end = 0

    def place(self, offset: int, length: int) -> int:
        if (offset, length) not in self._places:
            step = PAGE_BYTES if length >= PAGED_FROM_BYTES else ALIGNMENT
            place = self._end + -self._end % step
            self._places[offset, length] = place
            self._end = place + length
        return self._places[offset, length]

    def copy(self, source: Path, target: Path) -> None:
        """Write the new file from beginning to end in large pieces."""
        with source.open("rb") as old, target.open("wb", buffering=0) as new:
            for begin in range(0, self._end, PIECE_BYTES):
                piece = memoryview(self._piece(old.fileno(), begin, min(begin + PIECE_BYTES, self._end)))
                while piece:
                    piece = piece[new.write(piece) :]

    def _piece(self, source: int, begin: int, end: int) -> bytearray:
        piece = bytearray(end - begin)
        for (offset, length), place in self._places.items():
            first, last = max(place, begin), min(place + length, end)
            if first < last:
                data = os.pread(source, last - first, offset + first - place)
                if len(data) < last - first:
                    raise _not_known("weights beyond the end of their file")
                piece[first - begin : last - begin] = data
        return piece


class _Rewriting:
    """Updates the references to weights in one file, and copies all else."""

    def __init__(self, data: memoryview, moves: _Moves) -> None:
        self._data, self._moves = data, moves
        self._reader = ReferenceReader(data, has_groups=False)

    def rewrite(self) -> bytes:
        return self._rewrite(MessageKind.MODEL, 0, len(self._data), 0)

    def _rewrite(self, kind: MessageKind, position: int, end: int, depth: int) -> bytes:
        if depth > MAX_DEPTH:
            raise _not_known("messages nested too deeply")
        parts, entries, copied = list[bytes | memoryview](), dict[str, str](), position
        for field in self._find(kind, position, end):
            parts.append(self._data[copied : field.begin])
            copied, inner = field.next, FIELDS[kind][field.number]
            if inner is MessageKind.EXTERNAL_DATA:
                entry = self._reader.read_entry(field.start, field.next)
                entries[os.fsdecode(entry[KEY])] = os.fsdecode(entry[VALUE])
            else:
                content = self._rewrite(inner, field.start, field.next, depth + 1)
                parts.append(_field(field.number, content))
        parts.append(self._data[copied:end])
        parts += [
            _field(EXTERNAL_DATA_FIELD, _entry_of(*entry)) for entry in _move_entries(entries, self._moves)
        ]
        return b"".join(parts)

    def _find(self, kind: MessageKind, position: int, end: int) -> Iterator[Field]:
        """Yield the fields of a message to rewrite: of a tensor all entries, of others what may have any."""
        if kind is not MessageKind.TENSOR:
            return self._reader.find(FIELDS[kind], position, end)
        fields = self._reader.read_all(position, end)
        return (field for field in fields if field.number in FIELDS[kind] and field.start >= 0)


def _move_entries(entries: dict[str, str], moves: _Moves) -> Iterator[tuple[str, str]]:
    if not entries:
        return
    offset, length = entries.get("offset", "0"), entries.get("length", "")
    if entries.get("location") != UNALIGNED_FILE or not (
        NUMBER.fullmatch(offset) and NUMBER.fullmatch(length)
    ):
        raise _not_known(f"external data {entries}")
    for key, text in entries.items():
        if PACKED.fullmatch(key):
            yield key, _moved_packed(text, moves)
        elif key == "location":
            yield key, WEIGHTS_FILE
        else:
            yield key, str(moves.place(int(offset), int(length))) if key == "offset" else text


def _moved_packed(text: str, moves: _Moves) -> str:
    name, *blobs = text.split("|")
    found = [BLOB.fullmatch(blob) for blob in blobs]
    moved = [f"{moves.place(int(blob[1]), int(blob[2]))};{blob[2]};{blob[3]}" for blob in found if blob]
    if len(moved) != len(blobs):
        raise _not_known(f"packed weights {text!r}")
    return "|".join([name, *moved])


def _entry_of(key: str, text: str) -> bytes:
    return _field(KEY, os.fsencode(key)) + _field(VALUE, os.fsencode(text))


def _field(number: int, content: bytes) -> bytes:
    return _number(number << 3 | LENGTH) + _number(len(content)) + content


def _number(value: int) -> bytes:
    out = bytearray()
    while value >= MORE:
        out.append(value & BITS | MORE)
        value >>= 7
    return bytes([*out, value])


def _not_known(what: str) -> LoadRefused:
    return LoadRefused("optimise_failed", f"ONNX Runtime wrote what it is not known to write: {what}")


def create_files(order: Optimise) -> None:
    """Create the files of an optimised model, all empty, in the target folder of an order.

    Raises:
        LoadRefused: `optimise_failed`, there is no such folder, or it is not empty; `disk_full`.
    """
    os.umask(0o077)
    try:
        if os.listdir(order.target):  # noqa: PTH208 - whether there is any
            raise LoadRefused("optimise_failed", f"{order.target} is not empty")
        for name in FILES:
            Path(order.target, name).touch()
    except OSError as error:
        raise LoadRefused("disk_full" if error.errno in FULL else "optimise_failed", str(error)) from None


def optimise(order: Optimise) -> Optimised:
    """Make the optimised model of an order in its target folder, in the files that `create_files` created.

    Raises:
        LoadRefused: `optimise_failed`, `disk_full`, `unsafe_file`, `out_of_memory`.
    """
    target = Path(order.target)
    try:
        with sessions.out_of_memory_refused(order.memory_limit_bytes), _files_limited(order):
            sessions.limit_memory(order.memory_limit_bytes, mapped_bytes=order.bytes, threads=order.threads)
            _write(order, Path(order.folder), Path(os.path.realpath(order.root)))
            align_weights(target)
            _check_written(target)
    except OSError as error:
        raise LoadRefused("disk_full" if error.errno in FULL else "optimise_failed", str(error)) from None
    return Optimised()


@contextmanager
def _files_limited(order: Optimise) -> Iterator[None]:
    """Limit the length of the files.

    Raises:
        LoadRefused: `disk_full`, a file exceeds its share of the disk's room; or `optimise_failed`, a file
            exceeds the limit of an optimised model.
    """
    target = Path(order.target)
    wanted = max(MOST_BYTES, MOST_TIMES * order.bytes)
    if order.most_bytes is not None:
        wanted = min(wanted, order.most_bytes)
    there_is = max(0, free_disk_bytes(target)) // len(FILES)
    sessions.limit_resource(resource.RLIMIT_FSIZE, min(wanted, there_is))
    try:
        yield
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        if wanted <= there_is:
            raise LoadRefused("optimise_failed", f"a file of it has more than {wanted} bytes") from None
        raise LoadRefused("disk_full", f"{target} has room for files of {there_is} bytes") from None


def _write(order: Optimise, folder: Path, root: Path) -> None:
    target = Path(order.target)
    try:
        sessions.create_checked(folder, root, _options(order, target), order.memory_limit_bytes)
    except LoadRefused as refusal:
        if refusal.code != "invalid_model":
            raise
        _probe(target)
        raise LoadRefused("optimise_failed", str(refusal)) from None


def _options(order: Optimise, target: Path) -> ort.SessionOptions:
    chosen = sessions.session_options(order.threads)
    chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    chosen.optimized_model_filepath = str(target / MODEL_FILE)
    entries = {
        "session.optimized_model_external_initializers_file_name": UNALIGNED_FILE,
        "session.optimized_model_external_initializers_min_size_in_bytes": str(WEIGHTS_FROM_BYTES),
        "session.save_external_prepacked_constant_initializers": "1",
    }
    for name, text in entries.items():
        chosen.add_session_config_entry(name, text)
    return chosen


def _probe(target: Path) -> None:
    """Append to the longest file, to find out whether a full disk or a limit made ONNX Runtime fail.

    Raises:
        OSError: it did.
    """
    longest = max(target.iterdir(), key=lambda path: path.lstat().st_size, default=target / "probe")
    with longest.open("ab") as probe:
        probe.write(bytes(PROBE_BYTES))


def _check_written(target: Path) -> None:
    """Check that what was written is a model that refers only to its own weights.

    Raises:
        LoadRefused: `optimise_failed`.
    """
    try:
        locations = set(external_locations(target / MODEL_FILE))
    except (Unparsable, TooManyFields, FileNotFoundError) as problem:
        raise LoadRefused("optimise_failed", f"what was written is no model: {problem}") from None
    if not locations <= {WEIGHTS_FILE}:
        raise LoadRefused("optimise_failed", "what was written refers to files that are not its own")
