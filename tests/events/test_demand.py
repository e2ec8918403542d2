"""On-demand loads follow what a person chose last: version, parameters, and nothing after an unload."""

import pytest
from msgspec.structs import asdict
from support.history import CONTENTS, MODEL, TUNED, at, given

from events.accept import accept
from events.commands import Accepted, Decision, Existing, Refused
from events.jobcommands import RequestLoad, RequestUnload
from events.state import State
from events.types import Cause, LoadJoined, LoadRequested, ModelUnloaded, UnloadRequested
from features.ondemand.rules import find_chosen_version, find_demand_refusal

UNLOADED = "request_unload start_unload finish_unload"
HELD = f"load {UNLOADED}"


def decide(state: State, command: RequestLoad | RequestUnload) -> Decision:
    return accept(state, command, iter(["new", "outcome"]).__next__, at(9_999))


def demand(version: int) -> RequestLoad:
    return RequestLoad(MODEL, version, CONTENTS, "pia", cause=Cause.DEMAND)


CHOICES: list[tuple[str, int | None, str, str]] = [
    # facts; the version for an inference that names none; a demand of version 1, and of 2
    ("label", None, "loaded", "loaded"),
    ("request_demand start_demand finish_demand evict_D", None, "loaded", "loaded"),
    ("load evict_L", 1, "loaded", "model_not_loaded"),
    ("load evict_L label_v2", 1, "loaded", "loaded"),
    ("load fail_again evict_L", 1, "loaded", "model_not_loaded"),
    ("load load_v2 drain evict_L2", 2, "model_not_loaded", "loaded"),
    ("load request_v2 start_v2 fail_v2 evict_L", 1, "loaded", "model_not_loaded"),
    ("load restart restore evict_R", 1, "loaded", "model_not_loaded"),
    ("load evict_L remove", 1, "unknown_version", "model_not_loaded"),
    (HELD, None, "out_of_service", "out_of_service"),
    (f"{HELD} label_v2", None, "out_of_service", "out_of_service"),
    (f"{HELD} restart", None, "out_of_service", "out_of_service"),
    (f"{HELD} request_again start_again fail_again", None, "out_of_service", "out_of_service"),
    (f"{HELD} load_again evict_L3", 1, "loaded", "model_not_loaded"),
    ("request request_force start_force cancel_L finish_force", None, "out_of_service", "out_of_service"),
    ("load request_unload_until_asked start_unload finish_unload", 1, "loaded", "model_not_loaded"),
    ("load request_unload cancel_U evict_L", 1, "loaded", "model_not_loaded"),
]


@pytest.mark.parametrize(("facts", "chosen", "one", "two"), CHOICES)
def test_demand_loads_what_a_person_chose(facts: str, chosen: int | None, one: str, two: str) -> None:
    state = given(facts).state
    assert find_chosen_version(state.models.get(MODEL)) == chosen
    for version, expected in ((1, one), (2, two)):
        match decide(state, demand(version)):
            case Accepted(drafts):
                assert expected == "loaded"
                assert [draft.version for draft in drafts] == [version]
            case Refused(code):
                assert code == expected
            case other:
                pytest.fail(str(other))


def test_demand_has_the_parameters_of_the_choice() -> None:
    tuned, limited = given("load_tuned evict_L label_v2"), given("request_10s start finish evict_L")
    for history, version, expected in ((tuned, 1, TUNED), (tuned, 2, {}), (limited, 1, {})):
        decision = decide(history.state, demand(version))
        assert isinstance(decision, Accepted)
        [draft] = decision.drafts
        assert isinstance(draft.data, LoadRequested)
        assert draft.data.timeout_s == 300  # at least the server's
        assert {name: value for name, value in asdict(draft.data).items() if name in TUNED} == {
            name: expected.get(name, getattr(demand(version).parameters, name)) for name in TUNED
        }


def test_removed_choice_is_named_in_the_refusal() -> None:
    history = given("load evict_L remove")
    refusal = find_demand_refusal(history.model(), history.versions(), None)
    assert refusal is not None
    assert refusal.code == "out_of_service"
    assert "version 1 of model 'digits', which was loaded by alice" in refusal.message
    assert "was removed: load another version" in refusal.message


def test_person_chooses_what_an_inference_has_loaded() -> None:
    history = given("request_demand start_demand finish_demand")
    load = RequestLoad(MODEL, 1, CONTENTS, "alice")  # the subject of that inference, too
    joined = decide(history.state, load)
    assert isinstance(joined, Accepted)
    assert joined.job_id == "D"
    history.add(LoadJoined(), "D", by="alice")
    assert find_chosen_version(history.model()) == 1
    assert decide(history.state, load) == Existing("D")


UNLOADS = [
    # facts; where inferences load models, an unload that they do not undo; one until asked; elsewhere
    ("label", "completed", "completed", "not_loaded"),
    ("load evict_L", "completed", "completed", "not_loaded"),
    ("load fail_again evict_L", "completed", "completed", "not_loaded"),
    (HELD, "U", "U", "not_loaded"),
    ("request", "not_loaded", "not_loaded", "not_loaded"),
    ("load request_eviction", "new", "U", "U"),
    ("load request_unload_until_asked", "new", "join U", "join U"),
    ("load request_unload", "U", "U", "U"),
]


@pytest.mark.parametrize(("facts", "holding", "until_asked", "elsewhere"), UNLOADS)
def test_unload_takes_out_of_service(facts: str, holding: str, until_asked: str, elsewhere: str) -> None:
    state = given(facts).state
    commands = {
        RequestUnload(MODEL, "alice", takes_out_of_service=True): holding,
        RequestUnload(MODEL, "alice", takes_out_of_service=True, until_asked=True): until_asked,
        RequestUnload(MODEL, "alice"): elsewhere,
    }
    for command, expected in commands.items():
        match decide(state, command):
            case Accepted((request, outcome), "new"):
                assert expected == "completed"
                assert isinstance(request.data, UnloadRequested)
                assert (request.data.load_job_id, request.version) == (None, None)
                assert outcome.data == ModelUnloaded(0, 0, 0)
            case Accepted((request,), job, is_join=False):
                assert (expected, job) == ("new", "new")
            case Accepted(_, job) | Existing(job):
                assert expected.removeprefix("join ") == job
            case Refused(code):
                assert code == expected
