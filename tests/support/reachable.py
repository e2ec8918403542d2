"""Nodes that reach each other: applications in this process, each behind a proxy at its address."""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jwt
from aiohttp import web

from nodes.thisnode import ThisNode
from server.appkeys import LOG
from server.auth.gate import Principal
from server.cluster import CLUSTER
from support.cutting import CuttingProxy, cutting_proxy
from support.http import ONE, Answer, LocalApi
from support.nodes import local_node
from support.workers import until


def node_of(app: web.Application) -> ThisNode:
    """Return the server of an application as a node."""
    node = app[CLUSTER]
    assert isinstance(node, ThisNode)
    return node


@dataclass(slots=True)
class ReachableNode:
    """A node: its application, and the proxy at its address, which a test may cut."""

    name: str
    api: LocalApi
    proxy: CuttingProxy

    @property
    def app(self) -> web.Application:
        """The application."""
        return self.api.app

    @property
    def node(self) -> ThisNode:
        """This server as a node."""
        return node_of(self.app)

    @property
    def address(self) -> str:
        """Its address, as the ledger has it."""
        return f"http://{self.proxy.address[0]}:{self.proxy.address[1]}"

    def node_of(self, model_id: str) -> str | None:
        """Return the node at which a model is loaded, as this one knows it."""
        model = self.app[LOG].state.models.get(model_id)
        serving = model.serving if model is not None and model.state == "loaded" else None
        return None if serving is None else serving.server

    def nodes_of(self, model_id: str) -> set[str | None]:
        """Return the nodes that have copies of a model, as this one knows them."""
        model = self.app[LOG].state.models.get(model_id)
        return set() if model is None or model.state != "loaded" else {each.server for each in model.servings}

    async def knows(self, model_id: str, node_id: str | None) -> None:
        """Wait until this node knows that a model is loaded at a node, or at none."""
        await until(lambda: self.node_of(model_id) == node_id)


@asynccontextmanager
async def reachable_node(
    ledger: str, folder: Path, name: str, **settings: Any
) -> AsyncIterator[ReachableNode]:
    """Serve a node as `local_node` does, behind a proxy; `ledger` is the URL of the database for servers."""
    async with cutting_proxy(("127.0.0.1", 0)) as proxy:
        address = f"http://{proxy.address[0]}:{proxy.address[1]}"
        async with local_node(ledger, folder, name, node_address=address, **settings) as api:
            assert api.client.port is not None
            proxy.target = ("127.0.0.1", api.client.port)
            yield ReachableNode(name, api, proxy)


@asynccontextmanager
async def reachable_nodes(
    ledger: str, folder: Path, *names: str, **settings: Any
) -> AsyncIterator[Sequence[ReachableNode]]:
    """Serve several nodes, which all know each other."""
    async with AsyncExitStack() as stack:
        serving = [reachable_node(ledger, folder, name, **settings) for name in names]
        nodes = [await stack.enter_async_context(each) for each in serving]
        for node in nodes:
            await until(lambda log=node.app[LOG]: log.state.registers.nodes.keys() == set(names))  # type: ignore[misc]
        yield nodes


async def loaded_beside(nodes: Sequence[ReachableNode], model_id: str) -> tuple[ReachableNode, ReachableNode]:
    """Load a model; return the node that has it, and another one. All nodes know where it is."""
    await nodes[0].api.load(model_id)
    [owner] = [node for node in nodes if node.name == nodes[0].node_of(model_id)]
    for node in nodes:
        await node.knows(model_id, owner.name)
    return owner, next(node for node in nodes if node is not owner)


def forwarded(
    sender: ReachableNode,
    receiver: ReachableNode,
    *roles: str,
    model_id: str = "m",
    jti: str = "j",
    expires_s: float = 3600,
) -> dict[str, str]:
    """Return the header fields with which a node forwards a request about a model to another one."""
    to, client = (
        sender.app[LOG].state.registers.nodes[receiver.name],
        Principal("pia", frozenset(roles or ("infer",)), jti),
    )
    token = sender.node.peers.make_token(to, model_id, replace(client, expires_at=time.time() + expires_s))
    return {"Loadledger-Forwarded": sender.name, "Authorization": f"Bearer {token}"}


def read_claims(fields: dict[str, str]) -> dict[str, Any]:
    token = fields["Authorization"].removeprefix("Bearer ")
    found: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return found


async def send(node: ReachableNode, path: str, fields: dict[str, str], method: str = "POST") -> Answer:
    """Send a request of another node."""
    body: dict[str, Any] = {"json": {"inputs": [ONE]}} if method == "POST" else {}
    return await node.api.send(method, path, roles=(), headers=fields, **body)


async def loaded_at_all(nodes: Sequence[ReachableNode], model_id: str) -> None:
    """Load a model at all nodes, which then know of all copies."""
    await nodes[0].api.load(model_id, copies=len(nodes))
    for node in nodes:
        await until(lambda node=node: node.nodes_of(model_id) == {each.name for each in nodes})  # type: ignore[misc]
