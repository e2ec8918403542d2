"""Lines of a file of records: JSON, one object each, as pandas, DuckDB and others read them. Pure.

`id`, `source`, `type` and `time` have the names and meanings of CloudEvents 1.0. A line of the type `DROPPED`
says what is missing at its place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from events.clock import Timestamp, format_timestamp
from features.records.rules import Failures, RecordRule, What
from runtime.router import Answered
from runtime.statistics import InferenceTimes
from runtime.wire import Buffer, Tensor
from server.v2.observer import ObservedInference

_log = logging.getLogger(__name__)

INFERENCE, DROPPED = "loadledger.inference", "loadledger.dropped"
"""The types of lines."""

MAX_LINE_BYTES = 16 * 10**6
"""DuckDB and others read no longer objects (`maximum_object_size`) unless they are told to."""
MAX_DATA_BYTES = 8 * 10**6
"""Of all tensors of a line: in base64 a third longer, so that the line is below its limit."""

TENSOR_BYTES = 256
"""Counted for a tensor beside its data and its name: its shape and digest in a line."""

Reason = Literal["queue_full", "not_writable", "too_long", "failed", "interrupted"]
"""Why inferences are missing: `failed` for a defect, `interrupted` if the server died, when nobody knows how
many."""


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


class Candidate(ObservedInference, gc=False, kw_only=True):
    """An inference that is recorded, unless its end says otherwise; its end fills in what follows the rule.

    Attributes:
        take: is given the inference with its result.
        rule: which the model has.
        is_chosen: whether its share has it; else it is recorded if it fails.
        answered: None of a failed one.
        ended_ns: the clock of `times` then.
        at_ns: in nanoseconds since 1970.
        status, code: as the record has them.
    """

    take: Callable[[Candidate, Answered | BaseException], None]
    rule: RecordRule
    is_chosen: bool
    answered: Answered | None = None
    ended_ns: int = 0
    at_ns: int = 0
    status: int | None = None
    code: str | None = None

    def end(self, result: Answered | BaseException) -> None:
        try:
            self.take(self, result)
        except Exception:  # noqa: BLE001 - the inference goes on
            _log.exception("an inference of %s could not be recorded", self.model_id)

    @property
    def tensors(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Inputs and outputs, as far as there are any."""
        question, answered = self.question, self.answered
        return () if question is None else question.tensors, () if answered is None else answered.outputs

    def count_bytes(self) -> int:
        """Return the bytes of all tensors and of their names, and `TENSOR_BYTES` for each."""
        size = 0
        for tensors in self.tensors:
            for each in tensors:
                size += len(each.data) + len(each.name) + TENSOR_BYTES
        return size


_ENCODER = msgspec.json.Encoder()


def encode_inference(ended: Candidate, source: str) -> bytes | None:
    """Return the line of an inference, or None if it is too long even without data."""
    inputs, outputs = ended.tensors
    has_data = ended.rule.what is What.TENSORS and ended.count_bytes() <= MAX_DATA_BYTES
    answered, rule = ended.answered, ended.rule
    here = ended.here if answered is None else answered.here
    total_us, waited_us, queue_us, compute_us = _divide(ended.times, answered, ended.ended_ns)
    record = InferenceRecord(
        id=ended.request_id,
        source=source,
        time=f"{_format_second(ended.at_ns // 10**9)}.{ended.at_ns // 1000 % 10**6:06d}Z",
        model=ended.model_id,
        version=None if here is None else here.version,
        position=None if here is None else here.position,
        subject=ended.subject,
        request=None if ended.question is None else ended.question.id,
        status=ended.status,
        code=ended.code,
        share=1.0 if answered is None and rule.failures is Failures.ALL else rule.share,
        total_us=total_us,
        waited_us=waited_us,
        queue_us=queue_us,
        compute_us=compute_us,
        inputs=_describe_tensors(inputs, has_data=has_data),
        outputs=_describe_tensors(outputs, has_data=has_data),
    )
    line = _ENCODER.encode(record) + b"\n"
    return line if len(line) <= MAX_LINE_BYTES else None


def encode_or_drop(ended: Candidate, source: str) -> bytes | Reason:
    """Return the line of an inference, or why there is none: no defect of one ends the lines of others."""
    try:
        return encode_inference(ended, source) or "too_long"
    except Exception:  # noqa: BLE001 - it is logged, counted, and in the file
        _log.exception("an inference of %s could not be recorded", ended.model_id)
        return "failed"


@lru_cache(maxsize=4)
def _format_second(since_1970: int) -> str:
    return format_timestamp(datetime.fromtimestamp(since_1970, UTC)).partition(".")[0]


def encode_dropped(lost: DroppedRecords) -> bytes:
    return _ENCODER.encode(lost) + b"\n"


def _describe_tensors(tensors: Sequence[Tensor], *, has_data: bool) -> list[TensorRecord]:
    return [
        TensorRecord(
            each.name,
            each.datatype,
            each.shape,
            "json" if each.text else "binary",
            len(each.data),
            sha256(each.data).hexdigest(),
            each.data if has_data else UNSET,
        )
        for each in tensors
    ]


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
