"""Memory of processes, from /proc's texts and from the real thing."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.memory import tree_bytes
from runtime.memory import (
    data_bytes,
    descendants,
    parse_field,
    parse_private,
    private_bytes,
)

ROLLUP = """\
55cf01eef000-7ffd3aff2000 ---p 00000000 00:00 0                          [rollup]
Rss:               10240 kB
Pss:                5000 kB
Pss_Dirty:          4000 kB
Shared_Clean:       3000 kB
Private_Clean:       100 kB
Private_Dirty:      2000 kB
Private_Hugetlb:      24 kB
Swap:                  0 kB
"""

NEST = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "print('ready', flush=True); input()"], stdin=subprocess.PIPE)
input()
child.communicate(b"\\n")
"""


def test_private_pages_are_summed_but_for_those_that_their_file_has() -> None:
    assert parse_private(ROLLUP) == 2024 * 1024


def test_field_that_is_not_there_is_nothing() -> None:
    assert parse_field(ROLLUP, "VmData") == 0


def test_own_memory_grows_by_what_is_touched() -> None:
    size = 32 * 2**20
    private, data = private_bytes(), data_bytes()
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block[:] = bytes(size)
        assert private_bytes() - private > 0.9 * size
        assert data_bytes() - data > 0.9 * size


def test_own_memory_does_not_grow_by_what_is_mapped_and_only_read(tmp_path: Path) -> None:
    size = 32 * 2**20
    with (tmp_path / "file").open("wb") as written:
        written.write(os.urandom(size))
        os.fsync(written.fileno())  # until then, they are not as their file has them
    private = private_bytes()
    with (tmp_path / "file").open("rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE) as block:
        assert sum(block[::4096]) > 0
        assert private_bytes() - private < 0.1 * size


def test_descendants_are_found_beneath_their_parents() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", NEST], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"  # from the grandchild
        found = descendants(child.pid)
        assert len(found) == 1
        assert set(descendants(os.getpid())) >= {child.pid, *found}
        own, of_child = tree_bytes(os.getpid()), tree_bytes(child.pid)
        assert own > of_child > tree_bytes(found[0]) > 0
        child.communicate(b"\n")


def test_process_that_is_gone_is_an_error() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    with pytest.raises(ProcessLookupError):
        private_bytes(child.pid)
    assert descendants(child.pid) == []
