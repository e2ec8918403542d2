"""Which inference runs, and which are not to be run: what a worker's two threads share."""

import threading
from collections.abc import Sequence

import onnxruntime as ort


class Cancellation:
    """Keeps a cancellation for exactly the inference that it is meant for, be it to come, waiting or running.

    One execution runs at a time, of one inference or of several that go together.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: Sequence[int] = ()
        self._options: ort.RunOptions | None = None
        self._latest = -1
        self._waiting: set[int] = set()
        self._cancelled: set[int] = set()

    def wait(self, number: int) -> None:
        """Note that an inference has come, and that later ones may be begun before it."""
        with self._lock:
            self._waiting.add(number)

    def drop(self, number: int) -> bool:
        """Tell whether an inference that waits, or has just come, is cancelled; it is then over."""
        if not self._cancelled:  # as nearly always; what is cancelled from here on, `begin` finds
            return False
        with self._lock:
            if number not in self._cancelled:
                return False
            self._cancelled.discard(number)
            self._waiting.discard(number)
            self._latest = max(self._latest, number)
            return True

    def skip(self, number: int) -> None:
        """Note that an inference has come and is over: it cannot be run."""
        with self._lock:
            self._cancelled.discard(number)
            self._latest = max(self._latest, number)

    def begin(self, numbers: Sequence[int]) -> ort.RunOptions | None:
        """Note that these inferences start; None, and they do not, if one of them is cancelled."""
        options = ort.RunOptions()  # of its own for each execution: `terminate` must not outlive it
        with self._lock:
            if self._cancelled and not self._cancelled.isdisjoint(numbers):
                return None
            if self._waiting:
                self._waiting.difference_update(numbers)
            self._latest = max(self._latest, *numbers)
            self._running, self._options = numbers, options
        return options

    def end(self) -> None:
        """Note that what ran is over; who was cancelled meanwhile and has an answer is cancelled no more."""
        with self._lock:
            if self._cancelled:
                self._cancelled.difference_update(self._running)
            self._running, self._options = (), None

    def end_to_begin_again(self) -> None:
        """Note that what ran waits again; who was cancelled meanwhile stays cancelled."""
        with self._lock:
            self._waiting.update(self._running)
            self._running, self._options = (), None

    def cancel(self, number: int) -> None:
        """Stop an inference, or see to it that it does not begin; of one that is over nothing happens."""
        with self._lock:
            if number in self._running and self._options is not None:
                self._options.terminate = True
                self._cancelled.add(number)
            elif number > self._latest or number in self._waiting:
                self._cancelled.add(number)
