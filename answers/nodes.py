"""Nodes, with what runs there."""

from __future__ import annotations

from typing import Annotated

from answers.answer import AS_OF, AnswerBody, about, one_of
from answers.jobs import Kind, Status
from answers.models import State


class NodeModel(AnswerBody, frozen=True, kw_only=True):
    """A model at a node."""

    id: str
    version: int
    state: State


class NodeJob(AnswerBody, frozen=True, kw_only=True):
    """A job at a node that has not ended."""

    id: str
    kind: Kind
    model_id: str
    version: int | None
    status: Status


class NodeInfo(AnswerBody, frozen=True, kw_only=True):
    """A server among those that share the ledger."""

    id: Annotated[str, about("Its name.")]
    address: Annotated[str, about("The URL at which the other nodes reach it.")]
    attributes: Annotated[list[str], about("`name=value` each.")]
    phase: Annotated[
        str,
        about("`draining`: it takes no more loads. `left`: it stopped in order. `lost`: it did not."),
        one_of("joined", "draining", "left", "lost"),
    ]
    epoch: Annotated[int, about("How many times it has joined.")]
    joined_at: Annotated[str, about("When this epoch began.")]
    ended_at: Annotated[str | None, about("When it ended; null while it has not.")]
    release: Annotated[str, about("Of its software.")]
    budget_bytes: Annotated[int | None, about("Memory budget of its workers; null is no limit.")]
    free_bytes: Annotated[
        int | None, about("Of that, unused and not reserved, as it last said; missing if unknown.")
    ] = None
    models: Annotated[list[NodeModel], about("Loaded there, by id.")]
    jobs: Annotated[list[NodeJob], about("Placed there and not ended, oldest first.")]
    renewed_at: Annotated[
        str | None,
        about("When it last renewed its lease, as this server last read; null until it has read that."),
    ]
    late: Annotated[
        bool | None,
        about("Whether it did not renew its lease in time; null if it has ended, or that is not known."),
    ]
    this: Annotated[bool, about("Whether it is the node that answers.")]
    trusted: Annotated[
        bool | None,
        about(
            "Whether its join is signed with a key that the nodes share, or it does nothing; null at its end."
        ),
    ]
    placer: Annotated[
        bool, about("Whether it is the node that places loads, and does what belongs to no node.")
    ]

    @property
    def ended(self) -> bool:
        """Whether it is gone, until it joins again."""
        return self.phase not in {"joined", "draining"}


class NodeList(AnswerBody, frozen=True, kw_only=True):
    """All nodes that ever joined, by name."""

    nodes: Annotated[list[NodeInfo], about("None if the server is alone.")]
    as_of: Annotated[int, AS_OF]
