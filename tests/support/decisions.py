"""Words for what the scheduler is told and what it says: facts, processes, conditions, and actions.

Facts are told in the words of STEPS: `L…`, `R…` are loads and `U…`, `F…` (forced), `S` (a swap's) unloads of
the model `digits`; `O…` are loads of the model `other`; `P` is one of two instances, `P1` and `P2`. Processes
are told as `<load>:<phase>`, with `!` when they were killed, and then `/<worker>` for each that died. An
action is named as `said` does. A `Scene` tells of several models and what they take.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, assert_never

from events.clock import seconds_between
from events.models import Model
from events.types import CancelRequested, Cause, JobCancelled
from runtime.scheduling.actions import (
    Action,
    CancelJob,
    CompleteLoad,
    Decision,
    FailLoad,
    FinishUnload,
    GiveUp,
    Kill,
    MakeWay,
    Prepare,
    RecordDeath,
    RequestEnd,
    RequestReload,
    SizeUp,
    StartLoad,
    StartUnload,
    StopPreparing,
    TakeOver,
)
from runtime.scheduling.scheduler import decide
from runtime.scheduling.sight import Conditions, Phase, Policy, Running
from support.events import MODEL, History, at

OTHER = "other"
PAIR = Policy(loads_at_once=2)

STEPS: dict[str, Callable[[History], object]] = {
    "ask": lambda h: h.ask_load("L"),
    "ask_briefly": lambda h: h.ask_load("L", timeout_s=10),
    "start": lambda h: h.start_load("L"),
    "end": lambda h: h.end_load("L"),
    "load": lambda h: h.load("L"),
    "fail": lambda h: h.fail_load("L"),
    "ask_2": lambda h: h.ask_load("L2", version=2),
    "start_2": lambda h: h.start_load("L2", version=2),
    "end_2": lambda h: h.end_load("L2", version=2),
    "fail_2": lambda h: h.fail_load("L2", version=2),
    "ask_3": lambda h: h.ask_load("L3"),
    "swap_out": lambda h: h.ask_unload("S", "L", cause=Cause.SWAP),
    "start_swap_out": lambda h: h.start_unload("S"),
    "unload": lambda h: h.ask_unload("U", "L"),
    "start_unload": lambda h: h.start_unload("U"),
    "unload_2": lambda h: h.ask_unload("U", "L2"),
    "unload_R": lambda h: h.ask_unload("U", "R"),
    "force": lambda h: h.ask_unload("F", "L", force=True),
    "start_force": lambda h: h.start_unload("F"),
    "force_2": lambda h: h.ask_unload("F", "L2", force=True),
    "force_again": lambda h: h.ask_unload("F2", "L", force=True),
    "cancel": lambda h: h.add(JobCancelled(), "L"),
    "cancel_2": lambda h: h.add(JobCancelled(), "L2", version=2),
    "want_cancel": lambda h: h.add(CancelRequested(), "L"),
    "want_cancel_2": lambda h: h.add(CancelRequested(), "L2", version=2),
    "want_cancel_R": lambda h: h.add(CancelRequested(), "R"),
    "want_cancel_U": lambda h: h.add(CancelRequested(), "U"),
    "cancel_R": lambda h: h.add(JobCancelled(), "R"),
    "ask_2_in_place": lambda h: h.ask_load("L2", version=2, strategy="in_place"),
    "end_swap_out": lambda h: h.end_unload("S"),
    "reload_old": lambda h: h.ask_load("R", cause=Cause.SWAP),
    "die": lambda h: h.kill_worker("w-L"),
    "fork_server_dies": lambda h: h.kill_worker("w-L", signal=None),
    "load_pair": lambda h: h.load_pair("P"),
    "die_1": lambda h: h.kill_worker("P1"),
    "die_2": lambda h: h.kill_worker("P2"),
    "unload_P": lambda h: h.ask_unload("U", "P"),
    "recover": lambda h: h.ask_load("R", cause=Cause.RECOVERY),
    "start_R": lambda h: h.start_load("R"),
    "fail_R": lambda h: h.fail_load("R"),
    "restart": lambda h: h.restart(),
    "restart_cleanly": lambda h: h.restart(unclean=False),
    "ask_other": lambda h: h.ask_load("O", of=OTHER),
    "start_other": lambda h: h.start_load("O", of=OTHER),
    "load_other": lambda h: h.load("O", of=OTHER),
    "unload_other": lambda h: h.ask_unload("P", "O", of=OTHER),
}
"""The words that the tables are told in."""


def told(words: str) -> History:
    history = History()
    for word in words.split():
        STEPS[word](history)
    return history


def processes(words: str) -> dict[str, Running]:
    found = {}
    for word in words.split():
        load, _, phase = word.partition(":")
        model = OTHER if load.startswith("O") else MODEL
        phase, *dead = phase.split("/")
        killed = phase.endswith("!")
        found[load] = Running(load, model, Phase(phase.rstrip("!")), killed=killed, dead=tuple(dead))
    return found


def decided(facts: str, running: str = "", *, policy: Policy = PAIR, after_s: float = 0) -> Decision:
    history = told(facts)
    return decide(history.state, processes(running), policy, at(history.seconds + after_s))


def said(action: Action | None) -> str:  # noqa: PLR0912 - one word for each action
    match action:
        case None:
            return "nothing"
        case StartLoad(job):
            return f"start {job.id}"
        case CompleteLoad(job, replaces):
            return f"complete {job.id}" + (f", replacing {replaces}" if replaces else "")
        case FailLoad(job, code):
            return f"fail {job.id}" + (f": {code}" if code else "")
        case CancelJob(job):
            return f"cancel {job.id}"
        case StartUnload(job, load):
            return f"begin {job.id} of {load}"
        case Kill(load):
            return f"kill {load}"
        case FinishUnload(jobs, load):
            return f"finish {' and '.join(job.id for job in jobs)} of {load}"
        case RecordDeath(load, workers):
            return " ".join(["record death of", *([load] if workers == (f"w-{load}",) else workers)])
        case RequestReload(model, cause):
            return f"reload {model.id}, {cause}"
        case SizeUp(job):
            return f"size up {job.id}"
        case TakeOver(job, load):
            return f"go on with {load} as {job.id}"
        case MakeWay(job, load):
            return f"end {load} for {job.id}"
        case RequestEnd(model, cause, event):
            return f"unload {model.id}, {cause}" + (f" for {event}" if event else "")
        case GiveUp(model):
            return f"give up {model.id}"
        case Prepare(load):
            return f"prepare {load}"
        case StopPreparing():
            return "stop preparing"
        case _ as never:
            assert_never(never)


class Scene:
    """Several models, each loaded or to be loaded, in a budget of 100 bytes and two loads at once.

    A load's id is its model's and its version's: `a1`.
    """

    def __init__(self, budget_bytes: int | None = 100, **policy: Any) -> None:
        self.history = History()
        self.policy = Policy(**{"loads_at_once": 2, "budget_bytes": budget_bytes, "evicts": True} | policy)
        self.running: dict[str, Running] = {}
        self.needs: dict[str, int | None] = {}
        self.looked_at: set[str] = set()
        self.conditions = Conditions(needs=self.needs, looked_at=self.looked_at)

    def serves(
        self,
        model: str,
        memory_bytes: int = 0,
        *,
        version: int = 1,
        busy: bool = False,
        used_s_ago: float | None = None,
        **given: Any,
    ) -> None:
        """A model is loaded, and takes so much."""
        load = f"{model}{version}"
        self.history.load(load, of=model, version=version, **given)
        used_at = None if used_s_ago is None else at(self.history.seconds - used_s_ago)
        self.runs(load, model, Phase.SERVING, memory_bytes=memory_bytes, busy=busy, last_used_at=used_at)

    def asks(self, model: str, needs: int | None = 0, *, version: int = 1, **given: Any) -> str:
        """A load is asked for, which will need so much."""
        load = f"{model}{version}"
        self.history.ask_load(load, of=model, version=version, **given)
        self.needs[load] = needs
        return load

    def loads(self, model: str, needs: int = 0, *, version: int = 1, **given: Any) -> None:
        """A load is asked for and has begun."""
        load = self.asks(model, needs, version=version, **given)
        self.history.start_load(load, of=model, version=version)
        self.runs(load, model, Phase.LOADING, memory_bytes=needs)

    def ends(self, model: str, *, version: int = 1, cause: Cause = Cause.REQUEST, begun: bool = True) -> None:
        """An unload was asked for, and has begun."""
        load = f"{model}{version}"
        self.history.ask_unload(f"-{load}", load, of=model, cause=cause)
        if begun:
            self.history.start_unload(f"-{load}", of=model)
            self.running[load] = replace(self.running[load], phase=Phase.DRAINING)

    def is_gone(self, model: str, *, version: int = 1) -> None:
        """The process behind a load whose end is recorded is gone."""
        self.history.end_unload(f"-{model}{version}", of=model)
        del self.running[f"{model}{version}"]

    def is_killed(self, load: str, model: str, memory_bytes: int) -> None:
        """A process that nobody wants was killed, and is not gone yet."""
        self.runs(load, model, Phase.DRAINING, killed=True, memory_bytes=memory_bytes)

    def runs(self, load: str, model: str, phase: Phase, **given: Any) -> None:
        """There is a process."""
        self.running[load] = Running(load, model, phase, **given)

    def passes(self, seconds: float) -> None:
        """Time passes."""
        self.history.seconds += seconds

    def model(self, model: str) -> Model:
        """Return what is recorded of a model."""
        return self.history.model(model)

    def decision(self) -> Decision:
        """Return what the scheduler decides now."""
        return decide(
            self.history.state, self.running, self.policy, at(self.history.seconds), self.conditions
        )

    def says(self) -> str:
        """Return the next action in words."""
        return said(self.decision().action)

    def waiting_for(self, load: str) -> str:
        """Return what a load waits for; nothing else is to be done."""
        decision = self.decision()
        assert said(decision.action) == "nothing"
        return decision.waiting_for[load]

    def next_look_s(self) -> float | None:
        """Return in how many seconds the scheduler wants to be asked again."""
        wake_at = self.decision().wake_at
        return None if wake_at is None else seconds_between(at(self.history.seconds), wake_at)
