"""On-demand loads follow what a person chose last: version, bytes, parameters; nothing after an unload."""

import pytest
from msgspec.structs import asdict
from support.history import CONTENTS, MODEL, OTHER_BYTES, TUNED, at, given

from events.accept import accept
from events.commands import Accepted, Decision, Existing, Refused
from events.jobcommands import RequestLoad, RequestUnload
from events.models import ModelState
from events.state import State
from events.types import Cause, LoadJoined, LoadRequested, ModelUnloaded, UnloadRequested
from features.ondemand.rules import find_chosen_version, find_demand_refusal
from runtime.consumer.loads import find_expected

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
    ("load evict_L label_v2", 1, "loaded", "model_not_loaded"),
    ("label_v2 request_demand start_demand finish_demand evict_D", None, "loaded", "loaded"),
    ("load fail_again evict_L", 1, "loaded", "model_not_loaded"),
    ("load load_v2 drain evict_L2", 2, "model_not_loaded", "loaded"),
    ("load request_v2 start_v2 fail_v2 evict_L", 1, "loaded", "model_not_loaded"),
    ("load restart restore evict_R", 1, "loaded", "model_not_loaded"),
    ("load evict_L remove", 1, "unknown_version", "model_not_loaded"),
    ("load evict_L remove add", 1, "loaded", "model_not_loaded"),
    ("load evict_L remove add_other_bytes", 1, "out_of_service", "model_not_loaded"),
    ("load evict_L remove add_other_bytes load_other_bytes evict_L3", 1, "loaded", "model_not_loaded"),
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
    tuned, limited = given("load_tuned evict_L"), given("request_10s start finish evict_L")
    for history, version, expected in ((tuned, 1, TUNED), (limited, 1, {}), (given("demand evict_D"), 2, {})):
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
    assert "version 1 of model 'digits' was loaded by alice" in refusal.message
    assert "was removed: load another version" in refusal.message


def test_refusal_of_another_version_names_choice_and_command() -> None:
    history = given("load evict_L label_v2")
    refusal = find_demand_refusal(history.model(), history.versions(), 2)
    assert refusal is not None
    assert "version 1 of model 'digits' was loaded by alice at 2026-01-01" in refusal.message
    assert 'POST /api/v1/models/digits/load and body {"version": 2}' in refusal.message


OLD, NEW = "ab" * 32, OTHER_BYTES
KEPT = [
    # facts; the bytes that a demand of version 1 takes, and one of 2; None are the present ones
    ("", None, None),
    ("add", None, None),
    ("load evict_L", OLD, None),
    ("load request_unload_until_asked start_unload finish_unload", OLD, None),
    ("load restart restore evict_R", OLD, None),
    ("load load_other_bytes drain evict_L3", NEW, None),
    ("load fail_again evict_L", OLD, None),
    ("load request_again change_settings evict_L", OLD, None),
    ("load load_v2 drain evict_L2", None, OLD),
    ("load evict_L demand_other_bytes evict_D", OLD, None),
    ("load evict_L remove add", OLD, None),
    ("demand evict_D", OLD, None),
    ("demand_v2 evict_D", None, OLD),
    ("add demand evict_D", OLD, None),
    ("demand evict_D add_other_bytes", None, None),
    ("demand evict_D add_other_bytes demand_other_bytes evict_D", NEW, None),
    ("demand_other_bytes join_D evict_D", NEW, None),
]


@pytest.mark.parametrize(("facts", "one", "two"), KEPT)
def test_demand_takes_the_bytes_from_before(facts: str, one: str | None, two: str | None) -> None:
    for version, expected in ((1, one), (2, two)):
        history = given(facts)
        history.ask_load("asked", version=version, cause=Cause.DEMAND)
        files = find_expected(history.job("asked"), history.state)
        assert (None if files is None else [each.sha256 for each in files]) == (expected and [expected])
        history.ask_load("person", version=version)
        assert find_expected(history.job("person"), history.state) is None


RETURNS = [
    # facts; whether the first inference without a version brings the choice, version 1, back
    ("load", False),
    ("load evict_L", False),
    ("load load_v2", False),
    ("demand_v2", False),
    ("load evict_L demand_v2", True),
    ("load evict_L demand_other_bytes", True),
    ("load evict_L demand", False),
    ("load evict_L demand_v2 request_choice", True),
    ("load evict_L demand_v2 request_choice fail_choice:bytes_gone", False),
    ("load evict_L demand_v2 restart", False),
    ("load evict_L demand_v2 request_v2", False),
    ("load evict_L demand_v2 evict_D", False),
    ("load evict_L demand_v2 request_unload_D", False),
    ("load evict_L demand_v2 load_v2", False),
    ("load evict_L demand_v2 join_D", False),
    (f"{HELD} demand_v2", False),
]


@pytest.mark.parametrize(("facts", "returns"), RETURNS)
def test_choice_that_an_inference_replaced_returns_once(facts: str, *, returns: bool) -> None:
    history = given(facts)
    model = history.model()
    assert model.is_to_return is returns
    if model.phase is not ModelState.LOADED or model.loads:
        return
    for version in (1, 2):
        is_accepted = returns and version == 1
        assert isinstance(decide(history.state, demand(version)), Accepted if is_accepted else Existing)


def test_person_chooses_what_an_inference_has_loaded() -> None:
    history = given("request_demand start_demand finish_demand")
    load = RequestLoad(MODEL, 1, CONTENTS, "alice")  # the subject of that inference, too
    joined = decide(history.state, load)
    assert isinstance(joined, Accepted)
    assert joined.job_id == "D"
    history.add(LoadJoined(), "D", by="alice")
    assert find_chosen_version(history.model()) == 1
    assert decide(history.state, load) == Existing("D")


def test_choice_does_not_return_while_there_are_copies() -> None:
    history = given("load evict_L")
    for node in ("a", "b"):
        history.join(node)
    history.load_at("a", "D", version=2, cause=Cause.DEMAND)
    assert history.model().is_to_return
    history.load_at("b", "C", version=2, cause=Cause.COPY)
    assert not history.model().is_to_return


MISSED = [
    # facts; whether the model should serve and cannot
    ("", False),
    ("request start fail", False),
    ("load crash request_recovery fail_recovery:bytes_gone", True),
    ("load restart request_restore fail_recovery:bytes_gone", True),
    ("load restart request_restore fail_recovery:too_many_loaded", True),
    ("load restart request_restore fail_recovery:timeout", False),
    ("demand restart request_restore fail_recovery:bytes_gone", True),
    ("demand restart request_restore fail_recovery:too_many_loaded", False),
    ("load evict_L", False),
    ("load evict_L request_choice fail_choice:bytes_gone", True),
    (f"{HELD} request_again start_again fail_again", False),
    ("load restart request_restore fail_recovery:bytes_gone load_again", False),
]


@pytest.mark.parametrize(("facts", "is_missed"), MISSED)
def test_missed_model_can_be_unloaded(facts: str, *, is_missed: bool) -> None:
    history = given(facts)
    assert history.model().is_missed is is_missed
    if is_missed:
        decision = decide(history.state, RequestUnload(MODEL, "alice"))
        assert isinstance(decision, Accepted)
        for draft in decision.drafts:
            history.add(draft.data, draft.job_id, event_id=draft.id, by=draft.actor)
        after = history.model()
        assert (after.phase, after.error, after.is_missed) == (ModelState.UNLOADED, None, False)
        assert find_chosen_version(after) is None


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
