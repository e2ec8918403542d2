"""Each code with which a load can fail has its consequence for a reload."""

from typing import get_args

import pytest

from events.errors import NotEncodable
from events.jobs import CONSEQUENCES
from runtime import errors
from runtime.errors import LoadCode, hide_folders
from runtime.repository import InvalidDefaults, RepositoryBusy


def test_every_code_of_a_failed_load_has_a_consequence() -> None:
    problems = (
        *(errors.ForkServerUnavailable, errors.UnknownModel, errors.UnknownVersion, errors.WorkerDied),
        *(errors.DiskFull, errors.RepositoryUnreadable, errors.StoreUnavailable, NotEncodable),
        *(InvalidDefaults, RepositoryBusy),
    )
    refusals = set(get_args(LoadCode))
    assert {problem.code for problem in problems} | refusals | {"store_full"} <= CONSEQUENCES.keys()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Load model from /srv/models/m/1/model.onnx failed", "Load model from m/1/model.onnx failed"),
        ("no file '/data/store/versions/ab/files/w.bin'", "no file 'versions/ab/files/w.bin'"),
        ("the store in /data/store cannot be used", "the store in … cannot be used"),
        ("/srv/models: Permission denied; /srv/models/", "…: Permission denied; …"),
        ("/srv/modelsize, /mnt/srv/models/x", "/srv/modelsize, /mnt/srv/models/x"),
        ('File "/data/store/extra/x.py", line 3', 'File "x.py", line 3'),
        ("node /layer1/conv/Conv failed", "node /layer1/conv/Conv failed"),
    ],
)  # fmt: skip
def test_paths_in_messages_become_relative(text: str, expected: str) -> None:
    assert hide_folders(text, ("/srv/models/", "/data/store", "/data/store/extra")) == expected
