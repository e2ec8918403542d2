"""What happens to a server whose stdin, stdout or stderr was closed by who started it."""

import os
import sys
from pathlib import Path

import pytest

from server.serve import _fill_standard_streams


def test_what_was_closed_of_the_standard_streams_is_opened_before_anything_else_gets_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as it is in a process that begins so
    kept = [os.dup(number) for number in range(3)]
    try:
        for number in (0, 2):
            os.close(number)
        _fill_standard_streams()
        opened = [os.path.sameopenfile(number, kept[1]) for number in range(3)]
        devices = [os.fstat(number).st_rdev for number in (0, 2)]
        sys.stdout.flush()
    finally:
        for number, copy in enumerate(kept):
            os.dup2(copy, number)
            os.close(copy)
    assert opened[1]  # that was there
    assert devices == [Path(os.devnull).stat().st_rdev] * 2
