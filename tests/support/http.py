"""The real application as its clients see it: every answer is held to the generated OpenAPI document."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from multidict import CIMultiDictProxy
from openapi_schema_validator import OAS30Validator
from yarl import URL

from events.types import Event
from runtime.consumer import Consumer
from runtime.workers import Worker
from server.app import all_routes, create_app
from server.appkeys import CONSUMER, LOG, READER, STOPPING
from server.config import Config
from server.keys import ensure_data_dir, issue_token
from server.openapi import openapi_document

LIMIT_S = 30.0
"""Nothing here takes this long; it is there so that a bug fails a test and does not hang it."""

ANYWHERE = {
    (400, "invalid_request"),
    (401, "no_credentials"),
    (401, "invalid_token"),
    (404, "not_found"),
    (405, "method_not_allowed"),
    (429, "rate_limited"),
    (429, "too_many_failures"),
}
"""What a request to a path or a method that no route has can be answered with."""

Client = TestClient[web.Request, web.Application]
Json = Any


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
    """A client with tokens, for a server wherever it runs.

    Args:
        session: sends requests; relative paths go to its server.
        config: what the server was configured with; its keys sign the tokens.
    """

    def __init__(self, session: Client | aiohttp.ClientSession, config: Config) -> None:
        self._session = session
        self.config = config
        self._tokens: dict[tuple[str, tuple[str, ...]], str] = {}

    def token(self, *roles: str, subject: str = "alice") -> str:
        """Return a token, really signed; the same one for the same person."""
        who = (subject, roles)
        if who not in self._tokens:
            data, audience = self.config.data, self.config.jwt_audience
            self._tokens[who] = issue_token(data, subject, roles, expires_s=3600, audience=audience)
        return self._tokens[who]

    async def send(
        self,
        method: str,
        path: str,
        *,
        roles: tuple[str, ...] = ("admin",),
        subject: str = "alice",
        headers: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Answer:
        """Send a request, the path exactly as it stands here, and check the answer against the document."""
        sent = dict(headers or {})
        if roles:
            sent["Authorization"] = f"Bearer {self.token(*roles, subject=subject)}"
        async with asyncio.timeout(LIMIT_S + 60):
            url = URL(path, encoded=True)
            async with self._session.request(method, url, headers=sent, **options) as response:
                answer = Answer(response.status, response.headers, await response.read())
        check_answer(method, path, answer)
        return answer

    async def get(self, path: str, **options: Any) -> Answer:
        """Send a GET."""
        return await self.send("GET", path, **options)

    async def post(self, path: str, *, wait: int | None = None, **options: Any) -> Answer:
        """Send a POST, with `Prefer: wait` where it is given."""
        if wait is not None:
            options["headers"] = {"Prefer": f"wait={wait}", **options.get("headers", {})}
        return await self.send("POST", path, **options)

    async def load(self, model_id: str, version: int | None = None, **body: Any) -> Json:
        """Load a model and return the job, which must have completed."""
        body |= {"version": version} if version is not None else {}
        answer = await self.post(f"/api/v1/models/{model_id}/load", wait=60, json=body)
        job = answer.json
        assert (answer.status, job["status"]) == (200, "completed"), job
        return job

    async def failed_load(self, model_id: str, **body: Any) -> Json:
        """Load a model and return the job's error; it must have failed."""
        answer = await self.post(f"/api/v1/models/{model_id}/load", wait=60, json=body)
        job = answer.json
        assert (answer.status, job["status"]) == (200, "failed"), job
        return job["error"]

    async def unload(self, model_id: str, *, force: bool = False) -> Json:
        """Unload a model and return the job, which must have completed."""
        answer = await self.post(f"/api/v1/models/{model_id}/unload?force={str(force).lower()}", wait=60)
        job = answer.json
        assert (answer.status, job["status"]) == (200, "completed"), job
        return job

    async def infer(
        self, model_id: str, inputs: Json, *, version: int | None = None, **request: Any
    ) -> Answer:
        """Ask a model, as someone who may do that and nothing else."""
        where = f"/v2/models/{model_id}" + (f"/versions/{version}" if version is not None else "")
        body = {"inputs": inputs, **request}
        return await self.post(f"{where}/infer", roles=("predict",), subject="pia", json=body)

    async def model(self, model_id: str) -> Json:
        """Return a model; it must be there."""
        answer = await self.get(f"/api/v1/models/{model_id}")
        assert answer.status == 200, answer.body
        return answer.json

    async def job(self, job_id: str) -> Json:
        """Return a job; it must be there."""
        answer = await self.get(f"/api/v1/jobs/{job_id}")
        assert answer.status == 200, answer.body
        return answer.json

    async def jobs(self, query: str = "") -> list[Json]:
        """Return a page of jobs, newest first."""
        answer = await self.get(f"/api/v1/jobs{query}")
        assert answer.status == 200, answer.body
        jobs: list[Json] = answer.json["jobs"]
        return jobs

    async def job_when(self, job_id: str, **wanted: str) -> Json:
        """Wait until members of a job have these values."""
        return await self._when(self.job(job_id).__class__, f"/api/v1/jobs/{job_id}", wanted)

    async def model_when(self, model_id: str, **wanted: str) -> Json:
        """Wait until members of a model have these values."""
        return await self._when(None, f"/api/v1/models/{model_id}", wanted)

    async def _when(self, _: object, path: str, wanted: Mapping[str, str]) -> Json:
        raise NotImplementedError
