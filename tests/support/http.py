"""The server over HTTP, every answer held to the OpenAPI document; a small application."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from aiohttp.typedefs import Handler
from multidict import CIMultiDictProxy
from onnx import ModelProto
from openapi_schema_validator import OAS30Validator
from yarl import URL

from events.types import Data, Event
from runtime.process.worker import Worker
from server.app import all_routes, create_app
from server.appkeys import CONSUMER, LOG, READER
from server.auth.access import Access
from server.auth.gate import PRINCIPAL, Gate, auth_middleware, create_verifier
from server.auth.keys import ensure_data_dir, sign_token
from server.auth.proxies import Proxies
from server.auth.ratelimit import RateLimits
from server.config import Config
from server.errors import errors_middleware
from server.http.responses import response_completer
from server.http.validation import validation_middleware
from server.openapi.document import openapi_document
from server.routing import Route, add_routes
from server.v2.inference import add_fast_path
from support.models import save_bytes

LIMIT_S = 120.0
"""Nothing here takes this long, on a busy machine either; so a bug fails a test and does not hang it."""

ANYWHERE = {
    (400, "invalid_request"),
    (401, "no_credentials"),
    (401, "invalid_token"),
    (404, "not_found"),
    (405, "method_not_allowed"),
    (429, "rate_limited"),
    (429, "too_many_failures"),
}
"""What a request to a path, or with a method, that no route has may be answered with."""

PAGES = re.compile(r"/(?:$|\?|console/|docs)")
"""Paths of the files that browsers may keep."""

Client = TestClient[web.Request, web.Application]
Json = Any
ONE: Json = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}
"""Input of `models.add`."""

ENDLESS: Json = {"name": "trips", "shape": [], "datatype": "INT64", "data": [2**62]}
"""Input that keeps `models.counting_loop` running until its worker is killed."""

_BINARY = {"name": "x", "shape": [2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}
_HEAD = json.dumps({"inputs": [_BINARY]}).encode()
_LENGTH = "Inference-Header-Content-Length"
MALFORMED: list[tuple[bytes, dict[str, str]]] = [
    (b'{"inputs": [', {}),
    (json.dumps({"inputs": [{**ONE, "datatype": "FP31"}]}).encode(), {}),
    (_HEAD + bytes(4), {_LENGTH: str(len(_HEAD))}),
    (_HEAD + bytes(600_000), {_LENGTH: str(len(_HEAD))}),
    (_HEAD + bytes(8), {_LENGTH: str(len(_HEAD) + 100)}),
    (bytes(4), {_LENGTH: "-0"}),
]
"""Bodies of inferences that no model takes, JSON and binary, and their header fields."""

T = TypeVar("T")
E = TypeVar("E", bound=Data)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, read to its end."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def media_type(self) -> str:
        """The content type without its parameters."""
        return self.headers.get("Content-Type", "").partition(";")[0]

    @property
    def json(self) -> Json:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def refusal(self) -> tuple[int, str]:
        """The status and the error's code."""
        return self.status, self.json["code"]


