"""Routes about records: search their lines, list their files, erase one. Each server has its own files."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
from aiohttp import web
from marshmallow import Schema, fields, validate

from answers.records import RecordFileInfo, RecordFileList, RecordList
from events.clock import format_timestamp
from events.sqlite.timetravel import parse_time
from features.records.app import RECORDING
from features.records.facts import RecordsClosed
from features.records.files import RecordFile, list_files
from features.records.reading import RecordQuery, read_page
from server.api.schemas import IS_REASON, PageQuerySchema, about
from server.appkeys import LOG, READER
from server.auth.access import Access
from server.auth.gate import PRINCIPAL
from server.errors import ServerProblem
from server.http.answers import respond, respond_encoded
from server.http.validation import path_parameters, query_parameters
from server.routing import Routes

routes = Routes(tag="ledger")

_ID = validate.Regexp(r"[0-9a-f-]{36}\Z", error="Must be the name of a file, as a list of them shows it.")
_CURSOR = r"[A-Za-z0-9._-]{1,128}/[0-9a-f-]{36}"


def _cursor(pattern: str, text: str) -> fields.String:
    is_cursor = validate.Regexp(rf"{pattern}\Z", error="Must be `next_cursor` of a page.")
    return fields.String(load_default=None, validate=is_cursor, **about(text))


class RecordFilesQuerySchema(PageQuerySchema):
    """Page of the files."""

    model = fields.String(load_default=None, **about("Only files of this model."))
    cursor = _cursor(_CURSOR, "`next_cursor` of the page before: files after that one.")


class RecordsQuerySchema(PageQuerySchema):
    """Page of the lines, and filters."""

    model = fields.String(load_default=None, **about("Only inferences of this model."))
    cursor = _cursor(rf"{_CURSOR}:[0-9]{{1,15}}", "`next_cursor` of the page before: lines from there on.")
    id = fields.String(
        load_default=None,
        validate=validate.Length(1, 1024),
        **about("Only the inference with this `X-Request-Id`, or with this `id` in its body."),
    )
    since = fields.String(
        load_default=None,
        **about("Only from this time on, with its offset (RFC 3339), such as 2026-01-31T14:02:00Z."),
    )


@routes.get(
    "/api/v1/records",
    access=Access.AUDIT,
    summary="List recorded inferences",
    description="Of this server, by model and time: what `[[record]]` in its configuration records. A page "
    "may have fewer lines than its limit although others follow: see `next_cursor`.",
    query=RecordsQuerySchema(),
    answers={200: (RecordList, "One page.")},
)
async def list_records(request: web.Request) -> web.Response:
    recording, query = request.app[RECORDING], query_parameters(request)
    await recording.flush()
    since = None if query["since"] is None else parse_time(query["since"])
    asked = RecordQuery(query["model"], query["id"], since, query["cursor"], query["limit"])
    page = await recording.search(lambda: read_page(list_files(recording.files.folder), asked))
    lines = [msgspec.Raw(line) for line in page.lines]  # as they are in the file
    answer = {"records": lines, "as_of": request.app[LOG].state.position, "next_cursor": page.next_cursor}
    return respond_encoded(msgspec.json.encode(answer))


@routes.get(
    "/api/v1/records/files",
    access=Access.AUDIT,
    summary="List the files of records",
    description="Of this server. `loadledger records verify` compares them with the ledger.",
    query=RecordFilesQuerySchema(),
    answers={200: (RecordFileList, "One page.")},
    errors=("log_unavailable",),
)
async def list_record_files(request: web.Request) -> web.Response:
    app, query = request.app, query_parameters(request)
    model_id, limit = query["model"], query["limit"]
    after = tuple((query["cursor"] or "").split("/"))  # in parts, as the files are sorted: "/" is after "-"
    await app[RECORDING].flush()
    files = [
        each
        for each in await app[RECORDING].list_files()
        if model_id in (None, each.model_id) and (each.model_id, each.id) > after
    ]
    shown = [await _describe_file(app, each) for each in files[:limit]]
    last = f"{shown[-1].model_id}/{shown[-1].file}" if len(files) > limit else None
    return respond(RecordFileList(files=shown, as_of=app[LOG].state.position, next_cursor=last))


async def _describe_file(app: web.Application, file: RecordFile) -> RecordFileInfo:
    event = await app[READER].event(file.id)
    said = event.data if event is not None and isinstance(event.data, RecordsClosed) else None
    return RecordFileInfo(
        file=file.id,
        model_id=file.model_id,
        state="open" if file.is_open else "closed",
        bytes=file.bytes,
        written_at=format_timestamp(datetime.fromtimestamp(file.written_at_s, UTC)),
        position=None if event is None else event.position,
        records=None if said is None else said.records,
        dropped=None if said is None else said.dropped,
        sha256=None if said is None else said.sha256,
    )


class RecordFilePathSchema(Schema):
    """The file named by the path."""

    file = fields.String(
        required=True,
        validate=_ID,
        **about("A file's name, without its ending.", example="01980b5c-7e2f-7c1a-9a52-6a1f0a4d3c11"),
    )


class ErasureQuerySchema(Schema):
    """Why a file is erased."""

    reason = fields.String(required=True, validate=IS_REASON, **about("Why; the ledger records it."))


@routes.delete(
    "/api/v1/records/files/{file}",
    access=Access.ADMIN,
    summary="Erase a file of records",
    description="Records `RecordsErased` and deletes the file of this server. `RecordsClosed` still says "
    "what it was. An open file cannot be erased: it is closed within an hour, or when the server stops.",
    path=RecordFilePathSchema(),
    query=ErasureQuerySchema(),
    answers={204: {"description": "Erased."}},
    errors=("unknown_record_file", "record_file_open", "log_unavailable", "shutting_down"),
)
async def erase_record_file(request: web.Request) -> web.Response:
    recording, name = request.app[RECORDING], path_parameters(request)["file"]
    reason, person = query_parameters(request)["reason"], request[PRINCIPAL].subject
    found = [each for each in await recording.list_files() if each.id == name]
    if not found:
        problem = (
            f"this server has no file of records {name}; `loadledger records list` shows those that it has"
        )
        raise ServerProblem(problem, code="unknown_record_file")
    if found[0].is_open:
        problem = (
            f"the file of records {name} is being written; it is closed within an hour, or with the server"
        )
        raise ServerProblem(problem, code="record_file_open")
    await recording.erase(found[0], reason, person)
    return web.Response(status=204)
