"""Anything happens in any order, with more models than memory, and in the end everything ends."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.fleet import of_both
from support.history import PLAIN
from support.watchedworld import WatchedWorld

from events.clock import add_seconds
from events.commands import FileIdentity, RequestCancel, RequestLoad, RequestUnload
from events.types import LoadParameters, WorkerExited
from runtime.scheduler.view import Policy

NAMES = st.sampled_from(["a", "b", "c"])
OUTCOMES = st.sampled_from(["loaded", "loaded", "loaded", "refused", "dies"])

POLICIES = st.builds(
    Policy,
    loads_at_once=st.integers(1, 2),
    budget_bytes=st.sampled_from([100, 100, 100, None]),
    max_loaded=st.sampled_from([None, None, 1, 2]),
    evicts=st.booleans(),
    min_residency_s=st.sampled_from([0.0, 10.0]),
    restores=st.sampled_from([True, True, False]),
)

PARAMETERS = st.builds(
    LoadParameters,
    priority=st.sampled_from(["normal", "normal", "high", "low"]),
    timeout_s=st.sampled_from([5, 300, 300]),
    keep_alive_s=st.sampled_from([None, None, -1, 0, 20]),
    strategy=st.sampled_from(["beside", "in_place", "auto"]),
    pinned=st.sampled_from([False, False, False, True]),
    instances=st.sampled_from([1, 1, 1, 2]),
)

LOADS = st.builds(
    lambda name, version, mtime_ns, parameters: RequestLoad(
        name,
        version,
        (FileIdentity("model.onnx", 4_096, mtime_ns),),
        "alice",
        parameters,
        asked=frozenset({"instances"} if parameters.instances > 1 else ()),
    ),
    NAMES,
    st.sampled_from([1, 1, 2]),
    st.sampled_from([1, 1, 1, 2]),
    PARAMETERS,
)

TURNS = st.sampled_from([0, 1, 2, 3, 100, 100])
"""That the consumer takes before the next thing happens; with the last it comes to rest."""

TROUBLES = [
    "fork server dies",
    "fork server is back",
    "a fork fails",
    "log loses",
    "log is unsure",
    "log has it twice",
    "server is killed",
    "server is stopped",
    "pressure",
    "no pressure",
]


class Simulation(RuleBasedStateMachine):
    """Anything happens in any order, and in the end everything ends."""

    def __init__(self) -> None:
        super().__init__()
        self.world = WatchedWorld()

    @initialize(policy=POLICIES, loads=st.lists(LOADS, max_size=3))
    def begin(self, policy: Policy, loads: list[RequestLoad]) -> None:
        self.world = WatchedWorld(policy)
        for load in loads:
            self.somebody_loads_and_all_goes_well(load, 100)

    @rule(load=LOADS, turns=TURNS)
    def somebody_loads(self, load: RequestLoad, turns: int) -> None:
        self.world.submit(load)
        self.world.work(turns)

    @rule(load=LOADS, turns=TURNS)
    def somebody_loads_and_all_goes_well(self, load: RequestLoad, turns: int) -> None:
        self.world.submit(load)
        for _ in range(4):
            self.world.settle()
            self.world.progress("loaded")
        self.world.work(turns)

    @rule(name=NAMES | st.none(), force=st.booleans(), turns=TURNS)
    def somebody_unloads(self, name: str | None, *, force: bool, turns: int) -> None:
        self.world.submit(RequestUnload(name, "alice", force))
        self.world.work(turns)

    @rule(which=st.integers(0, 3), turns=TURNS)
    def somebody_cancels(self, which: int, turns: int) -> None:
        unended = self.world.state.unended()
        if unended:
            self.world.submit(RequestCancel(unended[which % len(unended)].id, "alice"))
        self.world.work(turns)

    @rule(which=st.integers(0, 3), outcome=OUTCOMES, keeps=st.sampled_from([50, 100, 130]), turns=TURNS)
    def a_load_ends(self, which: int, outcome: str, keeps: int, turns: int) -> None:
        loading = self.world.loading()
        if loading and self.world.fork_server_up:
            loading[which % len(loading)].finish(outcome, keeps)
        self.world.work(turns)

    @rule(which=st.integers(0, 3), count=st.sampled_from([1, 1, 2]), turns=TURNS)
    def workers_of_a_model_die(self, which: int, count: int, turns: int) -> None:
        alive = self.world.alive()
        if alive:
            process = alive[which % len(alive)]
            process.die(WorkerExited(None, 9, ()), *process.left[:count])
        self.world.work(turns)

    @rule(which=st.integers(0, 3), ends=st.booleans(), turns=TURNS)
    def requests_come_and_go(self, which: int, *, ends: bool, turns: int) -> None:
        serving = self.world.serving()
        if serving:
            process = serving[which % len(serving)]
            process.busy = True
            if ends:
                process.answer(self.world.now)
        self.world.work(turns)

    @rule(name=NAMES, turns=TURNS)
    def a_request_waits_for_a_model_or_does_no_more(self, name: str, turns: int) -> None:
        self.world.leased ^= {name}
        self.world.work(turns)

    @rule(which=st.integers(0, 3), turns=TURNS)
    def a_model_grows(self, which: int, turns: int) -> None:
        serving = self.world.serving()
        if serving:
            serving[which % len(serving)].measured_bytes += 30
        self.world.work(turns)

    @rule(turns=TURNS)
    def files_are_looked_at_and_the_next_looks_take_time(self, turns: int) -> None:
        self.world.look_at_files()
        self.world.looks_take_time = True
        self.world.work(turns)

    @rule(name=NAMES, need=st.sampled_from([20, 60]), turns=TURNS)
    def something_can_be_prepared(self, name: str, need: int, turns: int) -> None:
        self.world.preparable[name] = need
        self.world.work(turns)

    @rule(turns=TURNS)
    def what_was_prepared_is(self, turns: int) -> None:
        self.world.preparation = None
        self.world.work(turns)

    @rule(turns=TURNS)
    def what_is_to_end_ends(self, turns: int) -> None:
        self.world.end_all()
        self.world.work(turns)

    @rule(seconds=st.sampled_from([0.001, 1, 12, 12, 35, 65, 400]), turns=TURNS)
    def time_passes(self, seconds: float, turns: int) -> None:
        self.world.now = add_seconds(self.world.now, seconds)
        self.world.work(turns)

    @rule(trouble=st.sampled_from(TROUBLES), turns=TURNS)
    def there_is_trouble(self, trouble: str, turns: int) -> None:
        match trouble:
            case "fork server dies":
                self.world.lose_fork_server()
            case "fork server is back":
                self.world.fork_server_up = True
            case "a fork fails":
                for process in self.world.loading()[:1]:
                    process.failure = process.failure or "fork_server_unavailable"
            case "log loses":
                self.world.fault = "lost"
            case "log is unsure":
                self.world.fault = "unsure"
            case "log has it twice":
                self.world.fault = "twice"
            case "pressure" | "no pressure":
                self.world.under_pressure = trouble == "pressure"
            case _:
                self.world.restart(unclean=trouble == "server is killed")
        self.world.work(turns)

    @rule(outcome=OUTCOMES)
    def all_is_calm_for_a_while(self, outcome: str) -> None:
        self.world.calm_down(outcome)
        self.world.check_rest()

    @invariant()
    def no_more_than_one_operation_on_a_model_at_a_time(self) -> None:
        self.world.check_operations()

    def teardown(self) -> None:
        self.world.calm_down("loaded")
        self.world.check_rest()


Simulation.TestCase.settings = settings(
    PLAIN, max_examples=of_both(short=100, long=5_000), stateful_step_count=50
)
TestSimulation = Simulation.TestCase
