"""Leak check of a test run: processes, shared memory and sockets. The run fails for each (conftest.py).

Each process of a run has `MARK` in its environment: a server passes variables of that kind (LC_*) on to its
fork server, and so to all workers. So runs beside each other do not find each other's.
"""

import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir

from support.subreaper import parent_of

MARK = "LC_LOADLEDGER_TEST_RUN"
RUN = os.environ.setdefault(MARK, f"{os.getpid()}-{secrets.token_hex(4)}")
"""Of the controlling process, which the others inherit."""
MARKED = {MARK: RUN}
"""For environments that are made from nothing."""
MEMORY = Path("/dev/shm")
NAME = "loadledger-"
"""Begins the names of files that tests have in shared memory; the run's own have `RUN` in them, too."""
LIMIT_S = 30.0
"""For what has been told to end: the kernel takes its time on a busy machine."""
STARTED_S = time.time()


def fast_folder() -> Path | None:
    """Return the run's folder in memory, for files that are synced often; None if there is none."""
    if not os.access(MEMORY, os.W_OK):
        return None
    folder = MEMORY / f"{NAME}{RUN}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def find_leaks() -> list[str]:
    """Return what this run has left, once nothing of it is about to end; in sentences."""
    folder = fast_folder()
    if folder is not None:
        with suppress(OSError):  # it is not empty, and so a leak
            folder.rmdir()
    deadline = time.monotonic() + LIMIT_S
    while list(find_processes(RUN)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [
        *(f"process {pid}: {command}" for pid, command in find_processes(RUN)),
        *(f"shared memory: {path}" for path in find_memory_files()),
        *(f"socket of no process: {path}" for path in find_sockets()),
    ]


def find_processes(run: str) -> Iterator[tuple[int, str]]:
    """Yield the processes of a run, but this one and its parents, with their command lines."""
    wanted, own = f"{MARK}={run}".encode(), {*_ancestors(os.getpid())}
    for entry in Path("/proc").iterdir():
        with suppress(OSError):  # it has ended, or it is another user's
            if not entry.name.isdigit() or int(entry.name) in own:
                continue
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                yield int(entry.name), command.decode(errors="replace")


def _ancestors(pid: int) -> Iterator[int]:
    while pid:
        yield pid
        pid = parent_of(str(pid))


def find_memory_files() -> Iterator[Path]:
    """Yield what has the run's name in shared memory, and new files there that no process has open."""
    for path in MEMORY.iterdir() if MEMORY.is_dir() else ():
        with suppress(FileNotFoundError):  # another's, which is gone
            is_unused = path.is_file() and _is_new(path) and not _is_open(path)
            if RUN in path.name or (is_unused and not path.name.startswith(NAME)):
                yield path


def find_sockets() -> Iterator[Path]:
    """Yield the new sockets for temporary files, or in a folder there, that no process listens to."""
    bound = {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()}
    temporary = Path(gettempdir())
    for path in (*temporary.glob("*"), *temporary.glob("*/*")):
        with suppress(OSError):  # it is gone, or another user's
            if stat.S_ISSOCK(path.lstat().st_mode) and _is_new(path) and str(path) not in bound:
                yield path


def _is_new(path: Path) -> bool:
    found = path.lstat()
    return found.st_uid == os.geteuid() and found.st_ctime >= STARTED_S


def _is_open(path: Path) -> bool:
    return any(str(path) in text for text in _maps()) or any(each == path for each in _descriptors())


def _maps() -> Iterator[str]:
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            yield maps.read_text(errors="replace")


def _descriptors() -> Iterator[Path]:
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with suppress(OSError):
            for descriptor in folder.iterdir():
                with suppress(OSError):
                    yield descriptor.readlink()
