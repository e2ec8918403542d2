"""The seam of checks before a load: each gets the load and its files, and passes them with evidence. Pure.

A reload by the system brings back bytes that were loaded before, so that a restart does not empty a machine:
no person has to allow it again, and it goes on without today's keys if its bytes were verified before. Where
several servers share a ledger, one that may sign has to have signed that: who may write to their database
could say that any bytes were loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from msgspec.structs import replace

from events.clock import Timestamp
from events.commands import Condition
from events.jobs import Failure, Job
from events.models import Model
from events.serving import AdmittedBytes
from events.statements import IsSigned, load_statement
from events.types import Contents, digest_of
from events.versions import ModelVersions
from features.facts import RecordedEvidence
from features.rules import ModelRules


class NotLoadable(Exception):
    """A load does not pass the rules; `failure` says why."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.failure = Failure(code, message)


@dataclass(frozen=True)
class CheckInput:
    """The input of the check of a version's files.

    Attributes:
        rules: of the model, where it is to be loaded.
        model: as its events say, and `versions`, too.
        contents: of the files, as the store has hashed its copy.
        read: returns the content of one of them, by its path, up to a number of bytes.
        now: the time of the load.
        is_reload: whether the files are those of a load before.
        is_signed: says whether a server that is known has signed a statement.
        version: of the files.
    """

    rules: ModelRules
    model: Model
    versions: ModelVersions
    contents: Contents
    read: Callable[[str, int], bytes]
    now: Timestamp
    is_reload: bool
    is_signed: IsSigned
    version: int | None = None

    @property
    def digest(self) -> str:
        return digest_of(self.contents)

    @cached_property
    def admitted(self) -> AdmittedBytes | None:
        """These bytes as a load of the model has admitted them, if a server that may sign has signed that.

        A load whose signature was enforced comes first.
        """
        found = sorted(
            self.model.list_admitted_bytes(self.digest), key=lambda each: not each.evidence.is_enforced
        )
        for each in found:
            if self.is_signed(load_statement(self.model.id, each), each.server_signature):
                return each
        return None


@dataclass(frozen=True, slots=True)
class CheckedLoad:
    """What a load has passed: evidence for `ModelLoaded`, and what must still hold when the load starts."""

    evidence: RecordedEvidence = field(default_factory=RecordedEvidence)
    conditions: tuple[Condition, ...] = ()

    def add(self, *conditions: Condition, **evidence: Any) -> CheckedLoad:
        return CheckedLoad(replace(self.evidence, **evidence), (*self.conditions, *conditions))


Check = Callable[[CheckInput, Job | None, CheckedLoad], CheckedLoad]
"""A check before a load: adds its evidence to what the load has passed. Pure, but for `CheckInput.read`.

Without a job the files are not to be loaded now, whoever asks.

Raises:
    NotLoadable: the load does not pass.
"""
