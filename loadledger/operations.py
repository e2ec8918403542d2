"""The operations of a client, written once as coroutines for `Client` and `AsyncClient`."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack
from urllib.parse import urlencode

from answers.approvals import VersionApprovals
from answers.events import EventInfo, Head
from answers.health import Health
from answers.inference import ModelMetadata
from answers.jobs import JobInfo, JobList
from answers.models import ModelInfo, ModelList
from answers.nodes import NodeInfo, NodeList
from answers.records import RecordFileInfo, RecordFileList, RecordList
from answers.resources import Resources
from answers.signatures import VerifiedVersionInfo
from answers.versions import AddedFileInfo, AddedVersionInfo, UploadInfo, VersionInfo
from loadledger.address import path
from loadledger.errors import ClientProblem, NotFound, ServerError
from loadledger.inference import InferenceResult, Inferences, Inputs
from loadledger.jobs import AwayCallback, JobCallback, WaitOptions, job_request, submit_job, wait_for_job
from loadledger.requests import (
    CallContext,
    Request,
    decode_refusal,
    fetch,
    fetch_with_retries,
    get_request,
    json_request,
    post_request,
    send_request,
)
from loadledger.stream import (
    EventSelection,
    Listing,
    event_listing,
    follow_events,
    iterate_list,
    present_parameters,
    repeated_parameter,
)
from loadledger.uploads import FileBody, Progress, VersionSource, find_version_files, hash_files, make_key

MAX_TAKEN = 3
"""Attempts with further numbers if a folder that is no version yet has the next version's."""
_REFUSED_FILES = ("not_onnx", "unsafe_file", "invalid_model", "digest_mismatch", "body_too_large")
"""Codes of refusals of a version's files that a retry would repeat."""
UPLOAD_ANSWER_S = 300.0
"""Time for the answer after an upload is sent: the server first syncs it to its disk."""
HASH_ANSWER_S = 300.0
"""Time for the answer to `verify_model`: the server first hashes all files."""
At = int | str
"""A position of the ledger, or a time with its offset, such as 2026-01-31T14:02:00Z."""
UNWELL = "unhealthy"
LOADED, NOT_LOADED = "loaded", "not_loaded"
"""A model's state, and the code of an unload that is too late."""
UNUSED = frozenset({"unloaded", "unloading", "failed"})
"""States of a model that is not to be loaded; a lost one is brought back by the server."""
_PATH = re.compile(r"[!-\"$->@-~]+")
"""Visible ASCII characters except `#` and `?`, which end a path."""


class LoadOptions(TypedDict, total=False):
    """Parameters of a load; the default of each is the model's loadledger.toml, then the server's setting."""

    timeout_s: int
    progress_timeout_s: int
    memory_limit_bytes: int | None
    priority: Literal["high", "normal", "low"]
    keep_alive_s: int | None
    strategy: Literal["beside", "in_place", "auto"]
    pinned: bool
    instances: int
    threads: int | None
    max_batch_size: int
    max_queue_delay_us: int
    node_attributes: Sequence[str] | None
    copies: int
    devices: Sequence[str] | None
    fallback: Literal["refuse", "cpu"]
    dependent_rows: Literal["refuse", "allow"]
    max_queue: int | None
    priority_levels: int
    default_priority_level: int


@dataclass(frozen=True, slots=True)
class _Addition:
    """The files of a version, their SHA-256 by path, and the statement of their source."""

    files: VersionSource
    digests: Mapping[str, str]
    provenance: Mapping[str, str] | None
    on_progress: Progress | None

    def count(self, before: int, of_file: int) -> None:
        """Report the bytes sent: all files before the present one, and `of_file` bytes of it."""
        if self.on_progress is not None:
            self.on_progress(before + of_file, self.files.bytes)


