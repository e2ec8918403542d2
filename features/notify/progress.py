"""The progress of a receiver: how far it has acknowledged events, in a file for each."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import msgspec

from events.files import write_file

FOLDER = "notify"
"""In the data directory."""


class Progress(msgspec.Struct, frozen=True, gc=False):
    """All events up to `position` were acknowledged, or come before the receiver's first one.

    Attributes:
        hash: of the event at the position, in hexadecimal; empty if that is not known.
    """

    position: int
    hash: str = ""

    def encode(self) -> bytes:
        return msgspec.json.encode(self)


_DECODER = msgspec.json.Decoder(Progress)


def find_latest(own: Progress | None, left: Iterable[str]) -> Progress | None:
    """Return the latest progress: this server's own, or one that others left; other texts are none."""
    latest = own
    for text in left:
        with suppress(ValueError):
            other = _DECODER.decode(text)
            latest = other if latest is None or other.position > latest.position else latest
    return latest


def read_progress(path: Path) -> Progress | None:
    """Return the progress in a file; None without a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it has something else.
    """
    try:
        return _DECODER.decode(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        why = f"{path} does not say how far the receiver has events: {error}"
        raise ValueError(f"{why}; restore it, or delete it to begin anew") from None


def write_progress(path: Path, progress: Progress) -> None:
    """Replace the file, durably.

    Raises:
        OSError: it cannot be written.
        WrongTarget: `wrong_target`, something else has its name.
    """
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with write_file(path, replace=True) as file:
        file.write(progress.encode())
