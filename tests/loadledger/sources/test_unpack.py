"""Archives: which files of one are written, and hostile ones."""

import gzip
import io
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.fleet import of_both
from support.history import PLAIN

from loadledger.errors import SourceProblem
from loadledger.sources import unpack as unpacking
from loadledger.sources.unpack import unpack

Member = tuple[str, bytes, bytes]
"""A name, a type of tarfile, and the contents; of links the target."""
FILE, LINK, HARD_LINK, FOLDER = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE
Unpack = Callable[[bytes], dict[str, bytes]]
MODEL: Member = ("model.onnx", FILE, b"model")


def pack(members: Iterable[Member], mode: str = "w:") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:  # type: ignore[call-overload]
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, len(content) if kind == FILE else 0
            if kind in (LINK, HARD_LINK):
                member.linkname = content.decode()
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def files(*names: str) -> list[Member]:
    return [(name, FILE, name.encode()) for name in names]


def header(kind: bytes, size: int, name: str = "w") -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.fixture
def unpack_here(tmp_path: Path) -> Unpack:
    """Return what unpacks an archive, and returns its files; a refusal has to leave nothing."""
    here = tmp_path / "here"
    here.mkdir()
    archive, folder = here / "archive", here / "folder"

    def work(content: bytes) -> dict[str, bytes]:
        archive.write_bytes(content)
        folder.mkdir()
        try:
            paths = unpack(archive, folder)
            assert sorted(here.iterdir()) == [archive, folder]
            found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
            assert sorted(found) == paths
            contents = {name: path.read_bytes() for name, path in found.items()}
            shutil.rmtree(folder)
            return contents
        finally:
            assert list(here.iterdir()) == [archive]

    return work


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_files_are_written(compress: Callable[[bytes], bytes], unpack_here: Unpack) -> None:
    weights = os.urandom(2 * unpacking.MAX_HEADER_BYTES + 1)
    members = [MODEL, ("weights", FILE, weights), ("empty", FILE, b""), ("folder", FOLDER, b"")]
    assert unpack_here(compress(pack(members))) == {"model.onnx": b"model", "weights": weights, "empty": b""}


def test_gzip_of_several_members_is_read_to_its_end(unpack_here: Unpack) -> None:
    archive = pack([MODEL, ("w", FILE, b"w" * 10_000)])
    parts = (archive[start:end] for start, end in pairwise((0, 700, 5000, len(archive))))
    found = unpack_here(b"".join(map(gzip.compress, parts)))
    assert found == {"model.onnx": b"model", "w": b"w" * 10_000}


LAYER = [("bin", FOLDER, b""), ("bin/sh", HARD_LINK, b"bin/busybox"), ("bin/busybox", FILE, b"ELF")]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (files("models/model.onnx", "models/w", "readme"), {"model.onnx", "w"}),
        (files("a/b/model.onnx", "a/b/c/other.onnx", "a/x"), {"model.onnx", "c/other.onnx"}),
        (files("./models/model.onnx", "./models/./w"), {"model.onnx", "w"}),
        (files("models/weights", "other"), {"weights"}),
        (files("weights", "folder/more"), {"weights", "folder/more"}),
        (files("é.onnx", "w" * 200), {"é.onnx", "w" * 200}),
        (LAYER, set()),
        (LAYER + files("models/model.onnx"), {"model.onnx"}),
        ([], set()),
    ],
)
def test_paths_are_relative_to_the_models_folder(
    members: list[Member], expected: set[str], unpack_here: Unpack
) -> None:
    assert unpack_here(pack(members)).keys() == expected


def test_later_file_of_a_path_replaces_the_earlier(unpack_here: Unpack) -> None:
    assert unpack_here(pack([("model.onnx", FILE, b"old"), MODEL])) == {"model.onnx": b"model"}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (files("../model.onnx"), "leads upwards"),
        (files("a/../../b"), "leads upwards"),
        (files("/etc/passwd"), "absolute"),
        (files("a\nb"), "no text"),
        ([MODEL, ("w", LINK, b"/etc/passwd")], "is a link"),
        ([MODEL, ("w", HARD_LINK, b"model.onnx")], "is a link"),
        ([*files("m/1.onnx", "m/a/w"), ("m/a", LINK, b"/etc")], "is a link"),
        ([MODEL, ("w", tarfile.CHRTYPE, b"")], "a device"),
        ([MODEL, ("w", tarfile.FIFOTYPE, b"")], "a device"),
        ([MODEL, *files(".wh.w")], "a whiteout"),
        ([MODEL, *files("w", "w/1")], "a file and a folder"),
        ([MODEL, *files("w/1", "w")], "a file and a folder"),
        (files("a/1.onnx", "b/2.onnx"), "models in 'a' and in 'b'"),
    ],
)
def test_hostile_members_are_refused(members: list[Member], message: str, unpack_here: Unpack) -> None:
    with pytest.raises(SourceProblem, match=message):
        unpack_here(pack(members))