class Api:
    """A client with tokens, of a server in this process or in another.

    Args:
        session: what sends the requests.
        url: the server's, without a path.
        config: what the server runs with; its keys sign the tokens.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, config: Config) -> None:
        self._session = session
        self._url = url.rstrip("/")
        self._tokens: dict[tuple[str, tuple[str, ...]], str] = {}
        self.config = config

    @property
    def session(self) -> aiohttp.ClientSession:
        """What sends the requests."""
        return self._session

    @property
    def url(self) -> str:
        """The server's, without a slash at its end."""
        return self._url

    def token(self, *roles: str, subject: str = "alice") -> str:
        """Return a token, really signed; the same one for the same person."""
        who = (subject, roles)
        if who not in self._tokens:
            data, audience = self.config.data, self.config.jwt_audience
            self._tokens[who] = sign_token(data, subject, roles, expires_s=3600, audience=audience)
        return self._tokens[who]

    async def send(
        self,
        method: str,
        path: str,
        *,
        roles: tuple[str, ...] = ("admin",),
        subject: str = "alice",
        wait: int | None = None,
        headers: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Answer:
        """Send a request, its path exactly as it stands here, and check the answer.

        Args:
            method: as on the wire.
            path: with the query, percent-encoded already.
            roles: of the token; none means no token.
            subject: of the token.
            wait: for `Prefer: wait=N`.
            headers: beside these.
            options: for aiohttp's client: `json`, `data`.
        """
        sent = dict(headers or {})
        if roles:
            sent["Authorization"] = f"Bearer {self.token(*roles, subject=subject)}"
        if wait is not None:
            sent["Prefer"] = f"wait={wait}"
        async with asyncio.timeout(LIMIT_S + (wait or 0)):
            url = URL(f"{self._url}{path}", encoded=True)
            async with self._session.request(method, url, headers=sent, **options) as response:
                answer = Answer(response.status, response.headers, await response.read())
        check_answer(method, path, answer)
        return answer

    async def get(self, path: str, **options: Any) -> Answer:
        """Send a GET, see `send`."""
        return await self.send("GET", path, **options)

    async def post(self, path: str, **options: Any) -> Answer:
        """Send a POST, see `send`."""
        return await self.send("POST", path, **options)

    async def load(self, model_id: str, **body: Any) -> Json:
        """Load a model and return the job, which must have completed."""
        return await self._ended("completed", f"/api/v1/models/{model_id}/load", json=body)

    async def failed_load(self, model_id: str, **body: Any) -> Json:
        """Load a model and return the job, which must have failed."""
        return await self._ended("failed", f"/api/v1/models/{model_id}/load", json=body)

    async def accepted_load(self, model_id: str, **body: Any) -> Json:
        """Ask for a load and return the job at once."""
        answer = await self.post(f"/api/v1/models/{model_id}/load", json=body)
        assert answer.status == 202, answer.body
        return answer.json

    async def unload(self, model_id: str, *, force: bool = False, until_asked: bool = False) -> Json:
        """Unload a model and return the job, which must have completed."""
        query = f"?force={force}&until_asked={until_asked}".lower()
        return await self._ended("completed", f"/api/v1/models/{model_id}/unload{query}")

    async def add_by_upload(self, model_id: str, version: int, data: bytes, **said: str) -> None:
        """Add a version of one file by an upload.

        Args:
            model_id: the model; it may be new.
            version: the version, which must be new.
            data: of its model file.
            said: where it comes from, for the commit: `source`, and `resolved`.
        """
        uploads = f"/api/v1/models/{model_id}/versions/{version}/uploads"
        answer = await self.post(uploads)
        assert answer.status == 201, answer.body
        upload, binary = f"{uploads}/{answer.json['id']}", {"Content-Type": "application/octet-stream"}
        answer = await self.send("PUT", f"{upload}/files/model.onnx", data=data, headers=binary)
        assert answer.status == 201, answer.body
        answer = await self.post(f"{upload}/commit", json=said)
        assert answer.status == 201, answer.body

    async def infer(
        self, model_id: str, *inputs: Json, version: int | str | None = None, **request: Any
    ) -> Answer:
        """Ask a model, as someone who may do that and nothing else."""
        at = "" if version is None else f"/versions/{version}"
        body = {"inputs": inputs, **request}
        path = f"/v2/models/{model_id}{at}/infer"
        return await self.post(path, roles=("infer",), subject="pia", json=body)

    async def model(self, model_id: str) -> Json:
        """Return a model, which must be there."""
        return await self._found(f"/api/v1/models/{model_id}")

    async def job(self, job_id: str) -> Json:
        """Return a job, which must be there."""
        return await self._found(f"/api/v1/jobs/{job_id}")

    async def jobs(self, query: str = "") -> list[Json]:
        """Return a page of jobs, newest first."""
        jobs: list[Json] = (await self._found(f"/api/v1/jobs{query}"))["jobs"]
        return jobs

    async def model_when(self, model_id: str, **wanted: object) -> Json:
        """Wait until these members of a model have these values."""
        return await when(lambda: self.model(model_id), lambda seen: _has(seen, wanted))

    async def job_when(self, job_id: str, **wanted: object) -> Json:
        """Wait until these members of a job have these values."""
        return await when(lambda: self.job(job_id), lambda seen: _has(seen, wanted))

    async def ended(self, job_id: str) -> Json:
        """Wait for the end of a job, whatever it is."""
        return await when(lambda: self.job(job_id), lambda seen: seen["finished_at"] is not None)

    async def _ended(self, status: str, path: str, **options: Any) -> Json:
        answer = await self.post(path, wait=60, **options)
        assert answer.status == 200, answer.body
        assert answer.json["status"] == status, answer.json
        return answer.json

    async def _found(self, path: str) -> Json:
        answer = await self.get(path)
        assert answer.status == 200, answer.body
        return answer.json


class LocalApi(Api):
    """A client of a server in this process: it can also look at what the server keeps."""

    def __init__(self, client: Client, config: Config) -> None:
        super().__init__(client.session, str(client.make_url("/")), config)
        self.client = client
        self.app = client.app

    @property
    def position(self) -> int:
        """The position of the log's head."""
        return self.app[LOG].head.position

    def save(self, model: ModelProto | bytes, model_id: str, version: int = 1) -> Path:
        """Save a model, or a file that is none, in the repository and return the version's folder."""
        data = model if isinstance(model, bytes) else model.SerializeToString()
        return save_bytes(data, self.config.repository, model_id, version)

    async def events(self, model_id: str | None = None) -> list[Event]:
        """Return the events, of one model or all."""
        events = await self.app[READER].events(0)
        return [event for event in events if model_id in (None, event.model_id)]

    async def types(self, model_id: str) -> list[str]:
        """Return the types of a model's events, in order."""
        return [event.type for event in await self.events(model_id)]

    async def data_of(self, kind: type[E]) -> list[E]:
        """Return the data of all events of a type, in order."""
        return [event.data for event in await self.events() if isinstance(event.data, kind)]

    @property
    def ledger(self) -> Path:
        """The file of the log."""
        return self.app[LOG].path

    def worker(self, model_id: str) -> Worker:
        """Return a model's newest worker."""
        loads = self.app[CONSUMER].loads.values()
        newest = [load for load in loads if load.model_id == model_id and load.workers][-1]
        return [*newest.alive_workers, *newest.workers][0]


@asynccontextmanager
async def local_server(folder: Path, **settings: Any) -> AsyncIterator[LocalApi]:
    """Serve the application over `repository` and `data` in a folder, and yield a client of it.

    The CPU is the only device, unless the settings say so.
    """
    defaults = {"visible_devices": "none"}
    config = Config(repository=folder / "repository", data=folder / "data", **{**defaults, **settings})
    config.repository.mkdir(exist_ok=True)
    async with application(config) as api:
        yield api


@asynccontextmanager
async def application(config: Config, *, accepts_rollback: bool = False) -> AsyncIterator[LocalApi]:
    """Serve the application of a configuration, and yield a client of it."""
    ensure_data_dir(config.data)
    app = create_app(config, accepts_rollback=accepts_rollback)
    server = TestServer(app)
    try:
        await server.start_server(auto_decompress=False)  # as `serve` has it
    except BaseException:
        await app.cleanup()
        raise
    assert server.runner is not None
    assert server.runner.server is not None
    add_fast_path(server.runner.server, app)
    async with TestClient(server) as client:
        yield LocalApi(client, config)


async def when(probe: Callable[[], Awaitable[T]], holds: Callable[[T], bool]) -> T:
    """Ask until what is seen is what is waited for, and return it."""
    seen = await probe()
    try:
        async with asyncio.timeout(LIMIT_S):
            while not holds(seen):
                await asyncio.sleep(0.01)
                seen = await probe()
    except TimeoutError:
        raise AssertionError(f"not within {LIMIT_S:g} s; at last it was {seen}") from None
    return seen


def _has(seen: Mapping[str, object], wanted: Mapping[str, object]) -> bool:
    return all(seen[name] == value for name, value in wanted.items())


def check_answer(method: str, path: str, answer: Answer) -> None:
    """Assert that the document has this status, content type, error code and body for the route.

    No answer may be kept in a cache, but for the files of the pages, or taken for another media type.
    """
    told = f"{method} {path[:80]} -> {answer.status} {answer.media_type} {answer.body[:1000]!r}"
    assert answer.headers.get("X-Content-Type-Options") == "nosniff", told
    is_file = answer.status == 200 and PAGES.match(path) is not None
    assert (answer.headers.get("Cache-Control") == "no-store") is not is_file, told
    operation = _operation("GET" if method == "HEAD" else method, path.partition("?")[0])
    if operation is None:
        assert answer.media_type in {"application/problem+json", "application/json"}, told
        assert method == "HEAD" or answer.refusal in ANYWHERE, told
        return
    assert str(answer.status) in operation["responses"], told
    documented = operation["responses"][str(answer.status)].get("content")
    if documented is None:  # an answer that is a file, or has no body
        assert answer.status in {200, 204}, told
        return
    assert answer.media_type in documented, told
    if method == "HEAD":
        assert not answer.body, told
    elif answer.media_type.endswith("json"):
        schema = documented[answer.media_type]["schema"]
        mistakes = [mistake.message for mistake in _validator(json.dumps(schema)).iter_errors(answer.json)]
        assert not mistakes, f"{told}: {mistakes}"


def _operation(method: str, path: str) -> Json | None:
    """Return what the document says of a request, if it has such a route; fixed paths go first."""
    found = [
        operations[method.lower()]
        for pattern, operations in _paths()
        if method.lower() in operations and re.fullmatch(pattern, path)
    ]
    return found[0] if found else None


@cache
def _document() -> dict[str, Any]:
    return openapi_document(all_routes())


@cache
def _paths() -> list[tuple[str, Json]]:
    patterns = {
        re.sub(r"\{\w+\}", "[^/]+", path.replace("{path}", ".+")): item
        for path, item in _document()["paths"].items()
    }
    return sorted(patterns.items(), key=lambda entry: "[^/]+" in entry[0])


@cache
def _validator(schema: str) -> OAS30Validator:
    # The document's own components, so that its references lead somewhere.
    return OAS30Validator({"allOf": [json.loads(schema)], "components": _document()["components"]})


def small_config(folder: Path, **changes: object) -> Config:
    """Return a configuration over a new data directory with keys."""
    ensure_data_dir(folder)
    return replace(Config(repository=folder, data=folder), **changes)  # type: ignore[arg-type]


def small_app(
    routes: Iterable[Route], config: Config, clock: Callable[[], float] = time.time
) -> web.Application:
    """Assemble what stands between the network and a handler."""
    limits = RateLimits(config, clock)
    app = web.Application(
        middlewares=[
            errors_middleware,
            auth_middleware(Gate(create_verifier(config), limits, clock)),
            validation_middleware,
        ]
    )
    app.on_response_prepare.append(response_completer(Proxies()))
    add_routes(app, routes)
    return app


def bearer(config: Config, *roles: str, subject: str = "alice", expires_s: float = 3600) -> dict[str, str]:
    """Return the header of a valid token."""
    token = sign_token(config.data, subject, roles or ["admin"], expires_s=expires_s, audience="loadledger")
    return {"Authorization": f"Bearer {token}"}


async def whoami(request: web.Request) -> web.Response:
    """Answer with the subject, if there is one."""
    principal = request.get(PRINCIPAL)
    return web.json_response({"subject": principal.subject if principal is not None else None})


def route(
    path: str = "/x",
    handler: Handler = whoami,
    *,
    method: str = "GET",
    access: Access = Access.ANY,
) -> Route:
    """Return a route with the usual answers to what a test does not care about."""
    return Route(method, path, handler, access)
