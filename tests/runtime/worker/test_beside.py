"""What is known of the memory that a load took, in a process that never took any before."""

import subprocess
import sys
from pathlib import Path

import pytest

TAKEN = 64 * 2**20
WATCHED = f"""
import mmap, sys
from runtime.worker.beside import Beside
from runtime.memory import resident

before = resident().anonymous_bytes
with open(sys.argv[1], "rb") as file, Beside(watched=False) as beside:
    for _ in range(int(sys.argv[2])):
        block = mmap.mmap(-1, {TAKEN}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for place in range(0, {TAKEN}, 4096):
            block[place] = 1
        block.close()
    weights = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
    for place in range(0, len(weights), 4096):
        weights[place]
print(beside.peak_anonymous_bytes - before)
"""


@pytest.mark.parametrize("times", [0, 1], ids=["nothing", "something"])
@pytest.mark.parametrize("mapped", [2**20, 2 * TAKEN], ids=["short_file", "long_file"])
def test_memory_that_was_given_back_counts_but_for_what_files_may_hide(
    tmp_path: Path, times: int, mapped: int
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(mapped))
    command = [sys.executable, "-c", WATCHED, str(file), str(times)]
    ran = subprocess.run(command, check=True, capture_output=True, timeout=60)
    seen, took = int(ran.stdout), times * TAKEN
    assert took - mapped - 2**22 < seen < took + 2**22
