"""Lines of a file of records: JSON, one object each, as pandas, DuckDB and others read them. Pure.

`id`, `source`, `type` and `time` have the names and meanings of CloudEvents 1.0. A line of the type `DROPPED`
says what is missing at its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from events.clock import Timestamp
from runtime.router import Answered
from runtime.statistics import InferenceTimes
from runtime.wire import Buffer, Tensor
from server.v2.observer import ObservedInference

INFERENCE, DROPPED = "loadledger.inference", "loadledger.dropped"
"""The types of lines."""

MAX_LINE_BYTES = 16 * 10**6
"""DuckDB and others read no longer objects (`maximum_object_size`) unless they are told to."""
MAX_DATA_BYTES = 8 * 10**6
"""Of all tensors of a line: in base64 a third longer, so that the line is below its limit."""

Reason = Literal["queue_full", "not_writable", "too_long", "interrupted"]
"""Why inferences are missing: `interrupted` if the server died, when nobody knows how many."""


class TensorRecord(msgspec.Struct, frozen=True, gc=False):
    """A tensor as it was sent: `sha256` and `bytes` are of its data, in this form.

    Attributes:
        form: `binary`, little-endian and in row-major order, or `json`, the text of its list.
        data: the same bytes, in base64; missing if only digests are recorded, or if it is too long.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    form: str
    bytes: int
    sha256: str
    data: Buffer | UnsetType = UNSET


class InferenceRecord(msgspec.Struct, frozen=True, gc=False, kw_only=True, tag_field="type", tag=INFERENCE):
    """The line of an inference.

    Attributes:
        id: the request's, as `X-Request-Id` of the request or of its answer has it.
        source: the node that answered; empty if the server is alone.
        time: when the answer was written, or the request failed.
        model: as it was requested.
        version: the one that answered; null if no load was asked.
        position: of the load's `ModelLoaded` in the ledger; null likewise.
        subject: of the token.
        request: `id` of the request's body; null without one.
        status: of HTTP; null if the client left before there was an answer.
        code: of the error; null if it was answered.
        share: the probability with which this one was recorded.
        total_us: from the first byte of the request, in microseconds.
        waited_us: of that, the wait for the model to be loaded.
        queue_us, compute_us: of that, in the worker; null without an answer.
    """

    id: str
    source: str
    time: Timestamp
    model: str
    version: int | None
    position: int | None
    subject: str
    request: str | None
    status: int | None
    code: str | None
    share: float
    total_us: int
    waited_us: int
    queue_us: int | None
    compute_us: int | None
    inputs: list[TensorRecord]
    outputs: list[TensorRecord]


class DroppedRecords(msgspec.Struct, frozen=True, gc=False, kw_only=True, tag_field="type", tag=DROPPED):
    """The line where inferences are missing: `dropped` of them, null if nobody knows how many."""

    id: str
    source: str
    time: Timestamp
    model: str
    dropped: int | None
    reason: Reason


class EndedInference(msgspec.Struct, frozen=True, gc=False):
    """An inference that is to be recorded, with its tensors; `answered` is None of a failed one."""

    observed: ObservedInference
    answered: Answered | None
    request_id: str
    source: str
    time: Timestamp
    ended_ns: int
    share: float
    status: int | None
    code: str | None

    @property
    def tensors(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        question = self.observed.question
        return (
            () if question is None else question.tensors,
            () if self.answered is None else self.answered.outputs,
        )

    @property
    def data_bytes(self) -> int:
        inputs, outputs = self.tensors
        return sum([len(each.data) for each in inputs]) + sum([len(each.data) for each in outputs])


_ENCODER = msgspec.json.Encoder()


def encode_inference(ended: EndedInference, *, with_data: bool) -> bytes | None:
    """Return the line of an inference, or None if it is too long even without data."""
    keeps_data = with_data and ended.data_bytes <= MAX_DATA_BYTES
    line = _ENCODER.encode(_describe(ended, keeps_data=keeps_data)) + b"\n"
    return line if len(line) <= MAX_LINE_BYTES else None


def encode_dropped(lost: DroppedRecords) -> bytes:
    return _ENCODER.encode(lost) + b"\n"


def _describe(ended: EndedInference, *, keeps_data: bool) -> InferenceRecord:
    observed, answered = ended.observed, ended.answered
    here = observed.here if answered is None else answered.here
    total_us, waited_us, queue_us, compute_us = _divide(observed.times, answered, ended.ended_ns)
    inputs, outputs = ended.tensors
    return InferenceRecord(
        id=ended.request_id,
        source=ended.source,
        time=ended.time,
        model=observed.model_id,
        version=None if here is None else here.version,
        position=None if here is None else here.position,
        subject=observed.subject,
        request=None if observed.question is None else observed.question.id,
        status=ended.status,
        code=ended.code,
        share=ended.share,
        total_us=total_us,
        waited_us=waited_us,
        queue_us=queue_us,
        compute_us=compute_us,
        inputs=[_describe_tensor(each, keeps_data=keeps_data) for each in inputs],
        outputs=[_describe_tensor(each, keeps_data=keeps_data) for each in outputs],
    )


def _describe_tensor(tensor: Tensor, *, keeps_data: bool) -> TensorRecord:
    return TensorRecord(
        tensor.name,
        tensor.datatype,
        tensor.shape,
        "json" if tensor.text else "binary",
        len(tensor.data),
        hashlib.sha256(tensor.data).hexdigest(),
        tensor.data if keeps_data else UNSET,
    )


def _divide(
    times: InferenceTimes, answered: Answered | None, ended_ns: int
) -> tuple[int, int, int | None, int | None]:
    """Return the microseconds in all, of waiting, queue and compute; a worker may report too many."""
    total_ns = ended_ns - times.arrived_ns
    if answered is None:
        return total_ns // 1000, times.waited_ns // 1000, None, None
    outcome, most_ns = answered.outcome, times.answered_ns - times.asked_ns
    queue_ns = min(outcome.queue_ns, most_ns)
    compute_ns = min(outcome.input_ns + outcome.infer_ns + outcome.output_ns, most_ns - queue_ns)
    return total_ns // 1000, times.waited_ns // 1000, queue_ns // 1000, compute_ns // 1000
