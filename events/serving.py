"""A load that a model serves from: its workers, its bytes, and what these passed. Pure."""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from events.clock import Timestamp
from events.jobs import Job
from events.types import (
    ALLOW,
    Cause,
    Event,
    LoadedFile,
    LoadParameters,
    ModelLoaded,
    contents_of,
    digest_of,
)
from features.facts import STORED_NAMES, LoadEvidence, ServerSignature, TargetUse

INDEPENDENT = "independent"
"""The `rows` of a load whose rows do not change each other's answers, whatever they are."""


class Serving(Struct, frozen=True, gc=False, rename=STORED_NAMES):
    """The load that a model serves from, is being unloaded from, or lost.

    Attributes:
        position: of its `ModelLoaded`.
        worker_ids: of the workers that are left.
        memory_bytes: the sum of all workers', like `peak_memory_bytes`.
        degraded_at: when the incident began in which workers died; None while all are left.
        kept_as_is: whether its repair was cancelled or has no room, so that it stays degraded.
        threads: of each worker.
        asked_by: who asked for the model that the system brought back; None where `loaded_by` did.
        brought_back: the cause of that reload.
        evidence, server_signature, targets, rows, rows_depend: as `ModelLoaded` has them; not stored without.
        earlier: what a load of the same bytes had passed that this one brought back under fewer rules; not
            stored without.
    """

    load_job_id: str
    version: int
    position: int
    loaded_at: Timestamp
    loaded_by: str
    worker_ids: tuple[str, ...]
    files: tuple[LoadedFile, ...]
    memory_bytes: int
    peak_memory_bytes: int
    parameters: LoadParameters
    degraded_at: Timestamp | None = None
    kept_as_is: bool = False
    threads: int | None = None
    asked_by: str | None = None
    brought_back: Cause | None = None
    at: str | UnsetType = UNSET
    evidence: LoadEvidence | UnsetType = UNSET
    server_signature: ServerSignature | UnsetType = UNSET
    targets: tuple[TargetUse, ...] | UnsetType = UNSET
    earlier: AdmittedBytes | UnsetType = UNSET
    rows: str | UnsetType = UNSET
    rows_depend: str | UnsetType = UNSET

    @property
    def joins_requests(self) -> bool:
        """Whether requests of several clients run together as rows of one batch."""
        allowed = self.rows in (UNSET, INDEPENDENT) or self.parameters.dependent_rows == ALLOW
        return self.parameters.max_batch_size > 1 and allowed

    @property
    def digest(self) -> str:
        return digest_of(contents_of(self.files))

    @property
    def passed(self) -> AdmittedBytes:
        """The checks that its bytes passed, as its server has signed them."""
        evidence = self.evidence or LoadEvidence()
        return AdmittedBytes(self.digest, self.load_job_id, self.version, evidence, self.server_signature)

    @property
    def server(self) -> str | None:
        """The server of its workers, or of those that died; None if that has ended, and at a server alone."""
        return None if self.at is UNSET else self.at

    def is_copy_of(self, first: Serving) -> bool:
        """Whether it has the bytes and the parameters of another load."""
        has_bytes = self.files == first.files or contents_of(self.files) == contents_of(first.files)
        is_same = self.version == first.version and has_bytes
        return is_same and self.parameters.has_same_workers(first.parameters)

    def without_server(self) -> Serving:
        """Return it after the end of its server: its workers are at none."""
        return self if self.at is UNSET else replace(self, at=UNSET)


class AdmittedBytes(Struct, frozen=True, gc=False, rename=STORED_NAMES):
    """Bytes that a model was loaded from, and what they passed; as `ModelLoaded` has it.

    `digest` is that of the files, and `job_id` of the load.
    """

    digest: str
    job_id: str
    version: int
    evidence: LoadEvidence
    server_signature: ServerSignature | UnsetType = UNSET


def make_serving(event: Event, data: ModelLoaded, job: Job) -> Serving | None:
    """Return the load of a `ModelLoaded` as it begins to serve; None if the job is no load of a version."""
    if job.load is None or event.version is None:
        return None
    return Serving(
        load_job_id=job.id,
        version=event.version,
        position=event.position,
        loaded_at=event.recorded_at,
        loaded_by=job.requested_by,
        worker_ids=data.worker_ids,
        files=data.files,
        memory_bytes=data.memory_bytes,
        peak_memory_bytes=data.peak_memory_bytes,
        parameters=job.load,
        threads=data.threads,
        at=data.server,
        evidence=data.evidence or UNSET,
        server_signature=data.server_signature,
        targets=data.targets,
        rows=data.rows,
        rows_depend=data.rows_depend,
    )
