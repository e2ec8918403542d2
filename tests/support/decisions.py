"""Decisions of the scheduler in words: facts, processes, actions, and scenes of several models.

Facts are words of `support.history.STEPS`. A process is `<load>:<phase>`, with `!` when it was killed, then
`/<worker>` for each worker that died.
"""

import asyncio
import re
from dataclasses import dataclass, replace
from math import inf
from typing import Any, cast

import pytest

from events.clock import seconds_between
from events.jobs import Failure
from events.types import Cause, LoadParameters
from features.devices.names import CPU, provider_of
from runtime.consumer.running import RunningLoad
from runtime.process.worker import Worker
from runtime.rooms import MACHINE, Alternative, RoomLimits, Target
from runtime.scheduler import actions
from runtime.scheduler.actions import Action, Decision
from runtime.scheduler.scheduler import decide
from runtime.scheduler.view import (
    LoadView,
    MemoryEstimate,
    Observations,
    Phase,
    Policy,
    SchedulerView,
)
from runtime.wire import Loaded
from support.history import MODEL, History, at, given

OTHER = "other"
PAIR = Policy(loads_at_once=2)


def read_table(text: str) -> list[Any]:
    """Return the rows of a table whose columns are separated by `|`.

    `#` begins a comment, spaces continue a row, and `-` is an empty column.
    """
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    rows = "\n".join(lines).replace("\n  ", " ").splitlines()
    return [pytest.param(*map(_read_column, row.split("|")), id=row) for row in rows]


def _read_column(text: str) -> str:
    return "" if text.strip() == "-" else text.strip()


def need(bytes_: int, on: str = CPU, *, there: int | None = None, guess: bool = False) -> Alternative:
    """Return what a load needs of the machine, and `there` of a device; None is as much as of the machine."""
    if on == CPU:
        return Alternative({MACHINE: bytes_}, is_guess=guess)
    needs = {on: bytes_ if there is None else there, MACHINE: bytes_}
    return Alternative(needs, Target(on, provider_of(on)), is_guess=guess)


def estimate(bytes_: int, *, guess: bool = False, **more: Any) -> MemoryEstimate:
    """Return the estimate of a load that runs on the CPU."""
    return MemoryEstimate((need(bytes_, guess=guess),), **more)


def processes(words: str) -> dict[str, LoadView]:
    found = {}
    for word in words.split():
        load, _, phase = word.partition(":")
        model = OTHER if load.startswith("O") else MODEL
        phase, *dead = phase.split("/")
        killed = phase.endswith("!")
        found[load] = LoadView(load, model, Phase(phase.rstrip("!")), killed=killed, exited=tuple(dead))
    return found


def decide_on(
    facts: str | History,
    running: str = "",
    *,
    policy: Policy = PAIR,
    after_s: float = 0,
    observations: Observations | None = None,
) -> Decision:
    """Return what the scheduler decides on these facts so many seconds after the last.

    Loads that the `observations` have no estimate of need no memory.
    """
    history = given(facts) if isinstance(facts, str) else facts
    now = at(history.seconds + after_s)
    seen = observations or Observations()
    nothing = {job.id: estimate(0) for job in history.state.unended()}
    seen = replace(seen, estimates={**nothing, **seen.estimates})
    return decide(SchedulerView(history.state, processes(running), policy, now, seen))


WORDS = {
    actions.StartLoad: "start {0.job.id}",
    actions.RecordFact: "place {0.job.id} at {0.data.server}: {0.data.reason}",
    actions.FailLoad: "fail {0.job.id}: {0.code}",
    actions.CancelJob: "cancel {0.job.id}",
    actions.StartUnload: "start {0.job.id} of {0.load_job_id}",
    actions.KillWorkers: "kill {0.load_job_id}",
    actions.RequestReload: "reload {0.model.id}, {0.cause}",
    actions.ChangeSettings: "change settings of {0.load_job_id} for {0.job.id}",
    actions.UnloadForReplacement: "replace {0.load_job_id} by {0.job.id}",
    actions.UnloadAutomatically: "unload {0.model.id}, {0.cause} for {0.cause_event_id}",
    actions.FailModel: "give up {0.model.id}",
}
"""How tables write an action; a last field that is None is left out."""


def describe(action: Action | None) -> str:
    match action:
        case None:
            return "nothing"
        case actions.RequestReload(model, Cause.DRAIN):
            return f"move {model.id}"
        case actions.StartLoad(_, _, actions.RecordFact() as placement):
            return f"{describe(placement)}, and start it"
        case actions.StartLoad(job, Alternative(target=Target(name))) if name:
            return f"start {job.id} on {name}"
        case actions.FinishUnload(jobs, load):
            return f"finish {' and '.join(job.id for job in jobs)} of {load}"
        case actions.RecordExits(load, _, workers):
            return " ".join(["record death of", *([load] if workers == (f"w-{load}",) else workers)])
    return re.sub(r"(:| for) None$", "", WORDS[type(action)].format(action))


