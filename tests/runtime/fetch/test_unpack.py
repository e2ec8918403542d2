import gzip
import io
import os
import platform
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fleet import of_both
from support.frames import read_archive
from support.history import PLAIN
from support.workers import LIMIT_S

from runtime.fetch.messages import PIECE_BYTES, Failed
from runtime.fetch.unpack import MAX_DATA_BYTES, ArchiveRefused, unpack
from runtime.worker import landlock, seccomp

Member = tuple[str, bytes, bytes]
"""A name, a type of tarfile, and the contents; of links the target."""
FILE, LINK, FOLDER = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE


def pack(members: Iterable[Member], mode: str = "w:") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:  # type: ignore[call-overload]
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, len(content) if kind == FILE else 0
            if kind in (LINK, tarfile.LNKTYPE):
                member.linkname = content.decode()
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def files(**contents: bytes) -> list[Member]:
    return [(name.replace("__", "/").replace("_", "."), FILE, content) for name, content in contents.items()]


def run_process(archive: bytes, tmp_path: Path) -> dict[str, bytes] | Failed:
    """Unpack in a process, as the server does."""
    file = tmp_path / "archive"
    file.write_bytes(archive)
    with file.open("rb") as opened:
        done = subprocess.run(
            (sys.executable, "-m", "runtime.fetch.unpack"),
            stdin=opened,
            capture_output=True,
            timeout=LIMIT_S,
            check=True,
        )
    assert not done.stderr
    return read_archive(done.stdout)


def unpack_here(archive: bytes) -> dict[str, bytes] | Failed:
    return read_archive(b"".join(unpack(io.BytesIO(archive))))


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_process_sends_files_of_archive(compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    weights = os.urandom(2 * PIECE_BYTES + 1)
    archive = pack([*files(model_onnx=b"model", weights=weights, empty=b""), ("folder", FOLDER, b"")])
    found = run_process(compress(archive), tmp_path)
    assert found == {"model.onnx": b"model", "weights": weights, "empty": b""}


def test_gzip_of_several_members_is_read_to_its_end() -> None:
    archive = pack(files(model_onnx=b"model", weights=b"w" * 10_000))
    parts = (archive[start:end] for start, end in pairwise((0, 700, 5000, len(archive))))
    assert unpack_here(b"".join(map(gzip.compress, parts))) == {
        "model.onnx": b"model",
        "weights": b"w" * 10_000,
    }


LAYER = [("bin", FOLDER, b""), ("bin/sh", tarfile.LNKTYPE, b"bin/busybox"), ("bin/busybox", FILE, b"ELF")]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (files(models__model_onnx=b"1", models__w=b"2", readme=b"3"), {"model.onnx", "w"}),
        (files(a__b__model_onnx=b"1", a__b__c__other_onnx=b"2", a__x=b"3"), {"model.onnx", "c/other.onnx"}),
        ([("./models/model.onnx", FILE, b"1"), ("./models/./w", FILE, b"2")], {"model.onnx", "w"}),
        (files(models__weights=b"1", other=b"2"), {"weights"}),
        (files(weights=b"1", folder__more=b"2"), {"weights", "folder/more"}),
        (LAYER, set[str]()),
        (LAYER + files(models__model_onnx=b"1"), {"model.onnx"}),
        ([], set[str]()),
    ],
)
def test_paths_are_relative_to_the_models_folder(members: list[Member], expected: set[str]) -> None:
    found = unpack_here(pack(members))
    assert isinstance(found, dict)
    assert found.keys() == expected


def test_later_file_of_a_path_replaces_the_earlier() -> None:
    assert unpack_here(pack(files(model_onnx=b"old") + files(model_onnx=b"new"))) == {"model.onnx": b"new"}


