"""The observer of inferences, if the application has one: it learns of each once it has ended."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from aiohttp import web

from runtime.router import Answered, Here, InferenceRequest
from runtime.statistics import InferenceTimes


class ObservedInference(msgspec.Struct, gc=False):
    """An inference, as far as it has come.

    Attributes:
        request_id: the request's, which the answer has.
        model_id: the requested model, which need not exist.
        subject: of the token.
        times: those until now.
        here: the load that was asked; None if none was.
        question: the decoded request; None if it could not be decoded, or was not.
        was_sent: whether it was sent to another server, which then observes its end.
    """

    request_id: str
    model_id: str
    subject: str
    times: InferenceTimes
    here: Here | None = None
    question: InferenceRequest | None = None
    was_sent: bool = False

    def end(self, result: Answered | BaseException) -> None:
        """Take the answer, once it is written, or why there is none.

        An inference that another server answers has no end here, but it may have an error.
        """
        raise NotImplementedError


Observe = Callable[[web.BaseRequest, str, str, InferenceTimes], ObservedInference | None]
"""Returns what is to be filled in of an inference of a model by a subject; None if it is of no interest."""

OBSERVE: web.AppKey[Observe] = web.AppKey("observe_inference")
"""Missing where nothing observes."""
