"""Tars as they arrive: hostile ones are refused by name, and what is taken is what tarfile reads."""

import gzip
import io
import tarfile
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.uploads import entry, tar

from runtime.errors import RuntimeProblem
from runtime.repository import MAX_FILES
from runtime.uploads.paths import PathBook, check_path
from runtime.uploads.problems import BadArchive, UploadTooLarge
from runtime.uploads.tarstream import BLOCK, GzipReader, TarReader

GNU, USTAR = tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT
MIB = 2**20


class Sink:
    """Keeps files in memory."""

    def __init__(self) -> None:
        self.files = dict[str, bytes]()
        self._path = ""

    def begin_file(self, path: str) -> None:
        assert path not in self.files
        self._path = path
        self.files[path] = b""

    def write_file(self, data: memoryview) -> None:
        self.files[self._path] += bytes(data)

    def end_file(self) -> None:
        self._path = ""


def read(data: bytes, *, size: int = 1000, max_bytes: int = MIB) -> dict[str, bytes]:
    """Read a tar in pieces, and return its files."""
    sink = Sink()
    reader: TarReader | GzipReader = TarReader(sink, max_bytes)
    if data.startswith(b"\x1f\x8b"):
        reader = GzipReader(TarReader(sink, max_bytes), 4 * max_bytes)
    for start in range(0, len(data), size):
        reader.feed(data[start : start + size])
    reader.close()
    return sink.files


def damaged(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]


def with_pax(**members: str) -> bytes:
    return tar(entry("a", b"1", pax_headers=members))


A = entry("a", b"1")
HUGE = entry("huge", pax_headers={"comment": "x" * 70_000})
NEGATIVE = tarfile.TarInfo("n")
NEGATIVE.size = -512
HOSTILE: dict[str, tuple[bytes, str]] = {
    "absolute path": (tar(entry("/etc/passwd", b"1")), "is an absolute path"),
    "path upwards": (tar(entry("../a", b"1")), "leads out of the folder"),
    "path upwards in between": (tar(entry("a/../../b", b"1")), "leads out of the folder"),
    "long absolute path": (tar(entry("/" + "n/" * 120 + "a", b"1")), "is an absolute path"),
    "long path upwards of GNU": (tar(entry("n/" * 120 + "../a", b"1"), form=GNU), "leads out"),
    "folder upwards": (tar(entry("..", type=tarfile.DIRTYPE)), "leads out of the folder"),
    "symbolic link": (tar(entry("l", type=tarfile.SYMTYPE, linkname="/etc")), "is a link"),
    "hard link": (tar(A, entry("l", type=tarfile.LNKTYPE, linkname="a")), "is a hard link"),
    "long link of GNU": (
        tar(entry("l", type=tarfile.SYMTYPE, linkname="/n" * 100), form=GNU),
        "is a link",
    ),
    "FIFO": (tar(entry("f", type=tarfile.FIFOTYPE)), "is a FIFO"),
    "character device": (tar(entry("d", type=tarfile.CHRTYPE)), "is a device"),
    "block device": (tar(entry("d", type=tarfile.BLKTYPE)), "is a device"),
    "sparse file": (tar(entry("s", type=tarfile.GNUTYPE_SPARSE)), "is a sparse file"),
    "sparse file of pax": (with_pax(**{"GNU.sparse.size": "1"}), "has a sparse file"),
    "unknown kind": (tar(entry("u", type=b"V")), "is no regular file"),
    "same file twice": (tar(A, A), "is there twice"),
    "same file in two spellings": (tar(A, entry("./a", b"2")), "is there twice"),
    "file as a folder": (tar(A, entry("a/b", b"1")), "is a file and a folder"),
    "folder as a file": (tar(entry("a/b", b"1"), A), "is a file and a folder"),
    "folder that is a file": (tar(A, entry("a", type=tarfile.DIRTYPE)), "is a file and a folder"),
    "empty name": (tar(entry("./", b"1", type=tarfile.REGTYPE)), "folder"),
    "control character": (tar(entry("a\x1b[2J", b"1")), "cannot be printed"),
    "name that is not UTF-8": (
        tar(entry("\udcff", b"1"), form=USTAR),
        "is damaged at its entry 1",
    ),
    "long name": (tar(entry("n" * 256, b"1")), "is too long"),
    "long path": (tar(entry("n/" * 600 + "a", b"1")), "is too long"),
    "header in a header": (tar(HUGE), "extended header of 7"),
    "pax size that is no number": (with_pax(size="-1"), "a size that is no number"),
    "wrong checksum": (damaged(tar(A), 10), "is damaged at its entry 1"),
    "damaged second header": (damaged(tar(A, entry("b")), 2 * BLOCK + 3), "is damaged at its entry 2"),
    "cut off in a file": (tar(entry("a", bytes(5000)))[:3000], "ends too early"),
    "cut off between files": (tar(A)[: 2 * BLOCK], "ends too early"),
    "empty": (b"", "ends too early"),
    "a web page": (b"<!doctype html>" * 100, "is damaged at its entry 1, or is none"),
    "gzip cut off": (gzip.compress(tar(A))[:-20], "ends too early"),
    "gzip damaged": (damaged(gzip.compress(tar(A)), 20), "gzip stream"),
    "gzip of nothing": (gzip.compress(b""), "ends too early"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("size", [1, 10**6])
def test_hostile_tar_is_refused_by_name(name: str, size: int) -> None:
    data, reason = HOSTILE[name]
    with pytest.raises(BadArchive, match=reason):
        read(data, size=size)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: tar(entry("a", bytes(700_000)), entry("b", bytes(700_000))), "may have 1048576 bytes"),
        (lambda: gzip.compress(bytes(8 * MIB)), None),
        (lambda: gzip.compress(tar(entry("a", bytes(4 * MIB)))), "may have 1048576 bytes"),
        (lambda: with_pax(size=str(10**17)), "may have 1048576 bytes"),
    ],
)
def test_archive_beyond_the_limit_is_refused(make: Callable[[], bytes], reason: str | None) -> None:
    if reason is None:  # zeros are the end of a tar; what follows counts all the same
        with pytest.raises(UploadTooLarge):
            read(make())
        return
    with pytest.raises(UploadTooLarge, match=reason):
        read(make())


