"""The observer of inferences, if the application has one: it learns of each once it has ended."""

from __future__ import annotations

from abc import ABC, abstractmethod

import msgspec
from aiohttp import web

from runtime.router import Answered, Here, InferenceRequest
from runtime.statistics import InferenceTimes


class ObservedInference(msgspec.Struct, gc=False):
    """An inference, as far as it has come.

    Attributes:
        model_id: the requested model, which need not exist.
        subject: of the token.
        times: those until now.
        here: the load that was asked; None if none was.
        question: the decoded request; None if it could not be decoded, or was not.
    """

    model_id: str
    subject: str
    times: InferenceTimes
    here: Here | None = None
    question: InferenceRequest | None = None


class InferenceObserver(ABC):
    """Chooses the inferences that it wants to know of; both methods are called on the event loop."""

    @abstractmethod
    def begin(
        self, request: web.BaseRequest, model_id: str, subject: str, times: InferenceTimes
    ) -> ObservedInference | None:
        """Return what is to be filled in, or None if the inference is of no interest."""

    @abstractmethod
    def end(self, observed: ObservedInference, result: Answered | BaseException) -> None:
        """Take an inference whose answer was written, or why there is none.

        One that another server answers has no end here, unless that server cannot be reached.
        """


OBSERVER: web.AppKey[InferenceObserver] = web.AppKey("inference_observer", InferenceObserver)
"""Missing where nothing observes."""
