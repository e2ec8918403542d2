"""Nodes: list them with what runs where, and drain one. A server alone has none.

The socket in the data directory (`server.auth.control`) has the same routes: a hook that stops a node drains
it without a token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from aiohttp import web
from marshmallow import Schema, fields, validate

from events.jobs import Job, JobKind, JobStatus
from events.models import Model, ModelState, Serving
from events.nodes import Lease, Node, NodePhase, find_placer
from events.registercommands import DrainNode
from events.state import State
from server.api.schemas import AnswerSchema, about, one_of
from server.appkeys import LOG
from server.auth.access import Access
from server.auth.gate import PRINCIPAL
from server.cluster import CLUSTER
from server.errors import ServerProblem
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


class NodeModelSchema(AnswerSchema):
    """A model at a node."""

    id = fields.String()
    version = fields.Integer()
    state = fields.String(validate=one_of(ModelState))


class NodeJobSchema(AnswerSchema):
    """A job at a node that has not ended."""

    id = fields.String()
    kind = fields.String(validate=one_of(JobKind))
    model_id = fields.String()
    version = fields.Integer(allow_none=True)
    status = fields.String(validate=one_of(JobStatus))


class NodeSchema(AnswerSchema):
    """A server among those that share the ledger."""

    id = fields.String(**about("Its name."))
    address = fields.String(**about("The URL at which the other nodes reach it."))
    attributes = fields.List(fields.String(), **about("`name=value` each."))
    phase = fields.String(
        validate=one_of(NodePhase),
        **about("`draining`: it takes no more loads. `left`: it stopped in order. `lost`: it did not."),
    )
    epoch = fields.Integer(**about("How many times it has joined."))
    joined_at = fields.String(**about("When this epoch began."))
    ended_at = fields.String(allow_none=True, **about("When it ended; null while it has not."))
    release = fields.String(**about("Of its software."))
    budget_bytes = fields.Integer(allow_none=True, **about("Memory budget of its workers; null is no limit."))
    models = fields.List(fields.Nested(NodeModelSchema), **about("Loaded there, by id."))
    jobs = fields.List(fields.Nested(NodeJobSchema), **about("Placed there and not ended, oldest first."))
    renewed_at = fields.String(
        allow_none=True,
        **about("When it last renewed its lease, as this server last read; null until it has read that."),
    )
    late = fields.Boolean(
        allow_none=True,
        **about("Whether it did not renew its lease in time; null if it has ended, or that is not known."),
    )
    this = fields.Boolean(**about("Whether it is the node that answers."))
    trusted = fields.Boolean(
        allow_none=True,
        **about(
            "Whether its join is signed with a key that the nodes share, or it does nothing; null at its end."
        ),
    )
    placer = fields.Boolean(
        **about("Whether it is the node that places loads, and does what belongs to no node.")
    )


class NodeListSchema(AnswerSchema):
    """All nodes that ever joined, by name."""

    nodes = fields.List(fields.Nested(NodeSchema), **about("None if the server is alone."))
    as_of = fields.Integer(**about("The position that the answer reflects."))


@routes.get(
    "/api/v1/nodes",
    access=Access.ANY,
    summary="List the nodes, and what runs where",
    description="Servers that share a ledger (`--ledger`) are its nodes. A server alone lists none.",
    query=NothingSchema(),
    answers={200: (NodeListSchema(), "All nodes.")},
)
async def list_nodes(request: web.Request) -> web.Response:
    return web.json_response({"nodes": describe_nodes(request.app), "as_of": request.app[LOG].state.position})


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
        202: (NodeSchema(), "It drains from now on; its `models` and `jobs` say what is left."),
        200: (NodeSchema(), "It was draining already."),
    },
    errors=("unknown_node", "no_nodes", "node_ended", "log_unavailable"),
)
async def drain_node(request: web.Request) -> web.Response:
    app, node_id = request.app, path_parameters(request)["id"]
    if CLUSTER not in app:
        raise NoNodes
    receipt = await app[LOG].submit(DrainNode(node_id, request[PRINCIPAL].subject))
    [view] = [view for view in describe_nodes(app) if view["id"] == node_id]
    return web.json_response(view, status=200 if receipt.existing else 202)


def describe_nodes(app: web.Application) -> Sequence[Mapping[str, Any]]:
    """Return all nodes as this server knows them."""
    return app[CLUSTER].describe() if CLUSTER in app else node_views(app[LOG].state)


def node_views(
    state: State,
    leases: Iterable[Lease] = (),
    own_id: str | None = None,
    late: Iterable[str] = (),
    untrusted: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Return the nodes of a state by name, with their models and jobs.

    Args:
        state: of the ledger.
        leases: those of earlier epochs say nothing.
        own_id: the node that answers.
        late: nodes that are late whatever the leases say.
        untrusted: nodes whose joins are not signed with a key that the nodes share.
    """
    models, jobs = _models_by_node(state), _jobs_by_node(state)
    by_epoch = {(lease.node_id, lease.epoch): lease for lease in leases}
    placer = find_placer(state.registers.nodes, untrusted)
    views = []
    for node in sorted(state.registers.nodes.values(), key=lambda node: node.id):
        lease = by_epoch.get((node.id, node.epoch))
        is_late = None if lease is None or not node.is_present else lease.is_late or node.id in late
        views.append(
            {
                **_own_members(node),
                "models": [_model_members(*each) for each in models[node.id]],
                "jobs": [_job_members(job) for job in jobs[node.id]],
                "renewed_at": lease.renewed_at if lease is not None else None,
                "late": is_late,
                "this": node.id == own_id,
                "trusted": node.id not in untrusted if node.is_present else None,
                "placer": node.id == placer,
            }
        )
    return views


def _models_by_node(state: State) -> defaultdict[str | None, list[tuple[Model, Serving]]]:
    found = defaultdict[str | None, list[tuple[Model, Serving]]](list)
    for model in sorted(state.models.values(), key=lambda model: model.id):
        for serving in model.servings:
            found[serving.node_id].append((model, serving))
    return found


def _jobs_by_node(state: State) -> defaultdict[str | None, list[Job]]:
    found = defaultdict[str | None, list[Job]](list)
    for job in state.unended():
        found[job.node_id].append(job)
    return found


def _own_members(node: Node) -> dict[str, Any]:
    return {
        "id": node.id,
        "address": node.address,
        "attributes": list(node.attributes),
        "phase": node.phase.value,
        "epoch": node.epoch,
        "joined_at": node.joined_at,
        "ended_at": node.ended_at,
        "release": node.release,
        "budget_bytes": node.budget_bytes,
    }


def _model_members(model: Model, serving: Serving) -> dict[str, Any]:
    return {"id": model.id, "version": serving.version, "state": model.state.value}


def _job_members(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "kind": job.kind.value,
        "model_id": job.model_id,
        "version": job.version,
        "status": job.status.value,
    }
