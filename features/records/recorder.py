"""The recorder: takes ended inferences on the event loop, and queues what a thread writes.

Nothing waits for it. The lines of short tensors are made at once, in some microseconds; long tensors are kept
until the thread has hashed them. What finds no room in the queue is dropped and counted, and the next line of
its model says how many.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec
from aiohttp import web

from events.clock import format_timestamp, utc_now
from features.records.lines import EndedInference, Reason, encode_inference
from features.records.rules import Failures, RecordRule, What, find_rule, is_chosen
from runtime.router import Answered
from runtime.statistics import InferenceTimes
from server.errors import ERRORS
from server.observability.output import begin_context
from server.v2.observer import InferenceObserver, ObservedInference

LONG_BYTES = 64 * 2**10
"""Tensors of an inference that are hashed in the thread: these take 0.05 to 0.2 ms."""
LONG_COUNT = 64
"""As many tensors, too, however short they are."""
QUEUE_BYTES = 64 * 2**20
"""Lines and long tensors that may wait: a hundred of 600 KB, and of lines some ten thousand."""
ENTRY_BYTES = 1024
"""Counted for an entry beside its tensors or its line."""
FLUSH_S = 0.5
"""The longest time before a line is given to the thread, and so what a death of the server loses."""
HURRY_BYTES = 2**20
"""As much is given at once; so is each inference with long tensors, whose memory is needed."""
MAX_KNOWN = 10_000
"""Models whose rule is remembered: names that clients invent are no models."""
OK = 200
ABORTED = "aborted"
"""The code of an inference whose client left before its answer, or that the server's end cut off."""


class _Observed(ObservedInference, gc=False):
    request_id: str = ""
    rule: RecordRule = RecordRule(models=())
    is_chosen: bool = False


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A line of a model for the thread, or an inference of which the thread makes one."""

    model_id: str
    rule: RecordRule
    content: bytes | EndedInference
    size: int

    def encode(self) -> bytes | None:
        """Return the line; None if it is too long."""
        if isinstance(self.content, bytes):
            return self.content
        return encode_inference(self.content, with_data=self.rule.what is What.TENSORS)


class Recorder(InferenceObserver):
    """Chooses inferences by the rules, and queues their lines.

    Args:
        rules: of the configuration.
        source: the name of this server among several, or empty.
        wake: called when the queue is not to wait for its time; it takes what is queued with `take`.

    Attributes:
        queued_bytes: of the queue, and of what was taken and is not given back yet.
        dropped: inferences that the queue did not take, by reason.
    """

    def __init__(self, rules: Sequence[RecordRule], source: str, wake: Callable[[], None]) -> None:
        self._rules = rules
        self._source = source
        self._wake = wake
        self._known = dict[str, RecordRule | None]()
        self._queue = list[Entry]()
        self._missing = Counter[tuple[str, Reason]]()
        self._timer: asyncio.TimerHandle | None = None
        self.queued_bytes = 0
        self.dropped = Counter[Reason]()

    def find_rule(self, model_id: str) -> RecordRule | None:
        if model_id not in self._known:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[model_id] = find_rule(self._rules, model_id)
        return self._known[model_id]

    def begin(
        self, request: web.BaseRequest, model_id: str, subject: str, times: InferenceTimes
    ) -> ObservedInference | None:
        rule = self.find_rule(model_id)
        if rule is None:
            return None
        request_id = begin_context(request).request_id
        chosen = rule.share >= 1 or is_chosen(request_id, rule.share)
        if not chosen and rule.failures is Failures.SHARE:
            return None
        return _Observed(model_id, subject, times, None, None, request_id, rule, chosen)

    def end(self, observed: ObservedInference, result: Answered | BaseException) -> None:
        assert isinstance(observed, _Observed)
        rule, answered = observed.rule, result if isinstance(result, Answered) else None
        if answered is not None and not observed.is_chosen:
            return
        status, code = (OK, None) if isinstance(result, Answered) else _describe_failure(result)
        if code == "unknown_model":
            return  # no inference of a model: the name is the client's invention
        share = 1.0 if answered is None and rule.failures is Failures.ALL else rule.share
        ended_ns, now = time.monotonic_ns(), format_timestamp(utc_now())
        ended = EndedInference(
            observed, answered, observed.request_id, self._source, now, ended_ns, share, status, code
        )
        inputs, outputs = ended.tensors
        if (data_bytes := ended.data_bytes) > LONG_BYTES or len(inputs) + len(outputs) > LONG_COUNT:
            self._put(observed.model_id, rule, ended, data_bytes, is_urgent=True)
        else:
            line = encode_inference(ended, with_data=rule.what is What.TENSORS)
            if line is None:
                self.count_dropped(observed.model_id, "too_long")
            else:
                self._put(observed.model_id, rule, line, len(line))

    def _put(
        self,
        model_id: str,
        rule: RecordRule,
        content: bytes | EndedInference,
        size: int,
        *,
        is_urgent: bool = False,
    ) -> None:
        size += ENTRY_BYTES
        if self.queued_bytes + size > QUEUE_BYTES:
            self.count_dropped(model_id, "queue_full")
            return
        self.queued_bytes += size
        self._queue.append(Entry(model_id, rule, content, size))
        if is_urgent or self.queued_bytes >= HURRY_BYTES:
            self._wake()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self._wake)

    def count_dropped(self, model_id: str, reason: Reason, count: int = 1) -> None:
        """Count inferences that are not recorded, for a line of their model."""
        self.dropped[reason] += count
        self._missing[model_id, reason] += count

    def take(self) -> tuple[Sequence[Entry], Counter[tuple[str, Reason]]]:
        """Return the queue, and how many inferences are missing by model and reason, which the queue forgets.

        The memory of the queue counts until `give_back`.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        queue, self._queue = self._queue, []
        missing, self._missing = self._missing, Counter()
        return queue, missing

    def give_back(self, queue: Sequence[Entry]) -> None:
        """Count entries no more that the thread has done with."""
        self.queued_bytes -= sum([each.size for each in queue])


def _describe_failure(error: BaseException) -> tuple[int | None, str]:
    """Return status and code of a failed inference; no status if there was no answer."""
    if not isinstance(error, Exception) or isinstance(error, ConnectionResetError):
        return None, ABORTED
    code = getattr(error, "code", None)
    if isinstance(error, web.RequestPayloadError):
        code = "invalid_request"
    elif not isinstance(code, str) or code not in ERRORS:
        code = "internal"
    return ERRORS[code].status, code