PLAIN_MODEL = pack([MODEL])[:1024]
PACKED = gzip.compress(pack([MODEL]), mtime=0)
SPARSE = header(tarfile.GNUTYPE_SPARSE, 0)


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        pytest.param(b"\x28\xb5\x2f\xfd" + b"x" * 1000, "zstd", id="zstd"),
        pytest.param(pack([MODEL], "w:xz"), "cannot be unpacked", id="xz"),
        pytest.param(b"<html>", "cannot be unpacked", id="no archive"),
        pytest.param(b"", "cannot be unpacked", id="empty"),
        pytest.param(pack([("model.onnx", FILE, b"m" * 5000)])[:4000], "unexpected end", id="cut"),
        pytest.param(PACKED[:60], "ended before", id="cut gzip"),
        pytest.param(PACKED[:20] + b"damage" + PACKED[26:], "cannot be unpacked", id="damaged gzip"),
        pytest.param(header(tarfile.XHDTYPE, 8 * 2**30) + bytes(2**20), "header", id="8 GiB"),
        pytest.param(header(tarfile.GNUTYPE_LONGNAME, 2 * 2**20) + bytes(2**22), "header", id="long name"),
        pytest.param(header(tarfile.GNUTYPE_LONGNAME, -2000) + bytes(2**14), "cannot", id="negative name"),
        pytest.param(PLAIN_MODEL + header(FILE, -512) + bytes(1024), "negative size", id="endless loop"),
        pytest.param(header(tarfile.XGLTYPE, 0) * 3000 + bytes(1024), "recursion", id="recursion"),
        pytest.param(PLAIN_MODEL + SPARSE + bytes(1024), "a sparse file", id="sparse"),
        pytest.param(header(FILE, 21 * 10**9) + bytes(1024), "more than 20000000000", id="bomb"),
    ],
)
def test_what_is_no_archive_is_refused(archive: bytes, message: str, unpack_here: Unpack) -> None:
    with pytest.raises(SourceProblem, match=message):
        unpack_here(archive)


def test_many_headers_for_all_members_are_refused(unpack_here: Unpack) -> None:
    records = b"".join(b"10 %04d=1\n" % number for number in range(1000, 1000 + 512))
    with pytest.raises(SourceProblem, match="more than 100 headers for all members"):
        unpack_here(header(tarfile.XGLTYPE, len(records)) + records + PLAIN_MODEL + bytes(1024))


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("MAX_MEMBERS", "more than 3 members"),
        ("MAX_FILES", "may have 3"),
        ("MAX_HEADERS_BYTES", "long names"),
    ],
)
def test_archive_beyond_a_limit_is_refused(
    limit: str, message: str, unpack_here: Unpack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking, limit, 3)
    with pytest.raises(SourceProblem, match=message):
        unpack_here(pack(files("model.onnx", "1", "2", "3")))


PARTS = ["..", ".", "", "a", "model.onnx", "models", ".wh.a", "\x00", "é"]
MEMBERS = st.tuples(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map("/".join),
    st.sampled_from([FILE, FILE, FILE, FOLDER, LINK, HARD_LINK, tarfile.CHRTYPE, tarfile.FIFOTYPE]),
    st.sampled_from([b"", b"content", b"../..", b"/etc/passwd"]),
)
MANY = settings(
    PLAIN,
    max_examples=of_both(short=50, long=5000),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@MANY
@given(st.lists(MEMBERS, max_size=6), st.binary(max_size=600), st.integers(0, 20_000))
def test_any_archive_is_unpacked_or_refused(
    unpack_here: Unpack, members: list[Member], damage: bytes, position: int
) -> None:
    """Whatever it has, nothing else is raised, and nothing is written outside of the folder."""
    archive = pack(members)
    for content in (archive, archive[:position] + damage + archive[position + len(damage) :]):
        with suppress(SourceProblem):
            unpack_here(content)
