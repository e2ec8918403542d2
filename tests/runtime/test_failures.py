"""Each code with which a load can fail has its consequence for a reload."""

from typing import get_args

from events.errors import NotEncodable
from events.jobs import CONSEQUENCES
from runtime.errors import (
    ForkServerUnavailable,
    LoadCode,
    PrepareCode,
    UnknownModel,
    UnknownVersion,
    WorkerDied,
)
from runtime.lookups import RepositoryBusy
from runtime.modeldefaults import InvalidDefaults
from runtime.repository import UnsafeFile
from runtime.store.problems import DiskFull, RepositoryUnreadable, StoreFull, StoreUnavailable


def test_every_code_of_a_failed_load_has_a_consequence() -> None:
    problems = (
        *(ForkServerUnavailable, UnknownModel, UnknownVersion, WorkerDied, InvalidDefaults, UnsafeFile),
        *(DiskFull, RepositoryBusy, RepositoryUnreadable, StoreFull, StoreUnavailable, NotEncodable),
    )
    refusals = set(get_args(LoadCode)) - set(get_args(PrepareCode))
    assert {problem.code for problem in problems} | refusals <= CONSEQUENCES.keys()
