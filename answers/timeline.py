"""The states of models, server and nodes over a range of time."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated

from msgspec.structs import astuple, replace

from answers.answer import AS_OF, AnswerBody, about, one_of
from answers.models import State

_RENAMED = {"begin": "from", "end": "to", "is_waiting": "waiting"}


class Segment(AnswerBody, frozen=True, omit_defaults=False, rename=_RENAMED, gc=False):
    """A time in which a model's state stayed the same, from `from` to before `to`."""

    state: State
    begin: str
    end: str
    version: int | None = None
    next_version: Annotated[
        int | None, about("The version that loads beside the one that serves, or waits to be loaded.")
    ] = None
    load_job_id: Annotated[str | None, about("Job of the load that serves, served, or is under way.")] = None
    position: Annotated[int | None, about("Of the event that began it; null if that was earlier.")] = None
    by: Annotated[str | None, about("Who asked for what began it; null if not known.")] = None
    cause: Annotated[str | None, about("Of the job that began it.")] = None
    is_waiting: Annotated[
        bool, about("Whether the model is not loaded, and a load of it waits to start.")
    ] = False
    degraded: Annotated[bool, about("Whether some of its workers are gone.")] = False
    error: Annotated[str | None, about("Code of the failure, in the states `failed` and `lost`.")] = None

    @property
    def drawn(self) -> tuple[object, ...]:
        """The members that the drawing shows: segments that differ in none of them are one."""
        what = self.state, self.version, self.next_version, self.load_job_id
        return *what, self.is_waiting, self.degraded


class MarkKind(StrEnum):
    """The kind of a mark."""

    SWAPPED = "swapped"
    FAILED = "failed"
    LOST = "lost"
    EXITED = "exited"


class Mark(AnswerBody, frozen=True, omit_defaults=False, gc=False):
    """A moment that stands out: another version serves, a load failed, a model was lost, a worker ended."""

    kind: Annotated[str, one_of(*MarkKind)]
    at: str
    position: int
    version: int | None = None
    job_id: str | None = None
    by: str | None = None
    code: Annotated[str | None, about("Of the failure, or how a worker ended.")] = None


class CopyLane(AnswerBody, frozen=True, gc=False):
    """One model at one node over the range."""

    node_id: str
    segments: Annotated[
        tuple[Segment, ...], about("In order, without overlap; `unloaded` without a copy there.")
    ]


class Lane(AnswerBody, frozen=True, gc=False):
    """One model over the range."""

    model_id: str
    segments: Annotated[tuple[Segment, ...], about("In order, without overlap.")]
    marks: tuple[Mark, ...]
    copies: Annotated[
        tuple[CopyLane, ...], about("The nodes where it served, by name; missing if it had no copies.")
    ] = ()


class ServerSegment(AnswerBody, frozen=True, omit_defaults=False, rename=_RENAMED, gc=False):
    """A time in which the server ran, was stopped, or may have been either."""

    state: Annotated[str, one_of("running", "stopped", "unknown")]
    begin: str
    end: str
    position: Annotated[
        int | None, about("Of the event that began it; of an unknown end, of the event that found it.")
    ] = None


class NodeSegment(ServerSegment, frozen=True):
    """A time in which a node was there, had left or was lost, or may have been there."""

    state: Annotated[str, one_of("joined", "draining", "left", "lost", "unknown")]


class NodeLane(AnswerBody, frozen=True, gc=False):
    """One node over the range."""

    node_id: str
    segments: Annotated[tuple[NodeSegment, ...], about("In order, from where it first joined.")]


class Timeline(AnswerBody, frozen=True, kw_only=True, rename=_RENAMED):
    """A page of lanes."""

    begin: str
    end: str
    as_of: Annotated[int, AS_OF]
    known_from: Annotated[str | None, about("When the first event was recorded; nothing before it is shown.")]
    rows: Annotated[int, about("What the history has of these models, the server and nodes in the range.")]
    max_rows: Annotated[
        int, about("With more rows than these, `lanes` and `server` are empty: ask for a shorter range.")
    ]
    lanes: Annotated[
        list[Lane],
        about("Of models that changed in the range, or were loaded or to be loaded where it begins; by id."),
    ]
    server: Annotated[
        tuple[ServerSegment, ...],
        about("Whether a server ran; with nodes, one runs while any node is there."),
    ]
    nodes: Annotated[
        tuple[NodeLane, ...], about("The nodes that were there in the range, by name; missing without any.")
    ] = ()
    next_cursor: Annotated[str | None, about("`cursor` of the next page; null on the last page.")]

    def with_lanes(
        self,
        lanes: list[Lane],
        server: tuple[ServerSegment, ...],
        servers: Mapping[str, tuple[ServerSegment, ...]],
    ) -> Timeline:
        """Return the page with lanes; `servers` has those of each of several servers, by name."""
        nodes = [
            NodeLane(name, tuple([NodeSegment(*astuple(each)) for each in lane]))
            for name, lane in servers.items()
        ]
        return replace(self, lanes=lanes, server=server, nodes=tuple(nodes))