class Operations:
    """Operations on one server; an argument that cannot be sent raises ValueError before any request."""

    def __init__(self, context: CallContext) -> None:
        self._context = context
        self._inferences = Inferences(context)

    async def load(
        self,
        model_id: str,
        version: int | None = None,
        *,
        wait: bool = False,
        wait_s: float | None = None,
        on_stage: JobCallback | None = None,
        on_away: AwayCallback | None = None,
        idempotency_key: str | None = None,
        label: str | None = None,
        reason: str | None = None,
        emergency: str | None = None,
        digest: str | None = None,
        **parameters: Unpack[LoadOptions],
    ) -> JobInfo:
        """Load a model and return the job.

        Args:
            model_id: its folder in the repository.
            version: the version; default: the highest.
            wait: wait until the job has ended, across restarts of the server.
            wait_s: limit of the wait, in seconds.
            on_stage: called with the job at once and after each change of status, stage or reason to wait.
            on_away: called with the problem once each time the server becomes unreachable.
            idempotency_key: use the same key to repeat a request; default: a new one.
            label: names the version from the moment when it is loaded.
            reason: why, for the ledger.
            emergency: why it must not wait for other persons; takes the role `emergency`, and `digest`.
            digest: of an emergency, of the files that it is for: `verify_model` returns it.
            parameters: how to load.

        Raises:
            JobFailed: with `wait`: the job failed or was cancelled.
            JobUnfinished: `wait_s` is over; the job continues.
            ServerError: the server refused: `unknown_model`, `unknown_version`, `queue_full`, …
            ServerUnreachable: the server does not answer. If `sent`, the job may exist anyway.
        """
        given = {"version": version, "label": label, "reason": reason}
        given |= {"emergency": emergency, "digest": digest}
        body = {**{name: value for name, value in given.items() if value is not None}, **parameters}
        request = post_request(_api("models", model_id, "load"), body=body, key=idempotency_key)
        return await submit_job(
            self._context, request, WaitOptions(wait_s, on_stage, on_away) if wait else None
        )

    async def unload(
        self,
        model_id: str | None = None,
        *,
        force: bool = False,
        until_asked: bool = False,
        wait: bool = False,
        wait_s: float | None = None,
        on_stage: JobCallback | None = None,
        on_away: AwayCallback | None = None,
        idempotency_key: str | None = None,
    ) -> JobInfo:
        """Unload a model, by default the active one, and return the job.

        `force` does not wait for running requests or a stuck worker. Where inferences load models, they do
        not load this one until a person does, unless it is only unloaded `until_asked`. The other arguments
        are those of `load`.

        Raises:
            ServerError: the server refused: `unknown_model`, `not_loaded`, `nothing_loaded`.
        """
        target = _api("models", "unload") if model_id is None else _api("models", model_id, "unload")
        pairs = [(name, "true") for name, on in (("force", force), ("until_asked", until_asked)) if on]
        request = post_request(target, pairs, key=idempotency_key)
        return await submit_job(
            self._context, request, WaitOptions(wait_s, on_stage, on_away) if wait else None
        )

    async def add(
        self,
        model_id: str,
        path: str | os.PathLike[str] | None = None,
        version: int | None = None,
        *,
        source: str | None = None,
        digest: str | None = None,
        signature: str | os.PathLike[str] | None = None,
        on_progress: Progress | None = None,
    ) -> AddedVersionInfo:
        """Put a version into the server's repository, and return it.

        The files are sent one by one. After a failure, the same call sends those that the server lacks.

        Args:
            model_id: the model; it may be new.
            path: an ONNX file, with the files that it names; or a folder of a version, or of Hugging Face
                with `onnx/model.onnx` (`loadledger.uploads.find_version_files`).
            version: its number; default: the highest plus 1.
            source: a name such as hf://org/repo@main (`loadledger.sources.names`), from which the version is
                downloaded to this machine first. With a path, nothing is: it says where those files come
                from. The ledger keeps it, as this caller's statement.
            digest: sha256: and 64 hexadecimal digits that a source's file, or manifest, must have.
            signature: a file of OpenSSF model signing, which becomes a file of the version: under its name
                if that ends in `.sig`, else as `model.sig`.
            on_progress: called before a part is sent, with the bytes up to its end, and those of all files.

        Raises:
            ValueError: there is no model at the path, or several; or there are two signatures; or neither a
                path nor a source.
            OSError: a file cannot be read.
            SourceProblem: the source cannot be fetched.
            ServerError: the server refused: `version_exists`, `not_onnx`,
                `body_too_large`, `repository_read_only`, …
        """
        call = self._context.transport.call
        if path is not None:
            found = await call(lambda: find_version_files(Path(path), signature))
            provenance = {"source": source} if source else None
            return await self.add_files(
                model_id, found, version, provenance=provenance, on_progress=on_progress
            )
        if source is None or signature is not None:
            raise ValueError("give a path, or a source, whose signature comes along with it")
        from loadledger.sources.downloads import Downloads
        from loadledger.sources.fetch import fetch_version, resolve_source

        with Downloads() as downloads:
            local = await call(lambda: fetch_version(resolve_source(source, digest), downloads))
            added = await self.add_files(
                model_id, local.files, version, provenance=local.provenance, on_progress=on_progress
            )
            await call(local.discard)
        return added

    async def add_files(
        self,
        model_id: str,
        files: VersionSource,
        version: int | None = None,
        *,
        provenance: Mapping[str, str] | None = None,
        on_progress: Progress | None = None,
    ) -> AddedVersionInfo:
        """Put files into the server's repository as a version; see `add`.

        Args:
            model_id: the model.
            files: the version's files.
            version: its number.
            provenance: `source`, and `resolved` if it says more: where the files come from.
            on_progress: as of `add`.

        Raises:
            ValueError: a file has changed since it was found.
            OSError: a file cannot be read.
            ServerError: the server refused.
        """
        digests = await self._context.transport.call(lambda: hash_files(files))
        addition = _Addition(files, digests, provenance, on_progress)

        async def add_as(number: int) -> AddedVersionInfo:
            try:
                return await self._add_version(model_id, number, addition)
            except ServerError as problem:
                if problem.code != "unknown_upload":  # its server or another addition ended it: begin again
                    raise
            return await self._add_version(model_id, number, addition)

        if version is not None:
            return await add_as(version)
        wanted = await self._next_version(model_id)
        for number in range(wanted, wanted + MAX_TAKEN):
            try:
                return await add_as(number)
            except ServerError as problem:  # another folder or upload has the number
                if problem.code != "version_exists":
                    raise
        return await add_as(wanted + MAX_TAKEN)

    async def _add_version(self, model_id: str, version: int, addition: _Addition) -> AddedVersionInfo:
        """Send the files into an upload, without those that an earlier attempt has sent, and commit it."""
        uploads = _api("models", model_id, "versions", str(version), "uploads")
        digests = addition.digests
        upload = await fetch(self._context, post_request(uploads, key=make_key(digests)), UploadInfo)
        there, target, sent = {file.path: file.sha256 for file in upload.files}, uploads + path(upload.id), 0
        try:
            for file in addition.files.files:
                if there.get(file.path) != digests[file.path]:
                    body = FileBody(file, digests[file.path], partial(addition.count, sent))
                    where = f"{target}/files{path(*file.path.split('/'))}"
                    request = Request("PUT", where, body.headers, upload=body, timeout_s=UPLOAD_ANSWER_S)
                    await fetch_with_retries(self._context, request, AddedFileInfo, reached=True)
                sent += file.bytes
            commit = json_request("POST", f"{target}/commit", addition.provenance, repeatable=False)
            return await fetch(self._context, replace(commit, timeout_s=UPLOAD_ANSWER_S), AddedVersionInfo)
        except ServerError as problem:
            if problem.code in _REFUSED_FILES:
                with suppress(ClientProblem):  # a retry would be refused, too
                    await send_request(self._context, Request("DELETE", target))
            raise

    async def _next_version(self, model_id: str) -> int:
        try:
            model = await self.model(model_id)
        except NotFound:
            return 1
        return max(model.versions or [0]) + 1

    async def remove(self, model_id: str, version: int, *, force: bool = False) -> None:
        """Remove a version from the server's repository. No load may use it; `force` ends those that do.

        Raises:
            ServerError: the server refused: `unknown_version`, `version_in_use`, `repository_read_only`.
        """
        target = _api("models", model_id, "versions", str(version))
        query = "?force=true" if force else ""
        await self._change(Request("DELETE", target + query, repeatable=False, timeout_s=UPLOAD_ANSWER_S))

    async def set_label(self, model_id: str, label: str, version: int) -> None:
        """Let a label name a version of the repository, loaded or not; `model` has them.

        Raises:
            ServerError: the server refused: `unknown_model`, `unknown_version`, `too_many_labels`.
        """
        target = _api("models", model_id, "labels", label)
        await self._change(json_request("PUT", target, {"version": version}))

    async def remove_label(self, model_id: str, label: str) -> None:
        """Remove a label; its version stays.

        Raises:
            ServerError: the server refused: `unknown_label`.
        """
        await self._change(Request("DELETE", _api("models", model_id, "labels", label), repeatable=False))

    async def _change(self, request: Request) -> None:
        answer = await send_request(self._context, request)
        if answer.status != HTTPStatus.NO_CONTENT:
            raise decode_refusal(answer, self._context.address)

    async def cancel(self, job_id: str, *, idempotency_key: str | None = None) -> JobInfo:
        """Request a job's cancellation and return the job; `wait_for` returns its outcome.

        Raises:
            ServerError: `unknown_job`, or too late: `already_started`, `already_finished`.
        """
        request = post_request(_api("jobs", job_id, "cancel"), key=idempotency_key)
        return await fetch(self._context, request, JobInfo)

    async def approve(self, model_id: str, version: int, digest: str, reason: str) -> VersionApprovals:
        """Approve the bytes of a version, with the role `approve`, for all loads of the model.

        `digest` is that of the files that you approve, which `verify_model` returns.

        Raises:
            ServerError: the server refused: `unknown_version`, `digest_differs`, `same_person`.
        """
        body = {"digest": digest, "reason": reason}
        request = json_request("PUT", _approval_path(model_id, version), body)
        return await fetch(self._context, request, VersionApprovals)

    async def withdraw_approval(self, model_id: str, version: int, reason: str) -> VersionApprovals:
        """Withdraw the approval, by all persons, of the bytes that were approved as a version.

        Raises:
            ServerError: the server refused: `unknown_approval`.
        """
        target = f"{_approval_path(model_id, version)}?{urlencode({'reason': reason})}"
        return await fetch(self._context, Request("DELETE", target, repeatable=False), VersionApprovals)

    async def verify_model(self, model_id: str, version: int | None = None) -> VerifiedVersionInfo:
        """Hash a version, by default the highest, and check it as a load would; nothing is loaded.

        Raises:
            ServerError: the server refused: `unknown_model`, `unknown_version`, …
        """
        request = get_request(_api("models", model_id, "verify"), present_parameters(version=version))
        return await fetch(self._context, replace(request, timeout_s=HASH_ANSWER_S), VerifiedVersionInfo)

    async def job(self, job_id: str, *, at: At | None = None) -> JobInfo:
        """Return a job, with `at` as of a position or time."""
        return await fetch(self._context, job_request(job_id, at), JobInfo)

    async def wait_for(
        self,
        job_id: str,
        *,
        timeout_s: float | None = None,
        on_change: JobCallback | None = None,
        on_away: AwayCallback | None = None,
    ) -> JobInfo:
        """Wait until a job has ended, across restarts of the server, and return it whatever its outcome.

        If a person's load has superseded the job, that load is waited for and returned.

        Raises:
            JobUnfinished: `timeout_s` is over; the job continues.
        """
        return await wait_for_job(self._context, job_id, WaitOptions(timeout_s, on_change, on_away))

    def jobs(
        self,
        *,
        model: str | None = None,
        status: str | None = None,
        at: At | None = None,
        limit: int | None = None,
    ) -> AsyncGenerator[JobInfo, None]:
        """Iterate over jobs, newest first, at most `limit`; pages are fetched on demand."""
        if limit is not None and limit < 1:
            raise ValueError("limit is at least 1")
        pairs = present_parameters(model=model, status=status, at=at)
        return iterate_list(self._context, Listing("/api/v1/jobs", JobList, pairs, most=limit))

    def models(self, *, at: At | None = None) -> AsyncGenerator[ModelInfo, None]:
        """Iterate over the models of the repository and loaded ones by id; pages are fetched on demand."""
        return iterate_list(self._context, Listing("/api/v1/models", ModelList, present_parameters(at=at)))

    async def model(self, model_id: str, *, at: At | None = None) -> ModelInfo:
        """Return a model, with `at` as of a position or time."""
        request = get_request(_api("models", model_id), present_parameters(at=at))
        return await fetch(self._context, request, ModelInfo)

    async def version(self, model_id: str, version: int) -> VersionInfo:
        """Return a version: its files, who added it, its labels and approvals.

        Raises:
            ServerError: the server refused: `unknown_model`, `unknown_version`.
        """
        return await fetch(
            self._context, get_request(_api("models", model_id, "versions", str(version))), VersionInfo
        )

    async def resources(self) -> Resources:
        """Return the memory budget, its use, and the jobs that wait for it."""
        return await fetch(self._context, get_request("/api/v1/resources"), Resources)

    async def nodes(self) -> list[NodeInfo]:
        """Return the servers that share the ledger, with what runs where; none if the server is alone."""
        return (await fetch(self._context, get_request("/api/v1/nodes"), NodeList)).nodes

    async def drain(self, node_id: str) -> NodeInfo:
        """Drain a node and return it: it takes no more loads, and its models are loaded at other nodes.

        Raises:
            ServerError: the server refused: `unknown_node`, `node_ended`, `no_nodes`.
        """
        return await fetch(self._context, Request("POST", _api("nodes", node_id, "drain")), NodeInfo)

    async def head(self) -> Head:
        """Return the signed head of the ledger."""
        return await fetch(self._context, get_request("/api/v1/events/head"), Head)

    async def health(self) -> Health:
        """Return the server's readiness: `status` is `ok`, or says which check fails."""
        try:
            return await fetch(self._context, get_request("/health/ready"), Health)
        except ServerError as problem:
            if problem.code != UNWELL:
                raise
            return Health(status=problem.detail, checks={})

    async def metadata(self, model_id: str, *, version: int | str | None = None) -> ModelMetadata:
        """Return what a model takes and gives: names, datatypes and shapes of its inputs and outputs.

        `version` is a number or a label.
        """
        return await fetch(self._context, get_request(_model_path(model_id, version)), ModelMetadata)

    async def infer(
        self,
        model_id: str,
        inputs: Inputs,
        *,
        version: int | str | None = None,
        outputs: Iterable[str] | None = None,
        parameters: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> InferenceResult:
        """Run an inference at most once; return its outputs as numpy arrays by name.

        A server with `--on-demand on` loads the model first if needed.

        Args:
            model_id: the model.
            inputs: arrays or nested lists by name, converted to the model's datatypes where no value
                changes, except that floating-point numbers are rounded; or whole tensors of the protocol.
            version: its number, or a label; default: the one that serves.
            outputs: names of the outputs; default: all.
            parameters: parameters of the request.
            timeout_s: instead of the client's timeout.

        Raises:
            ServerError: the server refused: `model_not_loaded`, `invalid_input`, …
            ValueError: the model has no such input, or a value does not fit its datatype.
        """
        names = None if outputs is None else repeated_parameter("outputs", outputs)
        named = None if names is None else [{"name": name} for _, name in names]
        members = {"outputs": named, "parameters": parameters}
        given = {name: value for name, value in members.items() if value is not None}
        return await self._inferences.run(_model_path(model_id, version), inputs, given, timeout_s)

    @asynccontextmanager
    async def loaded(
        self,
        model_id: str,
        version: int | None = None,
        *,
        wait_s: float | None = None,
        **parameters: Unpack[LoadOptions],
    ) -> AsyncGenerator[ModelInfo, None]:
        """Keep a model loaded within a `with` block, and unload it afterwards if the block has loaded it.

        A model that was loaded before, in whatever version, stays loaded; so does one that somebody has
        loaded again meanwhile. Blocks that load the same model at once are not counted: the one that loaded
        it unloads it.

        Args:
            model_id: the model.
            version: the version; default: the one that serves, else the highest.
            wait_s: limit of the wait for the load, in seconds.
            parameters: how to load; with some, the model is loaded even if it is loaded already.

        Raises:
            JobFailed: the load failed or was cancelled.
            JobUnfinished: `wait_s` is over; the load continues, and the model stays loaded.
        """
        before = await self.model(model_id)
        if before.state == LOADED and version in (None, before.version) and not parameters:
            yield before
            return
        job = await self.load(model_id, version, wait=True, wait_s=wait_s, **parameters)
        try:
            yield await self.model(model_id)
        finally:
            if before.state in UNUSED and (await self.model(model_id)).job_id == job.id:
                await self._unload_if_loaded(model_id)

    async def _unload_if_loaded(self, model_id: str) -> None:
        try:
            await self.unload(model_id, until_asked=True, wait=True)
        except ServerError as problem:
            if problem.code != NOT_LOADED:
                raise

    def events(
        self,
        *,
        after: int | None = None,
        follow: bool = False,
        types: Iterable[str] = (),
        models: Iterable[str] = (),
        jobs: Iterable[str] = (),
        actors: Iterable[str] = (),
        since: At | None = None,
        until: At | None = None,
        on_away: AwayCallback | None = None,
    ) -> AsyncGenerator[EventInfo, None]:
        """Iterate over the ledger's events in order: the stored ones, or with `follow` also new ones.

        A followed stream resumes after a lost connection or a restart of the server: no event comes twice,
        none is missing. Close the iterator, or leave its loop, to end it.

        Args:
            after: only events above this position; default: from the oldest, with `follow` from now.
            follow: continue with new events until the iterator is closed.
            types: only events of these types.
            models: only events of these models.
            jobs: only events of jobs with these ids.
            actors: only events by these actors.
            since: only events from this position or time on.
            until: only events up to this position or time; not with `follow`.
            on_away: called with the problem once each time the server becomes unreachable.

        Raises:
            ServerError: while iterating: `beyond_head`, so this is another ledger.
        """
        if follow and until is not None:
            raise ValueError("until ends a list and follow never ends: give one of them")
        filters = {"type": types, "model": models, "job": jobs, "actor": actors}
        chosen = [pair for name, values in filters.items() for pair in repeated_parameter(name, values)]
        selection = EventSelection(chosen, after, present_parameters(since=since, until=until), on_away)
        return (
            follow_events(self._context, selection)
            if follow
            else iterate_list(self._context, event_listing(selection))
        )

    def records(
        self, *, model: str | None = None, request_id: str | None = None, since: str | None = None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Iterate over the recorded inferences of the server, by model and time.

        Args:
            model: only of this model.
            request_id: only the inference with this `X-Request-Id`, or `id` in its body.
            since: only from this time on, such as 2026-01-31T14:02:00Z.
        """
        pairs = present_parameters(model=model, id=request_id, since=since)
        return iterate_list(self._context, Listing("/api/v1/records", RecordList, pairs))

    def record_files(self, *, model: str | None = None) -> AsyncGenerator[RecordFileInfo, None]:
        """Iterate over the files of recorded inferences of the server, by model and age."""
        pairs = present_parameters(model=model)
        return iterate_list(self._context, Listing("/api/v1/records/files", RecordFileList, pairs))

    async def erase_record_file(self, file: str, reason: str) -> None:
        """Erase a closed file of recorded inferences; the ledger keeps what it was.

        Raises:
            ServerError: the server refused: `unknown_record_file`, `record_file_open`.
        """
        target = f"{_api('records', 'files', file)}?{urlencode({'reason': reason})}"
        await self._change(Request("DELETE", target, repeatable=False))

    async def get(self, path: str, query: Mapping[str, str] | None = None) -> Any:
        """Return the JSON of a GET of any path, such as `/v2/models/stats`."""
        self._check_path(path)
        return await fetch(self._context, get_request(path, list((query or {}).items())), Any)

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the JSON of a POST to any path, such as `/api/v1/tokens`; it is sent once."""
        self._check_path(path)
        return await fetch(self._context, json_request("POST", path, body, repeatable=False), Any)

    @staticmethod
    def _check_path(path: str) -> None:
        if not path.startswith("/"):
            raise ValueError(f"{path!r} does not begin with /: give a path such as /v2/models/stats")
        if not _PATH.fullmatch(path):
            raise ValueError(
                f"{path!r} has characters that a path cannot have: encode them, and pass a query as `query`"
            )


def _api(*segments: str) -> str:
    return f"/api/v1{path(*segments)}"


def _approval_path(model_id: str, version: int) -> str:
    return _api("models", model_id, "versions", str(version), "approval")


def _model_path(model_id: str, version: int | str | None) -> str:
    at = () if version is None else ("versions", str(version))
    return f"/v2{path('models', model_id, *at)}"