MODEL = files(model_onnx=b"model")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("../model.onnx", FILE, b"")], "leads upwards"),
        ([("a/../../b", FILE, b"")], "leads upwards"),
        ([("/etc/passwd", FILE, b"")], "absolute"),
        ([("a\nb", FILE, b"")], "no text"),
        ([*MODEL, ("w", LINK, b"/etc/passwd")], "is a link"),
        ([*MODEL, ("w", tarfile.LNKTYPE, b"model.onnx")], "is a link"),
        ([*MODEL, ("w", tarfile.CHRTYPE, b"")], "a device"),
        ([*MODEL, ("w", tarfile.FIFOTYPE, b"")], "a device"),
        ([*MODEL, (".wh.w", FILE, b"")], "a whiteout"),
        (files(a__model_onnx=b"", b__model_onnx=b""), "models in 'a' and in 'b'"),
    ],
)
def test_unpack_refuses_hostile_members(members: list[Member], message: str) -> None:
    with pytest.raises(ArchiveRefused, match=message) as refused:
        unpack_here(pack(members))
    assert refused.value.code == "source_invalid"


PACKED = gzip.compress(pack(MODEL), mtime=0)


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        pytest.param(b"\x28\xb5\x2f\xfd" + b"x" * 1000, "zstd", id="zstd"),
        pytest.param(pack(MODEL, "w:xz"), "cannot be unpacked", id="xz"),
        pytest.param(b"", "cannot be unpacked", id="empty"),
        pytest.param(pack(files(model_onnx=b"m" * 5000))[:4000], "unexpected end of data", id="cut"),
        pytest.param(PACKED[:60], "ended before", id="cut gzip"),
        pytest.param(PACKED[:20] + b"damage" + PACKED[26:], "cannot be unpacked", id="damaged gzip"),
    ],
)
def test_process_refuses_what_is_no_archive(archive: bytes, message: str, tmp_path: Path) -> None:
    failed = run_process(archive, tmp_path)
    assert isinstance(failed, Failed)
    assert failed.code == "source_invalid"
    assert message in failed.message


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_header_beyond_its_memory_ends_the_process_alone(kind: bytes, tmp_path: Path) -> None:
    header = tarfile.TarInfo("header")
    header.type, header.size = kind, 2 * MAX_DATA_BYTES
    file = tmp_path / "archive"
    with gzip.open(file, "wb", compresslevel=1) as packed:
        packed.write(header.tobuf())
        for _ in range(2):
            packed.write(bytes(MAX_DATA_BYTES))
    failed = run_process(file.read_bytes(), tmp_path)
    assert isinstance(failed, Failed)
    assert "256 MiB" in failed.message


@pytest.mark.parametrize(
    "act", ["open('/etc/hostname')", "socket.socket()", "os.fork()", "os.kill(os.getppid(), 0)"]
)
def test_confined_process_is_refused(act: str) -> None:
    if landlock.find_abi() == 0 or platform.machine() not in seccomp.MACHINES:
        pytest.skip("this kernel has no Landlock, or there is no table of its system calls")
    script = f"import os, socket; from runtime.fetch.unpack import confine; confine(); {act}"
    command = (sys.executable, "-c", script)
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert "PermissionError" in done.stderr


MANY = settings(PLAIN, max_examples=of_both(short=200, long=5000))
PARTS = ["..", ".", "", "a", "model.onnx", "models", ".wh.a", "\x00", "é"]
MEMBERS = st.tuples(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map("/".join),
    st.sampled_from([FILE, FILE, FILE, FOLDER, LINK, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]),
    st.sampled_from([b"", b"content", b"../..", b"/etc/passwd"]),
)


data_filter = getattr(tarfile, "data_filter", lambda member, _: member)
"""The standard library's rule, which Python before 3.11.4 does not have."""


@MANY
@given(st.lists(MEMBERS, max_size=6))
def test_no_emitted_path_leaves_the_folder(members: list[Member]) -> None:
    try:
        found = unpack_here(pack(members))
    except ArchiveRefused:
        return
    assert isinstance(found, dict)
    for name in found:
        path = PurePosixPath(name)
        assert not path.is_absolute()
        assert ".." not in path.parts
        assert data_filter(tarfile.TarInfo(name), "/nonexistent").name == name


@MANY
@given(st.binary(max_size=2000), st.integers(0, 1500))
def test_damage_is_an_error_that_the_process_reports(damage: bytes, position: int) -> None:
    archive = pack(files(model_onnx=b"m" * 600, w=b"w"))
    damaged = archive[:position] + damage + archive[position + len(damage) :]
    with suppress(ArchiveRefused, tarfile.TarError, OSError, EOFError, ValueError):
        unpack_here(damaged)
