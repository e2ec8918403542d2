"""One process per data directory, by a lock that the kernel releases."""

import os
import signal
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
from support.history import child

from events.errors import DataInUse, WrongTarget
from events.sqlite.datalock import lock_data, lock_ledger

HOLD = """
import sys
from pathlib import Path
from events.sqlite.datalock import lock_data
with lock_data(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(data: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(child(HOLD, data), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("end", [signal.SIGKILL, None])
def test_second_holder_is_refused_until_the_first_ends(tmp_path: Path, end: signal.Signals | None) -> None:
    (tmp_path / "lock").write_text("99999999999999999999\n")  # a longer pid leaves nothing behind
    with holder(tmp_path) as process:
        for _ in range(2):
            with pytest.raises(DataInUse) as raised, lock_data(tmp_path):
                pass
            assert raised.value.code == "data_in_use"
            assert f"process {process.pid};" in str(raised.value)
            assert str(tmp_path) in str(raised.value)
        assert (tmp_path / "lock").read_text() == f"{process.pid}\n"
        if end is not None:
            process.send_signal(end)
        process.communicate()
        with lock_data(tmp_path):
            assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_lock_is_free_after_error_inside(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock_data(tmp_path):
        raise ZeroDivisionError
    with lock_data(tmp_path), pytest.raises(DataInUse, match=f"process {os.getpid()};"), lock_data(tmp_path):
        pass


def test_lock_file_is_private_and_not_inherited(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with lock_data(tmp_path), lock_data(other):
        assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600
        inherited = subprocess.run(["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, check=True)
        assert str(tmp_path) not in inherited.stdout


def test_hard_link_of_ledger_is_locked_too(tmp_path: Path) -> None:
    ledger, link = tmp_path / "ledger.db", tmp_path / "link.db"
    with lock_ledger(ledger):
        link.hardlink_to(ledger)
        with pytest.raises(DataInUse, match="hard link") as raised, lock_ledger(link):
            pass
        assert str(link) in str(raised.value)
        with closing(sqlite3.connect(link)) as connection:  # SQLite locks other bytes
            connection.execute("CREATE TABLE t (x)")
    with lock_ledger(link):
        pass


def test_lock_that_is_a_link_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WrongTarget, match=r"lock is a symbolic link.*remove it"), lock_data(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()
