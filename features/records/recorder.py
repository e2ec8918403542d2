"""The recorder: takes ended inferences on the event loop, and queues what a thread writes.

Nothing waits for it. The lines of short tensors are made here, many at once; long tensors are kept until the
thread has hashed them. What finds no room is dropped and counted, and the next line of its model says that.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Sequence
from typing import NamedTuple

from features.records.lines import Candidate, Reason, encode_or_drop
from features.records.rules import Failures, RecordRule, find_rule, is_chosen
from runtime.memoryplan import OBSERVED_BYTES
from runtime.router import Answered
from runtime.statistics import InferenceTimes
from server.errors import ERRORS, code_of

LONG_BYTES = 64 * 2**10
"""Tensors of an inference that are hashed in the thread: these take 0.05 to 0.2 ms."""
BATCH = 64
"""Lines that are made at once, in half a millisecond: each takes a third of what a single one takes."""
ENTRY_BYTES = 1024
"""Counted for an inference beside its tensors: its line, or what that is made of."""
FLUSH_S = 0.5
"""The longest time before a line is given to the thread, and so what a death of the server loses."""
HURRY_BYTES = 2**20
"""As much is given at once; so is each inference with long tensors, whose memory is needed."""
MAX_KNOWN = 10_000
"""Models whose rule is remembered: names that clients invent are no models."""
OK = 200
ABORTED = "aborted"
"""The code of an inference whose client left before its answer, or that the server's end cut off."""


class Entry(NamedTuple):
    """Lines of a model for the thread, or an inference with long tensors of which it makes one.

    Attributes:
        model_id: the model.
        content: whole lines, or the inference.
        records: how many inferences these are.
        size: the bytes that count for the queue.
    """

    model_id: str
    content: bytes | Candidate
    records: int
    size: int


class InferenceRecorder:
    """Chooses inferences by the rules, and queues their lines.

    Args:
        rules: of the configuration.
        source: the name of this server among several, or empty.
        wake: called when the queue is not to wait for its time; it takes what is queued with `take`.
        find_models: returns the models that the ledger knows.

    Attributes:
        queued_bytes: of the queue, and of what was taken and is not given back yet: at most `OBSERVED_BYTES`,
            or one inference.
        dropped: inferences that the queue did not take, by reason.
    """

    def __init__(
        self,
        rules: Sequence[RecordRule],
        source: str,
        wake: Callable[[], None],
        find_models: Callable[[], Container[str]],
    ) -> None:
        self._rules = rules
        self._source = source
        self._wake = wake
        self._find_models = find_models
        self._known = dict[str, RecordRule | None]()
        self._short = list[Candidate]()
        self._short_bytes = 0
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
        self, rule: RecordRule, request_id: str, model_id: str, subject: str, times: InferenceTimes
    ) -> Candidate | None:
        """Return an inference to be filled in, or None if it is not recorded however it ends."""
        chosen = rule.share >= 1 or is_chosen(request_id, rule.share)
        if not chosen and rule.failures is Failures.SHARE:
            return None
        return Candidate(
            request_id, model_id, subject, times, take=self.take_ended, rule=rule, is_chosen=chosen
        )

    def take_ended(self, ended: Candidate, result: Answered | BaseException) -> None:
        """Queue an inference that has ended, unless it was not chosen, and has not failed."""
        if isinstance(result, Answered):
            if not ended.is_chosen:
                return
            ended.answered, ended.status = result, OK
        else:
            ended.status, ended.code = _describe_failure(result)
            if ended.here is None and ended.model_id not in self._find_models():
                return  # the ledger knows no such model: the client may have invented the name
            if ended.was_sent and ended.code != "node_unreachable":
                return  # the server that was to answer it records it
        ended.ended_ns, ended.at_ns = time.monotonic_ns(), time.time_ns()
        data_bytes = ended.count_bytes()
        size = data_bytes + ENTRY_BYTES
        if self.queued_bytes and self.queued_bytes + size > OBSERVED_BYTES:
            self._drop(ended.model_id, "queue_full")
            return
        self.queued_bytes += size
        if data_bytes > LONG_BYTES:
            self._queue.append(Entry(ended.model_id, ended, 1, size))
            self._wake()
            return
        self._short.append(ended)
        self._short_bytes += size
        if len(self._short) >= BATCH:
            self._encode_short()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self._wake)

    def _encode_short(self) -> None:
        """Make the lines of inferences with short tensors, whose memory then counts no more."""
        lines = defaultdict[str, list[bytes]](list)
        short, self._short = self._short, []
        self.queued_bytes -= self._short_bytes
        self._short_bytes = 0
        for each in short:
            line = encode_or_drop(each, self._source)
            if isinstance(line, str):
                self._drop(each.model_id, line)
            else:
                lines[each.model_id].append(line)
        for model_id, of_model in lines.items():
            text = b"".join(of_model)
            self._queue.append(Entry(model_id, text, len(of_model), len(text)))
            self.queued_bytes += len(text)
        if sum([each.size for each in self._queue]) >= HURRY_BYTES:
            self._wake()

    def _drop(self, model_id: str, reason: Reason, records: int = 1) -> None:
        """Count inferences that are not recorded, for a line of their model."""
        self.dropped[reason] += records
        self._missing[model_id, reason] += records

    def drop_queue(self, queue: Sequence[Entry]) -> None:
        """Count entries that a defect has kept the thread from writing."""
        for each in queue:
            self._drop(each.model_id, "failed", each.records)

    def take(self) -> tuple[Sequence[Entry], Counter[tuple[str, Reason]]]:
        """Return the queue, and how many inferences are missing by model and reason; both are empty then.

        The memory of the queue counts until `give_back`.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._encode_short()
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
    code = code_of(error)
    return ERRORS[code].status, code
