"""Records which tests enter which functions of the product, in all processes of a run; for `tools.mutants`.

Each Python process with `FOLDER` in its environment imports it at its start, so it imports little. It is a
plugin of pytest, too. Variables whose names begin with LC_ reach workers: a server passes them on.
"""

import os
import sys
from contextlib import suppress
from types import CodeType
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep  # noqa: PTH100, PTH120 - as above
FOLDER = "LC_CALLTRACE"
"""The folder of the records: a file for each process."""
TEST = "LC_CALLTRACE_TEST"
"""The test that runs in pytest's process, which others inherit."""
PACKAGES = ("answers", "events", "features", "loadledger", "nodes", "runtime", "server")
HIGH = 500
"""The least descriptor of the file: a process that closes those that it inherits does not soon reuse it."""


class Recorder:
    """Writes a line for each function when a test first enters it: the test, the path, the qualified name.

    A `=` before the test says that the function was entered in pytest's process. In another process, the test
    is the one that started it: a later test of the same module may have entered the function.
    """

    _mark = ""
    _once: Any
    _restart: Any
    _file: int

    def __init__(self, folder: str) -> None:
        from fcntl import F_DUPFD_CLOEXEC, fcntl  # noqa: PLC0415 - only where something is recorded

        path = os.path.join(folder, f"{os.getpid()}-{os.urandom(4).hex()}")  # noqa: PTH118
        low = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._file = fcntl(low, F_DUPFD_CLOEXEC, HIGH)
        os.close(low)
        if sys.version_info >= (3, 12):
            self._once, self._restart = sys.monitoring.DISABLE, sys.monitoring.restart_events
            tool, entered = sys.monitoring.PROFILER_ID, sys.monitoring.events.PY_START
            sys.monitoring.use_tool_id(tool, "calltrace")
            sys.monitoring.register_callback(tool, entered, self._record)
            sys.monitoring.set_events(tool, entered)
        else:
            raise RuntimeError("calls are recorded by sys.monitoring, which Python 3.12 and later have")

    def _record(self, code: CodeType, _offset: int) -> Any:
        path = code.co_filename
        if path.startswith(ROOT) and path[len(ROOT) :].startswith(PACKAGES):
            test = self._mark + os.environ.get(TEST, "")
            with suppress(OSError):  # the process closed the file
                os.write(self._file, f"{test}\t{path[len(ROOT) :]}\t{code.co_qualname}\n".encode())
        return self._once

    def begin(self, test: str) -> None:
        """Record what this test enters, in this process, which is pytest's."""
        self._mark = "="
        os.environ[TEST] = test
        self._restart()


RECORDER = Recorder(os.environ[FOLDER]) if FOLDER in os.environ else None


def pytest_runtest_logstart(nodeid: str) -> None:
    """Begin to record for a test, before its fixtures are set up."""
    if RECORDER is not None:
        RECORDER.begin(nodeid)
