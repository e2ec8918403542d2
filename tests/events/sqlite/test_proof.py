"""The ids that `verify` keeps in a temporary file."""

import subprocess
from pathlib import Path

from support.history import child

from events.sqlite.proof import KnownIds

FILL = """
import resource
from events.errors import LogUnavailable
from events.sqlite.proof import KnownIds
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
try:
    KnownIds().add([f"{each:036}" for each in range(10**5)])
except LogUnavailable as error:
    print(error.code, error)
"""


def test_ids_are_added_up_to_the_first_known_one() -> None:
    ids = KnownIds()
    assert ids.add(["a", "b"]) == 2
    assert ids.add(["c", "a", "d"]) == 1
    assert ids.add(["d"]) == 1


def test_full_disk_is_said_with_what_to_do(tmp_path: Path) -> None:
    done = subprocess.run(
        child(FILL), env={"SQLITE_TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("log_unavailable the events' ids cannot be kept in a temporary file: ")
    assert "SQLITE_TMPDIR" in done.stdout
    assert list(tmp_path.iterdir()) == []