def describe_next(decision: Decision) -> str:
    """Return the next action, or else the loads that are to be estimated."""
    if decision.action is None and decision.unestimated:
        return "estimate " + " ".join(job.id for job in decision.unestimated)
    return describe(decision.action)


@dataclass(frozen=True)
class SimulatedWorker:
    """A worker of a load that runs nothing."""

    worker_id: str
    has_exited: bool = False
    memory_bytes: int = 0
    in_flight: int = 0

    @property
    def ended(self) -> "SimulatedWorker":
        return self

    def done(self) -> bool:
        return self.has_exited


def live_load(
    *workers: SimulatedWorker,
    loaded: bool = False,
    failed: bool = False,
    tasks: bool = False,
    load: str = "",
    model: str = MODEL,
    **given: Any,
) -> RunningLoad:
    """Return a load with these workers: all have loaded, or it has failed, or a task works on it."""
    live = RunningLoad(load, model, 1, LoadParameters(), lambda: None, **given)
    live.workers = cast("list[Worker]", list(workers))
    live.report = Loaded((), (), 0) if loaded else None
    live.failure = Failure("broken", "it says why") if failed else None
    live.tasks = cast("set[asyncio.Task[None]]", {tasks} - {False})
    return live


class Scene:
    """Several models in a budget of 100 bytes, two loads at once; the id of a load is `<model><version>`.

    Args:
        script: what happens, and what is to follow from it, for `play`.
        policy: where it differs from the usual.
    """

    def __init__(self, script: str = "", **policy: Any) -> None:
        self.history = History()
        self.policy = Policy(**{"loads_at_once": 2, "budget_bytes": 100, "evicts": True} | policy)
        self.running: dict[str, LoadView] = {}
        self.observations = Observations(estimates={}, estimating=set())
        self.play(script)

    def play(self, script: str) -> None:
        """Do steps separated by `;`, each a method with arguments and options: `load a 60 busy=true`.

        After `->` stands the next action, `a1 waits for <words>`, or `wakes in <seconds>`.
        """
        for part in script.split(";"):
            step, _, expected = part.partition("->")
            if words := step.split():
                options = dict(word.split("=") for word in words[1:] if "=" in word)
                arguments = [_read_value(word) for word in words[1:] if "=" not in word]
                getattr(self, words[0])(*arguments, **{key: _read_value(options[key]) for key in options})
            if expected := expected.strip():
                self._expect(expected, part)

    def _expect(self, expected: str, part: str) -> None:
        decision = self.decision()
        if expected.startswith("wakes "):
            assert f"wakes in {self.wake_in_s():g}" == expected, part
            return
        load, waits, words = expected.partition(" waits for ")
        assert describe_next(decision) == ("nothing" if waits else expected), (part, decision.waiting_for)
        assert words in decision.waiting_for.get(load, ""), part

    def set(self, **policy: Any) -> None:
        self.policy = replace(self.policy, **policy)

    def device(self, name: str, budget_bytes: int | None = None, *, own: bool = True) -> None:
        """There is a device, with memory of its own or that of the machine."""
        limits = RoomLimits(f"the device {name}", budget_bytes, is_measured=own)
        self.set(rooms={**self.policy.rooms, name: limits})

    def load(
        self,
        model: str,
        memory_bytes: int = 0,
        *,
        version: int = 1,
        busy: bool = False,
        used_s_ago: float | None = None,
        load_s: float = 0,
        requests: int = 0,
        on: str | None = None,
        there: int = 0,
        **given: Any,
    ) -> None:
        """A model is loaded, in these bytes of the machine's memory, and `there` of the device it is on."""
        load = f"{model}{version}"
        self.history.load(load, of=model, version=version, **given)
        used_at = None if used_s_ago is None else at(self.history.seconds - used_s_ago)
        seen: dict[str, Any] = {"busy": busy, "last_used_at": used_at, "load_s": load_s, "requests": requests}
        self.run(load, model, memory_bytes=memory_bytes, on=on, there=there, **seen)

    def request(
        self,
        model: str,
        needs: int | str | None = 0,
        *,
        version: int = 1,
        proven: bool = False,
        on: str = "",
        there: int = 0,
        **given: Any,
    ) -> None:
        """A load is requested that needs these bytes; None is being estimated, `unknown` is not yet.

        It may run `on` these devices, separated by commas, and needs so many bytes `there`.
        """
        self.history.ask_load(f"{model}{version}", of=model, version=version, **given)
        if not isinstance(needs, str):
            self.estimate(f"{model}{version}", needs, proven=proven, on=on, there=there)

    def estimate(
        self,
        load: str,
        needs: int | None,
        *,
        guess: bool = False,
        proven: bool = False,
        on: str = "",
        there: int = 0,
    ) -> None:
        """The memory that a load will need becomes known, or is being found out."""
        if needs is None:
            self._estimate(load, None)
            return
        names = on.split(",") if on else [CPU]
        found = (
            need(needs, name, there=self._bytes_there(name, needs, there), guess=guess) for name in names
        )
        self._estimate(load, MemoryEstimate(tuple(found), proven))

    def _bytes_there(self, name: str, memory_bytes: int, there: int) -> int:
        """Return the bytes on a device of what takes so many of the machine: as many if it has no memory."""
        is_own = name in self.policy.rooms and self.policy.rooms[name].is_measured
        return there if is_own else memory_bytes

    def fail_estimate(self, load: str, code: str) -> None:
        """The files of a load cannot be looked at."""
        self._estimate(load, Failure(code, "it says why"))

    def _estimate(self, load: str, found: MemoryEstimate | Failure | None) -> None:
        self.observe(estimates={**self.observations.estimates, load: found})

    def observe(self, **given: Any) -> None:
        self.observations = replace(self.observations, **given)

    def begin(self, model: str, *, version: int = 1, on: str | None = None, there: int = 0) -> None:
        load = f"{model}{version}"
        self.history.start_load(load, of=model, version=version)
        estimate = self.observations.estimates.get(load)
        memory_bytes = estimate.bytes if isinstance(estimate, MemoryEstimate) else 0
        self.run(load, model, Phase.LOADING, memory_bytes=memory_bytes, on=on, there=there)

    def start(self, model: str, needs: int = 0, *, version: int = 1, **given: Any) -> None:
        self.request(model, needs, version=version, **given)
        self.begin(model, version=version)

    def complete(self, model: str, memory_bytes: int, *, version: int = 1) -> None:
        """A load ends well; its worker keeps these bytes, and what it took of its device."""
        load = f"{model}{version}"
        self.history.end_load(load, of=model, version=version)
        before = self.running[load]
        taken = {name: self._bytes_there(name, memory_bytes, each) for name, each in before.taken.items()}
        self.running[load] = replace(before, phase=Phase.SERVING, taken=taken)

    def fail(self, model: str, code: str = "broken", *, version: int = 1) -> None:
        """A load ends badly, and no process is left of it."""
        self.history.fail_load(f"{model}{version}", code, of=model, version=version)
        self.running.pop(f"{model}{version}", None)

    def unload(
        self, model: str, *, version: int = 1, cause: Cause = Cause.REQUEST, begun: bool = True
    ) -> None:
        load = f"{model}{version}"
        self.history.ask_unload(f"-{load}", load, of=model, cause=cause)
        if begun:
            self.history.start_unload(f"-{load}", of=model)
            self.running[load] = replace(self.running[load], phase=Phase.DRAINING)

    def exit(self, model: str, *, version: int = 1) -> None:
        """The process that was being unloaded has exited."""
        self.history.end_unload(f"-{model}{version}", of=model)
        self.forget(f"{model}{version}")

    def kill(self, load: str, model: str, memory_bytes: int) -> None:
        """A process of no recorded load was killed, and has not exited yet."""
        self.run(load, model, Phase.DRAINING, killed=True, memory_bytes=memory_bytes)

    def run(
        self,
        load: str,
        model: str,
        phase: str = Phase.SERVING,
        *,
        memory_bytes: int = 0,
        on: str | None = None,
        there: int = 0,
        **given: Any,
    ) -> None:
        taken = {MACHINE: memory_bytes}
        if on is not None:
            taken[on] = self._bytes_there(on, memory_bytes, there)
        self.running[load] = LoadView(load, model, Phase(phase), taken=taken, **given)

    def forget(self, load: str) -> None:
        del self.running[load]

    def use(self, load: str) -> None:
        """The last request of a process ends now."""
        self.running[load] = replace(self.running[load], busy=False, last_used_at=at(self.history.seconds))

    def restart(self, *models: str) -> None:
        """The server was killed after it had loaded these models, in this order, and has started again."""
        for model in models:
            self.history.load(f"{model}0", of=model)
        self.history.restart()

    def rate(self, model: str, requests_per_s: float) -> None:
        """A model is asked so often."""
        self.observe(requests_per_s={**self.observations.requests_per_s, model: requests_per_s})

    def wait(self, seconds: float) -> None:
        self.history.seconds += seconds

    def decision(self) -> Decision:
        now = at(self.history.seconds)
        return decide(SchedulerView(self.history.state, self.running, self.policy, now, self.observations))

    def wake_in_s(self) -> float:
        """Return in how many seconds the scheduler is to decide again at the latest."""
        wake_at = self.decision().wake_at
        return inf if wake_at is None else seconds_between(at(self.history.seconds), wake_at)

    def next_action(self) -> str:
        return describe_next(self.decision())


def _read_value(word: str) -> Any:
    if word in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[word]
    if word in list(Cause):
        return Cause(word)
    try:
        return float(word) if "." in word else int(word)
    except ValueError:
        return {each for each in word.split("+") if each} if "+" in word else word
