"""Facts and requests of the system, as the consumer and its loads append them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

from msgspec import UnsetType
from msgspec.structs import replace

from events.clock import uuid7
from events.commands import Condition, NodeCurrent, Record, RequestLoad, RequestUnload
from events.jobs import CRASH_LOOP, Job, JobStatus
from events.log import Log
from events.models import LoadedModel
from events.types import (
    SYSTEM,
    Cause,
    Data,
    Draft,
    LoadFailed,
    LoadPlaced,
    LoadRequested,
    LoadStarted,
    ModelLoaded,
    ModelSettingsChanged,
    UnloadRequested,
    WorkerExited,
)
from runtime.errors import hide_folders
from runtime.scheduler import actions
from runtime.timeouts import PROGRESS_TIMEOUT_S
from runtime.wire import plain_text

RELOAD_TIMEOUT_S = 300
"""Least timeout of a reload: the default of a person's load."""


def draft_fact(job: Job, data: Data, worker_id: str | None = None) -> Draft:
    """Return a draft of a fact about a job, and the worker of its load if it has only one."""
    return Draft(uuid7(), data, SYSTEM, job.id, job.model_id, job.version, worker_id)


def draft_settings_change(job: Job, load_job_id: str) -> Draft:
    """Return the outcome of a load of what that load has loaded already."""
    _, parameters = job.load_order
    return draft_fact(job, ModelSettingsChanged.of(load_job_id, parameters))


def draft_load_start(job: Job, *, is_restarted: bool) -> Draft:
    """Return `LoadStarted` of a job; a start after a new estimate is in the same attempt."""
    is_same_attempt = is_restarted and job.status is JobStatus.IN_PROGRESS
    return draft_fact(job, LoadStarted(job.attempt if is_same_attempt else job.attempt + 1))


def draft_replacement_unload(
    load_job_id: str, model_id: str, version: int, worker_id: str | None, cause_event_id: str
) -> Draft:
    """Return the unload request of a load of this server that another load of its model replaces."""
    request = UnloadRequested(
        force=False, load_job_id=load_job_id, cause=Cause.SWAP, cause_event_id=cause_event_id
    )
    swap_id = uuid7()
    return Draft(swap_id, request, SYSTEM, swap_id, model_id, version, worker_id)


def draft_moved_unload(old: LoadedModel, job: Job, cause_event_id: str, new_id: Callable[[], str]) -> Draft:
    """Return the unload request of a load at another node that this job replaces: that node unloads it."""
    cause = Cause.DRAIN if job.cause is Cause.DRAIN else Cause.SWAP
    request = UnloadRequested(
        force=False,
        load_job_id=old.serving.load_job_id,
        cause=cause,
        cause_event_id=cause_event_id,
        node_id=old.serving.node,
    )
    worker_ids, unload_id = old.serving.worker_ids, new_id()
    worker_id = worker_ids[0] if len(worker_ids) == 1 else None
    return Draft(unload_id, request, SYSTEM, unload_id, old.id, old.serving.version, worker_id)


def draft_placement(action: actions.PlaceLoad) -> Draft:
    data = LoadPlaced(action.node.id, action.node.epoch, action.reason, action.files)
    return draft_fact(action.job, data)


def name_node(draft: Draft, node_id: str) -> Draft:
    """Return a draft with this node, at which its workers are, unless it names another."""
    match draft.data:
        case LoadStarted() | ModelLoaded() | WorkerExited() | UnloadRequested(node_id=UnsetType()):
            return replace(draft, data=replace(draft.data, node_id=node_id))
    return draft


def draft_crash_loop(model: LoadedModel, message: str) -> tuple[Draft, Draft]:
    """Return the request and the failure of a reload that a crash loop prevents."""
    serving = model.serving
    job_id, version = uuid7(), serving.version
    request = LoadRequested.of(serving.parameters, Cause.RECOVERY)
    failed = LoadFailed(CRASH_LOOP, plain_text(message))
    return (
        Draft(job_id, request, SYSTEM, job_id, model.id, version),
        Draft(uuid7(), failed, SYSTEM, job_id, model.id, version),
    )


def build_reload(
    model: LoadedModel,
    cause: Cause,
    conditions: tuple[Condition, ...],
    progress_timeout_s: int = PROGRESS_TIMEOUT_S,
) -> RequestLoad:
    """Return the request with which the system reloads a model; its limits are at least the server's."""
    serving = model.serving
    before = serving.parameters
    # Many may be requested at once: a short timeout was not meant for the queue after a restart.
    parameters = replace(
        before,
        timeout_s=max(before.timeout_s, RELOAD_TIMEOUT_S),
        progress_timeout_s=max(before.progress_timeout_s or 0, progress_timeout_s),
    )
    return RequestLoad(model.id, serving.version, None, SYSTEM, parameters, cause, conditions=conditions)


def build_unload(action: actions.UnloadAutomatically, conditions: tuple[Condition, ...]) -> RequestUnload:
    return RequestUnload(
        action.model.id,
        SYSTEM,
        cause=action.cause,
        cause_event_id=action.cause_event_id,
        conditions=conditions,
    )


def build_request(
    action: actions.RequestReload | actions.UnloadAutomatically,
    conditions: tuple[Condition, ...],
    progress_timeout_s: int = PROGRESS_TIMEOUT_S,
) -> RequestLoad | RequestUnload:
    match action:
        case actions.RequestReload(model, cause):
            return build_reload(model, cause, conditions, progress_timeout_s)
        case actions.UnloadAutomatically():
            return build_unload(action, conditions)


def hide_paths(draft: Draft, folders: Collection[str]) -> Draft:
    """Return a draft whose texts of others, such as ONNX Runtime, do not name these folders of the server."""
    match draft.data:
        case LoadFailed(message=message):
            return replace(draft, data=replace(draft.data, message=hide_folders(message, folders)))
        case WorkerExited(stderr=lines):
            hidden = tuple(hide_folders(line, folders) for line in lines)
            return replace(draft, data=replace(draft.data, stderr=hidden))
    return draft


class Recorder:
    """Appends facts to the log, without folders of the server, and with the node whose epoch they rest on.

    Args:
        log: the log.
        folders: of the server, which texts of others, such as ONNX Runtime, must not name.
        node: returns the epoch of this node; None without nodes.
    """

    def __init__(self, log: Log, folders: Collection[str], node: Callable[[], NodeCurrent | None]) -> None:
        self._log = log
        self._folders = folders
        self._node = node

    async def record(self, *drafts: Draft, conditions: tuple[Condition, ...]) -> None:
        """Append facts if the conditions hold.

        Raises:
            RequestRefused: `outdated`, they do not.
            LogUnavailable: it is not known whether they were appended.
            NotEncodable: a fact cannot be recorded.
        """
        node = self._node()
        shown = [hide_paths(draft, self._folders) for draft in drafts]
        if node is not None:
            shown = [name_node(draft, node.node_id) for draft in shown]
            conditions = (*conditions, node)
        await self._log.submit(Record(tuple(shown), conditions))

    async def request(self, command: RequestLoad | RequestUnload) -> None:
        """Append a request of the system if its conditions hold; for errors see `record`."""
        node = self._node()
        if node is not None:
            command = dataclasses.replace(command, conditions=(*command.conditions, node))
        await self._log.submit(command)
