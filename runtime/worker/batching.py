"""Dynamic batching: the queue of requests, what may run together, joined inputs and split outputs.

Requests go together that have the same inputs, of equal shapes but for the first dimension, and want the same
outputs. The oldest request of the highest priority is always in the next batch. Without priorities the server
relies on that when it looks for the inference that a worker is stuck in; with them it is told what runs.
"""

from bisect import insort
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np

from runtime.errors import InvalidInput
from runtime.worker.inference import SelectedOutputs
from runtime.worker.sharedtensors import AnswerRegion

MAX_WAITING_BYTES = 64 * 2**20
MAX_WAITING = 1024
"""Beyond either limit the worker reads no more until a batch has run. The rest waits at the server, which
has a limit, too."""


class BatchRequest(msgspec.Struct, frozen=True, eq=False):
    """A decoded inference.

    Attributes:
        number: its id.
        outputs: the outputs it asks for.
        feed: the inputs by name.
        size: elements along the batch dimension; 1 for a model without one.
        alone: whether it must run alone.
        sent_ns: when the server sent it, or 0.
        came_ns: when the worker received it.
        input_ns: the duration of its decoding.
        queue_ns: its wait to be received while the worker was busy with other requests.
        answer_region: the part of shared memory for its outputs.
        deadline_ns: the end of its time limit, or 0.
        level: its priority; a lower one runs first.
    """

    number: int
    outputs: SelectedOutputs
    feed: dict[str, Any]
    size: int
    alone: bool
    sent_ns: int
    came_ns: int
    input_ns: int
    queue_ns: int = 0
    answer_region: AnswerRegion | None = None
    deadline_ns: int = 0
    level: int = 0

    def batch_key(self) -> Hashable:
        if self.alone:
            return self.number
        return self.outputs, tuple(
            [(name, array.shape[1:], array.dtype) for name, array in self.feed.items()]
        )

    def waiting_since_ns(self) -> int:
        """Return when its wait began: when the server sent it or, if unknown, when the worker received it."""
        return min(self.sent_ns, self.came_ns) or self.came_ns

    def bytes(self) -> int:
        return sum([array.nbytes for array in self.feed.values()])


class BatchDimension:
    """The batch dimension of a model.

    Args:
        limit: elements that may run at once, at least 1.
        inputs: names of the inputs that have the dimension; others have one value for a whole run.
    """

    def __init__(self, limit: int, inputs: Sequence[str]) -> None:
        self._limit = limit
        self._inputs = frozenset(inputs)

    def measure(self, feed: dict[str, Any]) -> tuple[int, bool]:
        """Return a request's size, and whether it must run alone.

        Raises:
            InvalidInput: `invalid_input`, the request exceeds the limit, or its inputs differ in size.
        """
        batched = (array for name, array in feed.items() if name in self._inputs)
        sizes = {array.shape[0] if array.ndim else None for array in batched}
        size = next(iter(sizes), 1)
        if len(sizes) > 1 or size is None:
            raise InvalidInput("all inputs must have the same first dimension, which is the batch size")
        if size > self._limit:
            raise InvalidInput(f"the batch size is {size}, and of this model at most {self._limit}")
        return size, size == 0 or not feed.keys() <= self._inputs


class Queue:
    """Waiting requests, grouped by what may run together.

    A batch has at most `limit` elements, but for a longer request, which runs alone. A request waits for
    others for `delay_ns`, unless its batch is full. With priorities, all requests are read before the next
    batch is chosen.
    """

    def __init__(self, limit: int, delay_ns: int, *, has_priorities: bool = False) -> None:
        self.has_priorities = has_priorities
        self._limit = limit
        self._delay_ns = delay_ns
        self._groups: dict[Hashable, _Group] = {}
        self._count = 0
        self._bytes = 0

    def __len__(self) -> int:
        return self._count

    def add(self, request: BatchRequest) -> None:
        kind = request.batch_key()
        group = self._groups.get(kind)
        if group is None:
            group = self._groups[kind] = _Group(kind)
        if group.requests and group.requests[-1].level > request.level:
            insort(group.requests, request, key=_get_level)
        else:
            group.requests.append(request)
        group.size += request.size
        self._count += 1
        self._bytes += request.bytes()

    def wait_ns(self, now_ns: int) -> int | None:
        """Return how long to wait for more before the next batch; 0 only polls, None does not even poll."""
        if self._count >= MAX_WAITING or self._bytes >= MAX_WAITING_BYTES:
            return None
        if any(group.size >= self._limit or group.requests[0].alone for group in self._groups.values()):
            return 0 if self.has_priorities else None
        return max(0, self._next().requests[0].waiting_since_ns() + self._delay_ns - now_ns)

    def drop(self, is_over: Callable[[BatchRequest, int], bool]) -> bool:
        """Remove the requests of the next batch that are over; returns whether there were any.

        Other requests, which may not have been read yet, take their places in the batch.

        Args:
            is_over: says whether a request is not to be run in a batch of this size.
        """
        group, size = self._next(), 0
        waiting_size, over = group.size, list[BatchRequest]()
        for request in group.requests:
            if size and size + request.size > self._limit:
                break
            if is_over(request, max(request.size, min(self._limit, size + waiting_size))):
                over.append(request)
            else:
                size += request.size
            waiting_size -= request.size
        for request in over:
            group.requests.remove(request)
            self._forget(group, request)
        return bool(over)

    def take(self) -> list[BatchRequest]:
        """Remove and return the next batch: the first request, and others that may run with it."""
        group = self._next()
        batch: list[BatchRequest] = []
        size = 0
        while group.requests and (not batch or size + group.requests[0].size <= self._limit):
            request = group.requests.popleft()
            batch.append(request)
            size += request.size
            self._forget(group, request)
        return batch

    def _forget(self, group: "_Group", request: BatchRequest) -> None:
        group.size -= request.size
        self._bytes -= request.bytes()
        self._count -= 1
        if not group.requests:
            del self._groups[group.kind]

    def _next(self) -> "_Group":
        return min(self._groups.values(), key=_Group.position)


_get_level = attrgetter("level")


@dataclass(slots=True)
class _Group:
    """Requests that may run together, by priority, then in order of arrival."""

    kind: Hashable
    requests: deque[BatchRequest] = field(default_factory=deque)
    size: int = 0

    def position(self) -> tuple[int, int]:
        """Return what orders the groups: the priority of the first request, and since when it waits."""
        return self.requests[0].level, self.requests[0].waiting_since_ns()


class OutputsNotBatched(Exception):
    """The outputs lack the batch dimension that max_batch_size implies."""


def join_inputs(batch: Sequence[BatchRequest]) -> dict[str, Any]:
    return {name: np.concatenate([request.feed[name] for request in batch]) for name in batch[0].feed}


def split_outputs(batch: Sequence[BatchRequest], arrays: Sequence[Any]) -> list[list[Any]]:
    """Return each request's part of the outputs, as views.

    Raises:
        OutputsNotBatched: an output is not as long as the batch.
    """
    total = sum(request.size for request in batch)
    if any(array is not None and (not array.ndim or len(array) != total) for array in arrays):
        raise OutputsNotBatched
    parts, start = [], 0
    for request in batch:
        end = start + request.size
        parts.append([None if array is None else array[start:end] for array in arrays])
        start = end
    return parts
