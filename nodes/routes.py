"""Nodes: list them with what runs where, and drain one. A server alone has none.

The socket in the data directory (`server.auth.control`) has the same routes: a hook that stops a node drains
it without a token.
"""

from __future__ import annotations

from aiohttp import web
from marshmallow import Schema, fields, validate

from answers.nodes import NodeInfo, NodeList
from features.nodes.commands import DrainNode
from server.api.schemas import about
from server.appkeys import LOG
from server.auth.access import Access
from server.auth.gate import PRINCIPAL
from server.cluster import CLUSTER
from server.errors import ServerProblem
from server.http.answers import respond
from server.http.validation import NothingSchema, path_parameters
from server.routing import Routes

routes = Routes(tag="nodes")

MAX_ID_CHARACTERS = 255
"""Of a node's name; those of this release have fewer."""


class NoNodes(ServerProblem):
    """This server is alone: it was started without --ledger, so there are no nodes."""

    code = "no_nodes"


class NodePathSchema(Schema):
    """The node named by the path."""

    id = fields.String(
        required=True,
        validate=validate.Length(1, MAX_ID_CHARACTERS),
        **about("The node's name.", example="loadledger-0"),
    )


@routes.get(
    "/api/v1/nodes",
    access=Access.ANY,
    summary="List the nodes, and what runs where",
    description="Servers that share a ledger (`--ledger`) are its nodes. A server alone lists none.",
    query=NothingSchema(),
    answers={200: (NodeList, "All nodes.")},
)
async def list_nodes(request: web.Request) -> web.Response:
    return respond(NodeList(nodes=request.app[CLUSTER].describe(), as_of=request.app[LOG].state.position))


@routes.post(
    "/api/v1/nodes/{id}/drain",
    access=Access.ADMIN,
    summary="Drain a node",
    description="It takes no more loads, and its models are loaded at other nodes, then unloaded at this "
    "one. It drains until it stops: when it joins again, it takes loads. Repeat it at will.",
    path=NodePathSchema(),
    query=NothingSchema(),
    body=NothingSchema(),
    answers={
        202: (NodeInfo, "It drains from now on; its `models` and `jobs` say what is left."),
        200: (NodeInfo, "It was draining already."),
    },
    errors=("unknown_node", "no_nodes", "node_ended", "log_unavailable"),
)
async def drain_node(request: web.Request) -> web.Response:
    app, node_id = request.app, path_parameters(request)["id"]
    if app[CLUSTER].name is None:
        raise NoNodes
    receipt = await app[LOG].submit(DrainNode(node_id, request[PRINCIPAL].subject))
    [node] = [node for node in app[CLUSTER].describe() if node.id == node_id]
    return respond(node, status=200 if receipt.existing else 202)
