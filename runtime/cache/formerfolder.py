"""Removal of the folder in which the release before kept its cached models."""

import logging
import os
import re
import stat
from pathlib import Path

from runtime.store.folder import remove

FOLDER = "prepared"
"""Its name in the data directory."""
_OURS = re.compile(r"[0-9a-f]{64}|draft-[0-9a-f]{16}-[0-9a-f]{8}", re.ASCII)

_log = logging.getLogger(__name__)


def remove_former_folder(data: Path) -> None:
    """Remove what the release before has left there, and the folder if nothing else is in it.

    It was only a cache. A link, or another user's folder, is left alone.
    """
    folder = data / FOLDER
    try:
        seen = folder.lstat()
        if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.geteuid():
            return
        ours = [path for path in folder.iterdir() if _OURS.fullmatch(path.name)]
        for path in ours:
            remove(path)
        folder.rmdir()
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            _log.warning("%s, where the release before kept prepared models, stays: %s", folder, error)
        return
    _log.info("%s is removed: prepared models are now kept in the store, and made anew", folder)
