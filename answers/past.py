"""The state of server and nodes at a moment of the past, in answers with `?at=`."""

from __future__ import annotations

from typing import Annotated

from answers.answer import AnswerBody, about, one_of


class ServerPresence(AnswerBody, frozen=True, kw_only=True):
    """The state of the server at a moment of the past."""

    state: Annotated[
        str,
        about("`unknown`: after it was last seen, and before its unclean end was discovered."),
        one_of("running", "stopped", "unknown"),
    ]
    since: Annotated[str | None, about("Null if the log does not say.")]


class NodePresence(AnswerBody, frozen=True, kw_only=True):
    """The state of a node at a moment of the past."""

    id: str
    state: Annotated[
        str,
        about("`unknown`: after it renewed its lease last, and before it was declared lost."),
        one_of("joined", "draining", "left", "lost", "unknown"),
    ]
    since: Annotated[str | None, about("Null if the log does not say.")]


class PastAnswer(AnswerBody, frozen=True, kw_only=True):
    """Members about the moment, in an answer about the past."""

    as_of: Annotated[int | None, about("With `at`: the position that the answer reflects.")] = None
    as_of_time: Annotated[
        str | None,
        about("With `at`: when the event at `as_of` was recorded; missing if the log does not have it."),
    ] = None
    server: Annotated[
        ServerPresence | None,
        about(
            "With `at`: the state of the server then. While it is not `running`, nothing is "
            "loaded. With nodes, it runs while any is there."
        ),
    ] = None
    nodes: Annotated[
        list[NodePresence],
        about("With `at`: the nodes that had joined by then, by name; missing if there were none."),
    ] = []
