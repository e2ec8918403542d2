"""The seam to other servers that share the ledger, as handlers and checks use it. A server alone has none.

The package `nodes` implements it. The keys of the application are set with it only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import wraps
from typing import Protocol

from aiohttp import web
from aiohttp.typedefs import Handler

from answers.nodes import NodeInfo
from events.models import Model
from events.values import NodeSignature, Sign
from runtime.router import Here, There
from runtime.wire import Buffer
from server.appkeys import BODIES, ROUTER
from server.auth.gate import PRINCIPAL
from server.errors import ANSWERING_NODE, NODE
from server.http.bodies import Share
from server.http.validation import path_parameters

NODE_ADDRESS = "Loadledger-Node-Address"
"""The address of the node that has answered a forwarded request: clients may go there themselves."""
COPIES = "Loadledger-Copies"
"""The addresses of all nodes that have a model with copies, separated by spaces: clients may ask any."""


class Forwarding(Protocol):
    """Requests that another server has to answer."""

    async def catch_up(self, request: web.BaseRequest, model_id: str) -> None:
        """Begin to answer a request here, by a state no older than that of a server that forwarded it."""

    async def forward(
        self,
        request: web.BaseRequest,
        there: There,
        model_id: str,
        share: Share,
        *,
        body: Buffer | None = None,
        ends_at_s: float | None = None,
    ) -> web.StreamResponse:
        """Answer a request through the server at which its model is loaded, or once another one that has it.

        Args:
            request: its body is unread, unless it is given.
            there: that server.
            model_id: the model.
            share: counts the bodies.
            body: the body as it was received here, decompressed.
            ends_at_s: when the answer must be there, on the loop's clock; None is the usual limit.
        """

    def describe_copy(self, request: web.BaseRequest, here: Here) -> Mapping[str, str]:
        """Return the header fields by which an answer of one of several copies says more of them."""

    def find_other(self, request: web.BaseRequest, name: str) -> There | None:
        """Return another server that a request names; None if that is this one, or is not to be asked."""

    async def pass_on(
        self, request: web.BaseRequest, there: There, model_id: str, body: AsyncIterator[bytes] | None
    ) -> web.Response:
        """Answer a request about a model through another server, to which its body goes as it arrives."""


class Cluster(Protocol):
    """This server among others that share the ledger."""

    @property
    def may_serve(self) -> bool:
        """Whether it answers inferences, with the database or without."""

    @property
    def is_sick(self) -> bool:
        """Whether it runs and cannot do its work, so that the others may load its models."""

    @property
    def problem(self) -> str | None:
        """Why its lease was not renewed; None if it was."""

    def tasks(self) -> Mapping[str, asyncio.Task[None]]:
        """Return the tasks without which it would do nothing."""

    def describe(self) -> list[NodeInfo]:
        """Return all servers as this one knows them."""

    def count_copies(self, model: Model) -> tuple[int, str | None]:
        """Return how many copies of a model are ready, and what the missing ones wait for."""

    def has_device(self, devices: Sequence[str]) -> bool:
        """Whether any server that takes loads has one of these devices."""

    def sign(self, statement: bytes) -> NodeSignature:
        """Sign what a person said to this server, so that the others believe it."""


CLUSTER: web.AppKey[Cluster] = web.AppKey("cluster")
"""This server as one of several, once it has joined; a server alone is none."""
FORWARDING: web.AppKey[Forwarding] = web.AppKey("forwarding")
"""Of a server with others; one alone has none."""


def forwardable(handler: Handler) -> Handler:
    """Return a handler of reads about a model that lets the server answer at which the model is loaded."""

    @wraps(handler)
    async def answer(request: web.Request) -> web.StreamResponse:
        app, path = request.app, path_parameters(request)
        model_id = path["id"]
        forwarding = app.get(FORWARDING)
        if forwarding is None:
            return await handler(request)
        await forwarding.catch_up(request, model_id)
        target = app[ROUTER].resolve(model_id, path.get("version"))
        if isinstance(target, There):
            share = app[BODIES].share(request[PRINCIPAL].subject)
            return await forwarding.forward(request, target, model_id, share)
        response = await handler(request)
        response.headers[NODE] = request[ANSWERING_NODE]
        return response

    return answer


def signer_of(app: web.Application) -> Sign | None:
    """Return what signs for this server what a person says; None if it is alone with its ledger."""
    return None if (cluster := app.get(CLUSTER)) is None else cluster.sign
