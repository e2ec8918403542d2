"""Rules of a worker's messages: the order of its reports, and the answers to requests.

A model that takes over its worker speaks in its place. So a worker says nothing that the server has not asked
for: reports of one order, each stage at most once and in order, then answers to requests in flight, with
outputs that the request asked for. Anything else is a `MalformedFrame`, which ends the worker.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, get_args

from runtime.errors import LoadRefused, OptimiseCode
from runtime.frames import FrameRules
from runtime.wire import (
    FROM_LOADING,
    FROM_SERVING,
    MAX_FAILURE_BYTES,
    MAX_HEAD_BYTES,
    MAX_REPORT_BYTES,
    FromWorker,
    Infer,
    JsonRead,
    Load,
    Loaded,
    LoadFailure,
    LoadStage,
    MalformedFrame,
    Optimise,
    Optimised,
    Ping,
    Pong,
    Probe,
    Probed,
    ReadJson,
    StageReached,
    Tensor,
    plain_text,
)

SILENCE: FrameRules[FromWorker] = FrameRules(FROM_SERVING, header_bytes=0, payload_bytes=0)
"""Without an order that is pending or a request in flight."""
REPORTS: FrameRules[FromWorker] = FrameRules(FROM_LOADING, MAX_REPORT_BYTES, payload_bytes=0)
"""While an order is pending."""
SHA256_BYTES = 32


class PendingOrder:
    """A load, optimisation, probe, ping or reading whose report is pending, and the future of its caller."""

    def __init__(
        self,
        order: Load | Optimise | Probe | Ping | ReadJson,
        answer: asyncio.Future[Any],
        on_stage: Callable[[str], None],
    ) -> None:
        self._order = order
        self._answer = answer
        self._on_stage = on_stage
        self._stages_left = iter(get_args(LoadStage) if isinstance(order, Load) else ())

    def take(self, report: FromWorker) -> bool:
        """Take a report of the worker; returns whether it was the last one.

        Raises:
            MalformedFrame: a stage out of order or twice, or a report that is not the order's.
        """
        match self._order, report:
            case _, StageReached(stage):
                if stage not in self._stages_left:  # an iterator, which does not go back
                    raise MalformedFrame(f"stage '{stage}' twice, or out of order")
                self._on_stage(stage)
                return False
            case (
                (Load(), Loaded())
                | (Optimise(), Optimised())
                | (Probe(), Probed())
                | (Ping(), Pong())
                | (ReadJson(), JsonRead())
            ):
                self.settle(report)
            case Load(), LoadFailure(code) if code in get_args(OptimiseCode):
                raise MalformedFrame(f"'{code}' of a load")
            case Load() | Optimise(), LoadFailure(code, message):
                self.settle(LoadRefused(code, plain_text(message)))
            case _:
                kinds = type(report).__name__, type(self._order).__name__
                raise MalformedFrame("{} in answer to {}".format(*kinds))
        return True

    def settle(self, result: object) -> None:
        """Set the caller's result or exception; the caller may have gone, or have its result."""
        if self._answer.done():
            return
        if isinstance(result, Exception):
            self._answer.set_exception(result)
        else:
            self._answer.set_result(result)


class AnswerRules:
    """Rules of the answers to requests of a loaded model.

    Args:
        loaded: the worker's own report.

    Attributes:
        frames: while requests are in flight.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._datatypes = {spec.name: spec.datatype for spec in loaded.outputs}
        names_bytes = sum(len(name.encode()) for name in self._datatypes)
        header_bytes = MAX_FAILURE_BYTES + names_bytes + MAX_HEAD_BYTES * len(self._datatypes)
        self.frames: FrameRules[FromWorker] = FrameRules(FROM_SERVING, header_bytes)

    def check(self, request: Infer, tensors: Sequence[Tensor]) -> None:
        """Check the outputs of an answer.

        Raises:
            MalformedFrame: an output twice, one that was not asked for, or not in the form that was.
        """
        wanted = {output.name: output.text for output in request.outputs} if request.outputs else None
        for tensor in tensors:
            name, datatype = tensor.name, self._datatypes.get(tensor.name)
            if datatype is None or (wanted is not None and name not in wanted):
                raise MalformedFrame(f"output {name[:64]!r}, which was not asked for")
            if request.digest:
                is_right = _is_digest(tensor)
            else:
                is_text = request.text if wanted is None else wanted[name]
                is_right = tensor.datatype == datatype and tensor.text == is_text
            if not is_right:
                raise MalformedFrame(f"output {name[:64]!r} in another form than was asked for")
        if len(tensors) > 1 and len({tensor.name for tensor in tensors}) < len(tensors):
            raise MalformedFrame("an output twice")


def _is_digest(tensor: Tensor) -> bool:
    return tensor.datatype == "UINT8" and tensor.shape == (SHA256_BYTES,) and not tensor.text
