"""Whose fault it is that a trial could not be held: the prepared form's, the model's, or nobody's here."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from runtime.errors import ForkServerUnavailable, InferenceTimeout, QueueFull, RuntimeProblem, WorkerDied

CHANGED = ("model_changed", "unsafe_file")
"""Why a load is refused whose files are no longer those that were loaded before."""


class NotTried(Exception):
    """There is nothing to try the model on, or the bare one does not do either: it says what."""


class Stopped(Exception):
    """It could not be finished, for no reason of the form's own, and may be tried again: it says why."""


def is_circumstance(problem: RuntimeProblem) -> bool:
    """Tell whether it may be another's fault than that of whatever was loaded or run.

    A process that is killed is so by whoever wants its memory, or at the server's end.
    """
    if isinstance(problem, WorkerDied):
        return problem.end.exit_code is None and problem.end.signal in {None, signal.SIGKILL}
    return isinstance(problem, ForkServerUnavailable | InferenceTimeout | QueueFull)


@contextmanager
def of_the_model(*, passing: tuple[type[RuntimeProblem], ...] = ()) -> Iterator[None]:
    """Blame no form for what goes wrong with the bare model.

    Args:
        passing: problems that are passed on, as it is that the files are others by now.

    Raises:
        NotTried: it is the model's own.
        Stopped: it is what the model was given of time and memory, or somebody else's doing.
    """
    try:
        yield
    except RuntimeProblem as problem:
        if isinstance(problem, passing) or problem.code in CHANGED:
            raise
        if is_circumstance(problem) or problem.code == "out_of_memory":
            raise Stopped(f"the bare model: {problem}") from problem
        raise NotTried(f"the model cannot be tried, bare as it is: {problem}") from problem