def test_version_of_too_many_files_is_refused() -> None:
    book = PathBook()
    for number in range(MAX_FILES):
        book.add_file(f"f{number}")
    with pytest.raises(BadArchive, match="may have 10000 files"):
        book.add_file("one more")


@pytest.mark.parametrize("form", [GNU, USTAR, tarfile.PAX_FORMAT])
def test_tars_of_all_forms_are_read(form: int) -> None:
    long = f"{'n' * 90}/{'m' * 60}"
    folder = entry("d", type=tarfile.DIRTYPE)
    data = tar(folder, entry("./d/b", b"2" * 700), entry(long, b"3"), entry("e"), form=form)
    assert read(data) == {"d/b": b"2" * 700, long: b"3", "e": b""}
    assert read(gzip.compress(data), size=7) == read(data)


NAMES = st.sampled_from(["a", "b", "model.onnx", "..", ".", "", "é", "\x00", "x" * 300])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(PATHS, KINDS, st.binary(max_size=700)), max_size=5),
    st.sampled_from([GNU, tarfile.PAX_FORMAT]),
    st.integers(1, 2000),
)
@example([("a", tarfile.REGTYPE, b"1"), ("b/c", tarfile.REGTYPE, b"")], GNU, 512)
def test_what_is_read_is_what_the_tar_has(
    members: list[tuple[str, bytes, bytes]], form: int, size: int
) -> None:
    entries = [
        entry(path, data if kind == tarfile.REGTYPE else b"", type=kind, linkname="a")
        for path, kind, data in members
    ]
    data = tar(*entries, form=form)
    try:
        found = read(data, size=size)
    except RuntimeProblem:
        assert any(is_refused(path, kind) for path, kind, _ in members) or has_conflict(members)
        return
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        told = {
            "/".join(check_path(each.name)): archive.extractfile(each) for each in archive if each.isreg()
        }
    assert found == {path: opened.read() for path, opened in told.items() if opened is not None}
    assert all(".." not in path.split("/") and not path.startswith("/") for path in found)


def is_refused(path: str, kind: bytes) -> bool:
    names = path.split("\x00", maxsplit=1)[0].split("/")
    odd = ".." in names or any(len(name) > 255 for name in names) or "\x00" in path or path.startswith("/")
    return odd or kind == tarfile.SYMTYPE or (kind == tarfile.REGTYPE and names[-1] in ("", "."))


def has_conflict(members: list[tuple[str, bytes, bytes]]) -> bool:
    """Whether two members have one path, or a file is above another."""
    paths = [tuple(name for name in path.split("/") if name not in ("", ".")) for path, _, _ in members]
    return any(
        one[: len(other)] == other
        for place, one in enumerate(paths)
        for where, other in enumerate(paths)
        if place != where
    )
