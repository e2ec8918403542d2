"""The servers that share a ledger, as this server's application and handlers ask about them.

A server is alone with its ledger, and a cluster of one. The package `nodes` overrides `Cluster` for several.
"""

# ruff: noqa: ARG002 - a server alone looks at no argument

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import wraps
from typing import Any, TypeVar

from aiohttp import web
from aiohttp.typedefs import Handler

from answers.health import NotReady
from answers.models import ModelInfo
from answers.nodes import NodeInfo
from events.commands import Receipt
from events.log import Log
from events.models import Model
from events.state import State
from events.statements import Sign
from events.types import Cause, LoadParameters
from features.nodes.members import make_node_infos
from features.nodes.metrics import Gauge, list_gauges
from features.nodes.register import is_epoch_over
from runtime.consumer.running import RunningLoad
from runtime.elsewhere import Elsewhere
from runtime.router import Here, There
from runtime.wire import Buffer
from server.appkeys import BODIES, MEMORY_PLAN, POOL, ROUTER
from server.auth.gate import PRINCIPAL, ForwardedVerifier
from server.errors import ANSWER_FIELDS
from server.http.bodies import BodyMemory
from server.http.validation import path_parameters

T = TypeVar("T")

NODE = "Loadledger-Node"
NODE_ADDRESS = "Loadledger-Node-Address"
COPIES = "Loadledger-Copies"
ANSWER_HEADERS: Mapping[str, Any] = {
    NODE: {"schema": {"type": "string"}, "description": "Of several nodes, the one that answered."},
    NODE_ADDRESS: {
        "schema": {"type": "string", "format": "uri"},
        "description": "Its address, if another node has forwarded the request there.",
    },
    COPIES: {
        "schema": {"type": "string"},
        "description": "Of a model with copies: the addresses of all, separated by spaces.",
    },
}
"""Header fields of an answer, by which clients find the server to ask next time."""


class Cluster(Elsewhere):
    """The servers that share the ledger: this one alone.

    Attributes:
        sign: signs a person's statement to this server, so that the others believe it; None if it is alone.
        verify_forwarded: verifies the tokens of requests that others have forwarded; None if it is alone.
        log: not open yet.
        loads: the running loads, by job id, as the consumer keeps them.
        duties: the work of which one server does each for all, by name: this one's, if it is to, each with
            what the next server has to know of it.
    """

    sign: Sign | None = None
    verify_forwarded: ForwardedVerifier | None = None

    def __init__(self, log: Log) -> None:
        self.log = log
        self.loads: dict[str, RunningLoad] = {}
        self.duties: dict[str, str] = {}

    def is_over(self, epoch: str, state: State) -> bool:
        return is_epoch_over(state.registers.nodes, epoch)

    async def open(self, check: Callable[[], Awaitable[T]], open_files: Callable[[], Awaitable[None]]) -> T:
        """Open the files and the log, and check the data directory: first, unless the log is a replica."""
        found = await check()
        await open_files()
        await self.log.open()
        return found

    async def begin(self, app: web.Application) -> Receipt:
        """Record that this server is there; its workers can be started, and its files are open."""
        return await self.log.server_started(app[POOL].applied.confinement, app[MEMORY_PLAN].to_recorded())

    @asynccontextmanager
    async def forwarding(self, app: web.Application) -> AsyncIterator[None]:
        """Forward requests meanwhile, to where the router says that a model is."""
        yield

    async def leave(self, end_work: Callable[[], Awaitable[None]]) -> None:
        """End the work of this server before its running inferences, so that another one takes it over."""

    async def record_stop(self) -> None:
        """Record that this server stops in order; nothing is appended after it.

        Raises:
            LedgerProblem: it could not be recorded.
        """
        await self.log.server_stopped()

    async def close(self) -> None:
        await self.log.close()

    def tasks(self) -> Mapping[str, asyncio.Task[None]]:
        """Return further tasks without which this server would do nothing."""
        return {}

    def checks(self) -> Mapping[str, bool]:
        """Return further checks of whether this server is ready, or others of the same name."""
        return {}

    def problem(self) -> NotReady | None:
        """Return why these checks fail, or None."""
        return None

    def count_missing(self, models: Iterable[Model]) -> int:
        """Count the models without which it is not ready: those to be reloaded since its start.

        Only Triton's strict meaning of ready waits for them. A failed one is none of them.
        """
        return sum(model.lost_by is Cause.RESTART for model in models)

    def describe(self) -> list[NodeInfo]:
        """Return all servers that this one knows; if it is alone, those that its ledger had once."""
        return make_node_infos(self.log.state)

    def list_gauges(self) -> Sequence[Gauge]:
        nodes = () if self.name is None else self.describe()
        return list_gauges(nodes, self.log.state, self.log.tally.names.of)

    def complete_answer(self, shown: ModelInfo, model: Model) -> ModelInfo:
        """Return a model's answer, completed by its present state at other servers."""
        return shown

    def has_duty(self, duty: str) -> bool:
        """Whether this server does the work of a name in `duties`, rather than another one."""
        return True

    def read_handovers(self, duty: str) -> Sequence[str]:
        """Return what the servers have said of a duty, as last read, this one and gone ones too."""
        return [self.duties[duty]]

    def can_run(self, parameters: LoadParameters) -> bool:
        """Whether another server that takes loads has all that a load with these parameters needs there."""
        return False

    async def catch_up(self, request: web.BaseRequest, model_id: str) -> None:
        """Begin to answer a request here, by a state no older than that of a server that forwarded it."""

    async def forward(
        self,
        request: web.BaseRequest,
        there: There,
        model_id: str,
        memory: BodyMemory,
        *,
        body: Buffer | None = None,
        ends_at_s: float | None = None,
    ) -> web.StreamResponse:
        """Answer a request through the server at which its model is loaded, or once another one that has it.

        Args:
            request: its body is unread, unless it is given.
            there: the server that has it.
            model_id: the model.
            memory: counts the bodies.
            body: the body as it was received here, decompressed.
            ends_at_s: the answer's time limit, on the loop's clock; None is the usual limit.
        """
        raise NotImplementedError

    def describe_copy(self, request: web.BaseRequest, here: Here) -> Mapping[str, str]:
        """Return the header fields by which an answer of one of several copies says more of them."""
        return {}

    def find_other(self, request: web.BaseRequest, name: str) -> There | None:
        """Return another server that a request names, or None if that is this one, or must not be asked."""
        return None

    async def pass_on(
        self, request: web.BaseRequest, there: There, model_id: str, body: AsyncIterator[bytes] | None
    ) -> web.Response:
        """Answer a request about a model through another server, to which its body goes as it arrives."""
        raise NotImplementedError


CLUSTER = web.AppKey("cluster", Cluster)


def forwardable(handler: Handler) -> Handler:
    """Return a handler of reads about a model that lets the server answer at which the model is loaded."""

    @wraps(handler)
    async def answer(request: web.Request) -> web.StreamResponse:
        app, path = request.app, path_parameters(request)
        model_id = path["id"]
        await app[CLUSTER].catch_up(request, model_id)
        target = app[ROUTER].resolve(model_id, path.get("version"))
        if isinstance(target, There):
            memory = app[BODIES].memory_of(request[PRINCIPAL].subject)
            return await app[CLUSTER].forward(request, target, model_id, memory)
        response = await handler(request)
        response.headers.update(request.get(ANSWER_FIELDS, {}))
        return response

    return answer
