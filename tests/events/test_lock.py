"""One process a data directory, by a lock that the kernel gives back."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from support.events import child

from events.errors import DataInUse
from events.lock import hold

HOLD = """
import sys
from pathlib import Path
from events.lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(data: Path) -> subprocess.Popen[str]:
    """Start a process that holds the lock until its input ends; returns when it does."""
    process = subprocess.Popen(child(HOLD, data), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_holder_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        with pytest.raises(DataInUse) as raised, hold(tmp_path):
            pass
        assert raised.value.code == "data_in_use"
        assert f"process {process.pid};" in str(raised.value)
        assert str(tmp_path) in str(raised.value)
        process.communicate()


def test_the_lock_is_free_when_its_holder_was_killed(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with hold(tmp_path):
            assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_the_lock_is_free_when_its_holder_is_done(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.communicate()
    for _ in range(2):
        with hold(tmp_path):
            pass


def test_the_lock_is_free_after_an_error_inside(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), hold(tmp_path):
        raise ZeroDivisionError
    with hold(tmp_path):
        pass


def test_a_process_is_refused_its_own_second_hold(tmp_path: Path) -> None:
    with hold(tmp_path), pytest.raises(DataInUse, match=f"process {os.getpid()};"), hold(tmp_path):
        pass


def test_a_refusal_leaves_the_name_of_the_holder(tmp_path: Path) -> None:
    with hold(tmp_path):
        for _ in range(2):
            with pytest.raises(DataInUse), hold(tmp_path):
                pass
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_a_long_pid_of_before_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("99999999999999999999\n")
    with hold(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_the_lock_is_for_its_owner_alone_and_is_not_inherited(tmp_path: Path) -> None:
    with hold(tmp_path):
        assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600
        inherited = subprocess.run(["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, check=True)
        assert str(tmp_path) not in inherited.stdout


def test_other_directories_have_locks_of_their_own(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    with hold(tmp_path / "one"), hold(tmp_path / "other"):
        pass
