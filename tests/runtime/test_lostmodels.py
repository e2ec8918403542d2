"""How an inference loses its model: each way has words, code and advice of its own."""

import pytest
from support.history import History

from events.jobs import Job
from events.types import Cause
from runtime.errors import Exit, Kill, WorkerDied
from runtime.lostmodels import explain_loss
from server.errors import problem_of
from tools.errors import ADVICE

CRASHED, KILLED, ORPHANED = Exit(None, 11), Exit(None, 9), Exit(None, None)


def unload_by(cause: Cause, *, force: bool = False) -> Job:
    history = History()
    history.load("L1")
    history.ask_unload("U", "L1", force=force, cause=cause)
    return history.state.jobs["U"]


FORCED = unload_by(Cause.REQUEST, force=True)
TOOK = Kill("it took 900 MB of memory, and may take 500 MB", "out_of_memory")
STUCK = Kill("an inference did not stop within 2 s")


@pytest.mark.parametrize(
    ("way", "unload", "death", "code", "words"),
    [
        ("unload", unload_by(Cause.REQUEST), KILLED, "model_unloaded", "was unloaded by alice, before"),
        ("forced", FORCED, KILLED, "model_unloaded", "was unloaded by alice, by force, before"),
        ("swap", unload_by(Cause.SWAP), KILLED, "model_replaced", "replaced by another version"),
        ("eviction", unload_by(Cause.EVICTION), KILLED, "model_evicted", "by the server, to free memory"),
        ("idle", unload_by(Cause.IDLE), KILLED, "model_evicted", "by the server, since nobody used it"),
        ("drain", unload_by(Cause.DRAIN), KILLED, "model_moved", "because its node drains"),
        ("copy", unload_by(Cause.COPY), KILLED, "model_moved", "since others have it"),
        ("lease", None, KILLED, "model_moved", "this server may not serve model 'm' any more"),
        ("crash", None, CRASHED, "worker_died", "was killed by signal 11, maybe because of this inference"),
        ("exit", None, Exit(3, None), "worker_died", "with exit code 3, maybe because of"),
        ("kernel", None, KILLED, "worker_died", "probably the kernel's for lack of memory"),
        ("memory", None, WorkerDied(KILLED, kill=TOOK), "out_of_memory", "killed it: it took 900 MB"),
        ("stuck", None, WorkerDied(KILLED, kill=STUCK), "worker_died", "did not stop within 2 s"),
        ("fork server", None, ORPHANED, "fork_server_died", "the fork server ended, too"),
        ("crash in a drain", FORCED, CRASHED, "worker_died", "was killed by signal 11"),
    ],
)
def test_lost_model_is_explained_by_its_cause(
    way: str, unload: Job | None, death: Exit | WorkerDied, code: str, words: str
) -> None:
    died = WorkerDied(death) if isinstance(death, Exit) else death
    is_expected = way == "lease" or (unload is not None and way != "crash in a drain")
    answer = problem_of(explain_loss("m", died, unload, is_expected=is_expected))
    assert (answer.status, answer.code) == (503, code)
    assert words in answer.detail
    assert "model 'm'" in answer.detail
    assert ("Retry-After" in answer.headers) == (code != "model_unloaded")
    assert code in ADVICE
