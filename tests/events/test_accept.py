"""What the writer decides: after these facts, a command is accepted, joined to a job, or refused.

`support.history.STEPS` explains the words; new events are called `new`.
"""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given as given_any
from hypothesis import strategies as st
from msgspec import UNSET, structs
from support.history import CONTENTS, FEWER, MODEL, TUNED, at, fold, given, ids
from support.strategies import drafts

from events.accept import accept
from events.commands import (
    MAX_QUEUE,
    OUTDATED,
    Accepted,
    Command,
    Decision,
    Existing,
    JobUnchanged,
    ModelUnchanged,
    Record,
    Refused,
    WorkerServes,
)
from events.jobcommands import RequestCancel, RequestLoad, RequestUnload
from events.state import State
from events.types import (
    AddedFile,
    CancelRequested,
    Cause,
    Data,
    Draft,
    Idempotency,
    JobCancelled,
    LoadJoined,
    LoadParameters,
    LoadRequested,
    LoadStarted,
    ModelSettingsChanged,
    Provenance,
    UnloadJoined,
    UnloadRequested,
    VersionAdded,
    VersionRemoved,
    record_draft,
)
from events.versioncommands import AddVersion, RemoveVersion
from features.nodes.commands import NodeCurrent

NEW = "new"
KEY = Idempotency("5f" * 32, "c0" * 32)
OTHERS = (("model.onnx", "cd" * 32),)
OTHER_FILES, SAME_FILES = ((AddedFile("model.onnx", 9, sha256 * 32),) for sha256 in ("cd", "ab"))
ADD, REMOVE = AddVersion(MODEL, 1, "bob", (), "e"), RemoveVersion(MODEL, 1, "bob", "e")
Contents = tuple[tuple[str, str], ...]


def decide(state: State, command: Command) -> Decision:
    return accept(state, command, lambda: NEW, at(9_999))


def outcome(facts: str | State, command: Command) -> str:
    """Return `new`, and the load that an unload ends; the job that answers; or the code of a refusal."""
    match decide(given(facts).state if isinstance(facts, str) else facts, command):
        case Accepted((Draft(id=event, job_id=about),), job, is_join=True):
            assert (event, job) == (NEW, about)
            return f"join {about}"
        case Accepted((Draft(data=UnloadRequested(load_job_id=ended, force=force)),), job):
            assert (job, force) == (NEW, getattr(command, "force", None))
            return f"new:{ended}"
        case Accepted((Draft(id=event, job_id=about),), job):
            assert (event, job) == (NEW, about)
            return NEW
        case Accepted((Draft(id=event), Draft(data=JobCancelled() as end, job_id=about)), job):
            assert NEW == event == job == end.superseded_by
            assert end.reason == "superseded"
            return f"new for {about}"
        case Accepted((Draft(id=event), Draft(data=ModelSettingsChanged(load), job_id=about)), job):
            assert NEW == event == job == about
            return f"settings:{load}"
        case Existing(str(job)):
            return job
        case Refused(code, message):
            assert message
            return code
        case decision:
            pytest.fail(f"{decision}")


def load(version: int = 1, contents: Contents | None = CONTENTS, cause: Cause = Cause.REQUEST) -> RequestLoad:
    return RequestLoad(MODEL, version, contents, "alice", cause=cause)


def asking(command: RequestLoad, **parameters: Any) -> RequestLoad:
    return replace(command, parameters=LoadParameters(**parameters), asked=frozenset(parameters))


def instances(number: int) -> RequestLoad:
    return asking(load(), instances=number)


def unload(model_id: str | None = MODEL, *, force: bool = False) -> RequestUnload:
    return RequestUnload(model_id, "alice", force=force)


# Loads.

BATCHES = LoadParameters(max_batch_size=8)
"""As a model's own defaults give them: the request asks for none."""

LOADS: list[tuple[str, RequestLoad, str]] = [
    # facts, command, then: the job that answers
    ("", load(), NEW),
    ("request", load(), "L"),
    ("request start", load(), "L"),
    ("request start", load(contents=OTHERS), "L"),
    ("load", load(), "L"),
    ("load", load(cause=Cause.DEMAND), "L"),
    ("load", load(2, cause=Cause.DEMAND), "L"),
    ("request start", load(2, cause=Cause.DEMAND), "L"),
    ("load request_unload", load(2, cause=Cause.DEMAND), "U"),
    ("request request_v2", load(3, cause=Cause.DEMAND), "L2"),
    ("load request_unload start_unload request_again", load(2, cause=Cause.DEMAND), "L3"),
    ("load", asking(load(), keep_alive_s=-1), "L"),
    ("load", asking(load(), pinned=False), "L"),
    ("load", asking(load(), pinned=True), "settings:L"),
    ("load", replace(asking(load(), pinned=True), is_checked=True), NEW),  # settings of bytes under rules
    ("load rules_in_force", asking(load(), pinned=True), NEW),
    ("load", replace(load(), is_checked=True), "L"),
    ("request", asking(load(), pinned=True), NEW),
    ("request start", asking(load(), pinned=True), NEW),
    ("request start", asking(load(), pinned=False, timeout_s=300, priority="normal"), "L"),
    ("request start", asking(load(), timeout_s=301), NEW),
    ("request start", asking(load(), strategy="in_place"), NEW),
    ("request start", asking(load(), memory_limit_bytes=1), NEW),
    ("request start", asking(load(), keep_alive_s=-1), "L"),
    ("request start request_again_pinned", asking(load(), pinned=True), "L3"),
    ("request start request_again_pinned", load(), "L3"),
    ("request start request_again_pinned", asking(load(), pinned=False), NEW),
    ("load", load(contents=OTHERS), NEW),
    ("load", load(contents=None), NEW),
    ("load", load(contents=(*CONTENTS, ("weights.bin", "ab" * 32))), NEW),
    ("load", load(contents=()), NEW),
    ("load", load(2), NEW),
    ("request start", load(2), NEW),
    ("load_other", load(), NEW),
    ("load request_v2", load(2), "L2"),
    ("load request_v2 start_v2", load(2), "L2"),
    ("load load_v2", load(2), "L2"),
    ("load load_v2 request_drain start_drain", load(2), "L2"),
    ("load load_v2 request_drain start_drain", load(), NEW),
    ("load request_v2", load(), NEW),
    ("load request_unload", load(), NEW),
    ("load request_unload start_unload", load(), NEW),
    ("load request_unload start_unload request_again", load(), "L3"),
    ("request start request_force", load(), NEW),
    ("load request_unload finish_unload", load(), NEW),
    ("request start fail", load(), NEW),
    ("load crash", load(), NEW),
    ("load_pair", load(), "P"),
    ("load", instances(2), NEW),
    ("request", instances(2), NEW),
    ("load_pair", instances(2), "P"),
    ("load_pair", instances(1), NEW),
    ("load", instances(1), "L"),
    ("load", asking(load(), max_batch_size=8), NEW),
    ("load", replace(load(), parameters=BATCHES), "L"),
    ("load", asking(load(), timeout_s=5), "L"),
    ("load_pair crash_1", load(), NEW),
    ("load_pair crash_1", load(cause=Cause.DEMAND), "P"),
    ("load_pair crash_1", load(cause=Cause.RECOVERY), NEW),
    ("load_pair crash_1 recover_pair", load(), "join R"),
    ("load restart", load(), NEW),
    # What the system asked for gives way to a person's load until it starts, and to nothing else.
    ("load_pair crash_1 request_recovery", load(), "new for R"),
    ("load crash request_recovery", load(), "new for R"),
    ("load crash request_recovery", load(2), "new for R"),
    ("load crash request_recovery", asking(load(), pinned=True), "new for R"),
    ("load restart request_restore", load(), "new for R"),
    ("load load_v2 drain request_return", load(), "new for R"),
    ("request_demand", load(), "new for D"),
    ("request_demand", asking(load(), instances=2), "new for D"),
    ("request_demand start_demand restart", load(), "new for D"),
    ("load request_unload request_demand", load(), "new for D"),
    ("request_demand start_demand", load(), NEW),
    ("request_demand start_demand", load(2), NEW),
    ("load crash request_recovery start_recovery", load(), NEW),
    ("load crash request_recovery request_cancel_R", load(), NEW),
    ("request_demand request_again", load(), "L3"),
    ("request_demand", load(cause=Cause.DEMAND), "D"),
    ("load crash request_recovery", load(cause=Cause.DEMAND), "R"),
    ("load crash request_recovery", load(2, cause=Cause.DEMAND), "R"),
    ("request start request_again_pinned", load(cause=Cause.DEMAND), "L3"),
    ("request", load(cause=Cause.RECOVERY), "L"),
    ("request start restart", load(), "L"),
    ("request request_cancel_L", load(), NEW),
    ("request start request_cancel_L", load(), NEW),
    ("load request_v2 request_cancel_L2", load(), NEW),
    ("load request_unload request_cancel_U", load(), NEW),
]


@pytest.mark.parametrize(("facts", "command", "job"), LOADS)
def test_load_is_new_or_joins_job(facts: str, command: RequestLoad, job: str) -> None:
    assert outcome(facts, command) == job


LOW: dict[str, Any] = {"pinned": False, "priority": "low", "timeout_s": 9}
NO_BATCHES = {"max_batch_size": 0, "max_queue_delay_us": 0}
OF_WORKERS: list[dict[str, Any]] = [
    *({"instances": 2}, {"pinned": False, "instances": 2}, {"threads": 4}, {"threads": None}),
    *({"node_attributes": ("gpu=a",)}, {"node_attributes": UNSET}),
    *({"priority_levels": 2}, {"priority_levels": 2, "default_priority_level": 1}),
    *({"max_batch_size": 16}, {"max_queue_delay_us": 5}, {"devices": ("cuda:0",)}, {"fallback": "cpu"}),
]
"""Parameters that take other workers."""
PARAMETERS: list[tuple[str, RequestLoad, str | None, dict[str, Any]]] = [
    # facts, command, the load whose settings change if that is all, recorded parameters
    # Of the same version, what is not named stays.
    ("load_tuned", asking(load(), pinned=False), "L", TUNED | {"pinned": False}),
    ("load_tuned", asking(load(), **LOW), "L", TUNED | LOW),
    ("load_tuned", asking(load(), keep_alive_s=5), "L", TUNED | {"keep_alive_s": 5}),
    ("load_tuned", asking(load(), max_queue=5), "L", TUNED | {"max_queue": 5}),
    *(("load_tuned", asking(load(), **each), None, TUNED | each) for each in OF_WORKERS),
    ("load", asking(load(), threads=None, pinned=True), "L", {"pinned": True}),
    ("load_tuned", asking(load(), max_batch_size=0), None, TUNED | NO_BATCHES),
    ("load_tuned", load(contents=OTHERS), None, TUNED),
    ("load_tuned crash", load(), None, TUNED),
    ("load_tuned restart", asking(load(), pinned=False), None, TUNED | {"pinned": False}),
    ("load_tuned crash request_recovery", load(), None, TUNED),
    ("load_pair crash_1", load(), None, {"instances": 2}),
    ("load_pair crash_1", instances(3), None, {"instances": 3}),
    ("load_pair crash_1", asking(load(), pinned=True), None, {"instances": 2, "pinned": True}),
    # The same version is that of the load before it in the queue.
    ("request_tuned", asking(load(), pinned=False), None, TUNED | {"pinned": False}),
    ("load request_v2", asking(load(2), pinned=True), None, {"pinned": True}),
    # Another version, and a model that is not loaded, have the model's own defaults.
    ("load_tuned", load(2), None, {}),
    ("load_tuned", asking(load(2), instances=2), None, {"instances": 2}),
    ("load_tuned request_v2", load(), None, {}),
    ("load_tuned request_unload", load(), None, {}),
    ("load_tuned request_unload request_cancel_U", load(), None, TUNED),
    ("request_tuned request_cancel_L", load(), None, {}),
    ("request_tuned start fail", load(), None, {}),
    ("", asking(load(), pinned=True), None, {"pinned": True}),
]


@pytest.mark.parametrize(("facts", "command", "load_id", "recorded_as"), PARAMETERS)
def test_load_records_what_it_names_and_what_stays(
    facts: str, command: RequestLoad, load_id: str | None, recorded_as: dict[str, Any]
) -> None:
    assert changed(facts, command) == (load_id, LoadParameters(**recorded_as))


@pytest.mark.parametrize(
    ("facts", "expected"), [("", "invalid_body"), ("load", "invalid_body"), ("load_tuned", NEW)]
)
def test_queue_delay_needs_batches_by_request_or_of_the_loaded_model(facts: str, expected: str) -> None:
    assert outcome(facts, asking(load(), max_queue_delay_us=5)) == expected


def changed(facts: str, command: RequestLoad) -> tuple[str | None, LoadParameters]:
    """Return the load whose settings the command changes, if that is all, and the recorded parameters."""
    decision = decide(given(facts).state, command)
    assert isinstance(decision, Accepted)
    requested, *rest = (data for draft in decision.drafts if not isinstance(data := draft.data, JobCancelled))
    assert isinstance(requested, LoadRequested)
    if not rest:
        return None, requested.parameters
    [change] = rest
    assert isinstance(change, ModelSettingsChanged)
    assert change == ModelSettingsChanged.of(change.load_job_id, requested.parameters)
    return change.load_job_id, requested.parameters


def test_order_of_files_does_not_matter() -> None:
    history = given("load")
    model = history.model()
    assert model.serving is not None
    files = tuple(structs.replace(model.serving.files[0], path=path) for path in "ba")
    assert model.chosen
    serving, chosen = (structs.replace(each, files=files) for each in (model.serving, model.chosen))
    history.state.models[MODEL] = structs.replace(model, serving=serving, chosen=chosen)
    contents = tuple((file.path, file.sha256) for file in files)
    assert outcome(history.state, load(contents=tuple(sorted(contents)))) == "L"


# Unloads and cancellations. Outcome: `new:X`, a job that ends the load X; the job that answers; or a code.

UNLOADS: list[tuple[str, str, str]] = [
    # facts, then: outcome, outcome with force
    ("", "not_loaded", "not_loaded"),
    ("load", "new:L", "new:L"),
    ("request", "not_loaded", "new:L"),
    ("request start", "not_loaded", "new:L"),
    ("request request_v2", "not_loaded", "new:L"),
    ("load request_v2 start_v2", "new:L2", "new:L"),
    ("load request_v2", "new:L2", "new:L"),
    ("load request_v2 request_again", "new:L3", "new:L"),
    ("load request_v2 request_drain start_drain", "new:L2", "new:L"),
    ("load request_v2 drain", "new:L2", "new:L2"),
    ("load request_v2 drain start_v2", "new:L2", "new:L2"),
    ("load request_v2 drain start_v2 fail_v2", "new:L", "new:L"),
    ("load load_v2", "new:L2", "new:L2"),
    ("load load_v2 request_drain start_drain", "new:L2", "new:L2"),
    ("load request_unload", "U", "new:L"),
    ("load request_unload start_unload", "U", "new:L"),
    ("load request_force", "F", "F"),
    ("load request_unload start_unload request_force", "F", "F"),
    ("request start request_force", "F", "F"),
    ("load request_unload start_unload request_again", "new:L3", "new:L"),
    ("load request_unload request_cancel_U", "new:L", "new:L"),
    ("load request_unload request_cancel_U start_unload", "U", "new:L"),
    ("load request_unload finish_unload", "not_loaded", "not_loaded"),
    ("request start fail", "not_loaded", "not_loaded"),
    ("load crash", "new:L", "new:L"),
    ("load restart", "new:L", "new:L"),
    ("load request_unload start_unload restart", "U", "new:L"),
    ("load_other", "not_loaded", "not_loaded"),
]
UNLOADS_OF_ACTIVE_MODEL: list[tuple[str, str, str]] = [
    ("", "nothing_loaded", "nothing_loaded"),
    ("load", "new:L", "new:L"),
    ("load_other load", "new:L", "new:L"),
    ("load load_other", "new:O", "new:O"),
    ("load_other load request_unload", "U", "new:L"),
    ("request start", "nothing_loaded", "new:L"),
    ("request_other request", "nothing_loaded", "new:O"),
    ("load request_other", "new:L", "new:L"),
    ("load restart", "nothing_loaded", "nothing_loaded"),
    ("load request_unload finish_unload", "nothing_loaded", "nothing_loaded"),
]
UNLOAD_CASES = [
    *((MODEL, *row) for row in UNLOADS),
    *((None, *row) for row in UNLOADS_OF_ACTIVE_MODEL),
    ("", "load", "not_loaded", "not_loaded"),  # an empty id is no active model
]


@pytest.mark.parametrize(("model_id", "facts", "gentle", "forced"), UNLOAD_CASES)
def test_unload_outcome(model_id: str | None, facts: str, gentle: str, forced: str) -> None:
    assert outcome(facts, unload(model_id)) == gentle
    assert outcome(facts, unload(model_id, force=True)) == forced


# Compare and append: what the system decided on facts, and what was recorded since.

SINCE: list[tuple[str, str, str, str]] = [
    # facts, what was recorded since, then: whether the model and whether its job L are unchanged
    ("load", "", "unchanged", "ended"),
    ("load crash", "", "unchanged", "ended"),
    ("load crash", "request_unload", "changed", "ended"),
    ("load crash", "request_again", "changed", "ended"),
    ("load crash", "request_again request_cancel_L3 cancel_L3", "unchanged", "ended"),  # as if nothing was
    ("load crash", "load_other", "unchanged", "ended"),
    ("load crash", "request_recovery", "changed", "ended"),
    ("load", "request_force", "changed", "ended"),
    ("request", "", "unchanged", "unchanged"),
    ("request", "start", "changed", "changed"),
    ("request", "request_cancel_L", "unchanged", "changed"),
    ("request", "request_v2", "changed", "unchanged"),
    ("request start", "request_force", "changed", "unchanged"),
    ("request start", "finish", "changed", "ended"),
    ("request start", "fail", "changed", "ended"),
    ("request start", "request_cancel_L", "unchanged", "changed"),
    ("request start", "crash", "unchanged", "unchanged"),  # of another load's worker
]


@pytest.mark.parametrize(("facts", "since", "model", "job"), SINCE)
def test_conditions_say_what_changed_since(facts: str, since: str, model: str, job: str) -> None:
    before, after = given(facts), given(f"{facts} {since}").state
    assert ModelUnchanged(before.model()).holds(after) is (model == "unchanged")
    position = before.job("L").position
    assert JobUnchanged("L", position).holds(after) is (job == "unchanged")


@pytest.mark.parametrize(
    ("facts", "load_id", "worker_id", "expected"),
    [
        ("load", "L", "w-L", True),
        ("load", "L", "unknown", False),
        ("load", "L2", "w-L", False),
        ("load crash", "L", "w-L", False),
        ("load request_unload", "L", "w-L", True),
        ("load request_unload start_unload", "L", "w-L", False),
        ("load_pair crash_1", "P", "P1", False),
        ("load_pair crash_1", "P", "P2", True),
        ("", "L", "w-L", False),
    ],
)
def test_worker_serves_until_it_is_recorded_as_gone(
    facts: str, load_id: str, worker_id: str, *, expected: bool
) -> None:
    assert WorkerServes(MODEL, load_id, worker_id).holds(given(facts).state) is expected


def test_command_on_changed_model_is_outdated() -> None:
    history = given("load crash")
    looked_at = (ModelUnchanged(history.model()),)
    reload = replace(load(cause=Cause.RECOVERY), conditions=looked_at)
    idle = RequestUnload(MODEL, "system", cause=Cause.IDLE, conditions=looked_at)
    fact = Record((Draft("e", LoadStarted(1), "system"),), looked_at)
    commands = (reload, idle, fact)
    assert [outcome(history.state, command) for command in commands[:2]] == [NEW, "new:L"]
    assert decide(history.state, fact) == Accepted(fact.drafts)
    history.ask_unload("U", "L")
    assert [outcome(history.state, command) for command in commands] == [OUTDATED] * 3


CANCELS: list[tuple[str, str, str]] = [
    # facts, the job to cancel, outcome: the job itself if it is being cancelled
    ("request", "L", "new"),
    ("request start", "L", "new"),
    ("request start restart", "L", "new"),
    ("load", "L", "already_finished"),
    ("request start fail", "L", "already_finished"),
    ("request cancel_L", "L", "already_finished"),
    ("request request_cancel_L", "L", "join L"),
    ("request request_cancel_L start", "L", "join L"),
    ("request start request_cancel_L restart", "L", "join L"),
    ("request start request_cancel_L finish", "L", "already_finished"),
    ("load request_unload", "U", "new"),
    ("load request_force", "F", "new"),
    ("load request_eviction", "U", "new"),
    ("load request_unload request_cancel_U", "U", "join U"),
    ("load request_unload start_unload", "U", "already_started"),
    ("load request_unload request_cancel_U start_unload", "U", "already_started"),
    ("load request_unload start_unload restart", "U", "already_started"),
    ("load request_unload restart", "U", "new"),
    ("load request_unload start_unload finish_unload", "U", "already_finished"),
    ("load load_v2 request_drain", "S", "already_started"),
    ("load load_v2 request_drain start_drain", "S", "already_started"),
    ("load", "X", "already_finished"),
]


@pytest.mark.parametrize(("facts", "job", "expected"), CANCELS)
def test_cancel_outcome(facts: str, job: str, expected: str) -> None:
    assert outcome(facts, RequestCancel(job, "bob")) == expected


VERSIONS: list[tuple[str, Command, str]] = [
    # facts, command, the type of the event or the code of the refusal
    ("", REMOVE, "VersionRemoved"),
    ("load", REMOVE, "version_in_use"),
    ("request", REMOVE, "version_in_use"),
    ("request start", REMOVE, "version_in_use"),
    ("load request_drain start_drain", REMOVE, "version_in_use"),
    ("load load_v2", REMOVE, "VersionRemoved"),
    ("load request_unload start_unload", REMOVE, "version_in_use"),
    ("load request_unload start_unload finish_unload", REMOVE, "VersionRemoved"),
    ("load", ADD, "VersionAdded"),
    # Other files than at another node are refused.
    ("add_at_a", replace(ADD, files=OTHER_FILES, holder="b"), "version_exists"),
    ("add_at_a", replace(ADD, files=SAME_FILES, holder="b"), "VersionAdded"),
    ("add_at_a", replace(ADD, files=OTHER_FILES), "VersionAdded"),
    ("add_at_a add_at_b", replace(ADD, files=OTHER_FILES, holder="b"), "version_exists"),
    ("add_at_b", replace(ADD, files=OTHER_FILES, holder="b"), "VersionAdded"),  # its folder was lost
    ("", replace(ADD, files=OTHER_FILES, holder="a"), "VersionAdded"),
    # What was decided in an epoch that is over.
    ("", replace(ADD, conditions=(NodeCurrent("a", 1),)), OUTDATED),
    ("", replace(REMOVE, conditions=(NodeCurrent("a", 1),)), OUTDATED),
]


@pytest.mark.parametrize(("facts", "command", "expected"), VERSIONS)
def test_version_is_added_or_removed_unless_in_use(facts: str, command: Command, expected: str) -> None:
    match decide(given(facts).state, command):
        case Accepted((draft,)):
            assert expected == draft.data.TYPE
        case Refused(code, message):
            assert code == expected
            assert code != "version_exists" or "other files at a:" in message
        case other:
            pytest.fail(f"{other}")


def test_removed_version_loads_once_it_is_added_again() -> None:
    history = given("load load_v2")
    history.add(VersionRemoved(), of=MODEL, version=1)
    history.add(VersionRemoved("not_placed"), of=MODEL, version=3)  # nothing was removed
    assert outcome(history.state, load(1)) == "unknown_version"
    assert history.versions().removed == (1,)
    history.add(VersionAdded(()), of=MODEL, version=1)
    assert outcome(history.state, load(1)) == NEW
    assert history.versions().removed == ()


def by(
    actor: str, command: RequestLoad | RequestUnload | RequestCancel, key: Idempotency | None = None
) -> Command:
    return replace(command, actor=actor, idempotency=key)


JOINS: list[tuple[str, Command, str]] = [
    # facts, in which alice requests and bob joins; command; outcome: a record of the join, or the job alone
    ("request", by("bob", load()), "join L"),
    ("request start", by("bob", load()), "join L"),
    ("load", by("bob", load()), "join L"),
    ("load", by("alice", load()), "L"),
    ("load join_L", by("bob", load()), "L"),
    ("load join_L", by("alice", load()), "L"),
    ("load join_L", by("carol", load()), "join L"),
    ("load join_L load_v2", by("bob", load(2)), "join L2"),
    ("load join_L request_again_pinned", by("bob", load()), "join L3"),
    ("request_demand start_demand finish_demand", by("alice", load()), "join D"),
    ("load restart restore", by("alice", load()), "join R"),
    ("load", by("alice", load(), KEY), "join L"),
    ("load join_L", by("bob", load(), KEY), "join L"),
    ("load", by("bob", load(cause=Cause.DEMAND)), "L"),
    ("load", by("bob", load(2, cause=Cause.DEMAND)), "L"),
    ("load request_unload", by("bob", unload()), "join U"),
    ("load request_unload", by("alice", unload()), "U"),
    ("load request_unload join_U", by("bob", unload(None)), "U"),
    ("load request_unload join_U", by("carol", unload(None)), "join U"),
    ("load request_unload", by("alice", unload(), KEY), "join U"),
    ("load request_unload join_U", by("bob", unload(force=True)), "new:L"),
    ("request request_cancel_L", by("bob", RequestCancel("L", "bob")), "join L"),
    ("request request_cancel_L", by("alice", RequestCancel("L", "bob")), "L"),
    ("request request_cancel_L", by("alice", RequestCancel("L", "bob"), KEY), "join L"),
]


@pytest.mark.parametrize(("facts", "command", "expected"), JOINS)
def test_who_joins_a_job_is_recorded_once(facts: str, command: Command, expected: str) -> None:
    assert outcome(facts, command) == expected


@pytest.mark.parametrize("facts", ["load join_L", "load request_unload join_U"])
def test_join_changes_neither_model_nor_job(facts: str) -> None:
    joined, before = given(facts).state, given(facts.rpartition(" ")[0]).state
    assert (joined.models, joined.jobs) == (before.models, before.jobs)


@pytest.mark.parametrize(
    ("facts", "command", "words"),
    [
        ("request", unload(), f"model '{MODEL}' is only loading; add ?force=true"),
        ("load", RequestCancel("L", "bob"), "job L has ended"),
        ("load request_unload start_unload", RequestCancel("U", "bob"), "unload U has started"),
        ("load request_in_place request_drain", RequestCancel("S", "bob"), "job S is part of a swap"),
    ],
)
def test_refusal_says_what_is_wrong(facts: str, command: Command, words: str) -> None:
    decision = decide(given(facts).state, command)
    assert isinstance(decision, Refused)
    assert words in decision.message


# What is recorded.

LOAD = RequestLoad(
    *(MODEL, 3, CONTENTS, "alice", LoadParameters("high", 10, 20, 30, "auto", pinned=True, instances=2)),
    *(Cause.DEMAND, "e7"),
    idempotency=KEY,
)
UNLOAD = RequestUnload(MODEL, "bob", True, Cause.EVICTION, cause_event_id="e9", idempotency=KEY)
SOURCE = Provenance("hf://org/repo@main", "hf://org/repo@1")
RECORDED: list[tuple[str, Any, Data, str | None, int]] = [
    # facts, command, what is recorded about which job and version
    ("", LOAD, LoadRequested.of(LOAD.parameters, Cause.DEMAND, cause_event_id="e7", idempotency=KEY), NEW, 3),
    ("load load_v2", UNLOAD, UnloadRequested(True, "L2", Cause.EVICTION, "e9", KEY), NEW, 2),
    ("request_v2", RequestCancel("L2", "bob", KEY), CancelRequested(KEY), "L2", 2),
    ("load", by("bob", load(), KEY), LoadJoined(KEY), "L", 1),
    ("load request_unload", by("bob", unload(), KEY), UnloadJoined(KEY), "U", 1),
    ("", replace(ADD, source=SOURCE, holder="a"), VersionAdded((), SOURCE, server="a"), None, 1),
    ("", ADD, VersionAdded(()), None, 1),
    ("", replace(REMOVE, holder="a"), VersionRemoved(server="a"), None, 1),
]


@pytest.mark.parametrize(("facts", "command", "data", "job", "version"), RECORDED)
def test_accepted_command_records_all_that_it_says(
    facts: str, command: Any, data: Data, job: str | None, version: int
) -> None:
    event_id = NEW if job is not None else "e"
    draft = Draft(event_id, data, command.actor, job, MODEL, version)
    is_join = isinstance(data, LoadJoined | UnloadJoined)
    assert decide(given(facts).state, command) == Accepted((draft,), job, is_join=is_join)


def test_records_are_accepted_unchanged() -> None:
    facts = (Draft("a", LoadStarted(1), "system"), Draft("b", LoadStarted(2), "system"))
    assert decide(State(), Record(facts)) == Accepted(facts)


# The queue's bound.


FULL: list[tuple[str, int, Command, str]] = [
    # facts, pending jobs of other models, command, outcome
    ("", MAX_QUEUE - 1, load(), NEW),
    *(("", MAX_QUEUE, load(cause=cause), "queue_full") for cause in (Cause.REQUEST, Cause.DEMAND)),
    *(("", MAX_QUEUE, load(cause=cause), NEW) for cause in {*Cause} - {Cause.REQUEST, Cause.DEMAND}),
    ("", MAX_QUEUE // 2 - 1, load(cause=Cause.DEMAND), NEW),
    ("", MAX_QUEUE // 2, load(cause=Cause.DEMAND), "queue_full"),
    ("", MAX_QUEUE, RequestLoad("model7", 1, CONTENTS, "alice"), "Q7"),
    ("", MAX_QUEUE, unload("model7", force=True), "new:Q7"),
    ("", MAX_QUEUE, RequestCancel("Q7", "alice"), NEW),
    ("load", MAX_QUEUE, asking(load(), pinned=True), "settings:L"),
    ("request fail", MAX_QUEUE - 1, load(), NEW),  # an ended job makes room
]


@pytest.mark.parametrize(("facts", "pending", "command", "expected"), FULL)
def test_full_queue_refuses_loads_by_people(
    facts: str, pending: int, command: Command, expected: str
) -> None:
    history = given(facts)
    for number in range(pending):
        history.ask_load(f"Q{number}", of=f"model{number}")
    assert MAX_QUEUE == 256
    assert outcome(history.state, command) == expected
    refused = decide(history.state, load())
    assert not isinstance(refused, Refused) or "256 jobs have not ended yet" in refused.message


# Any commands.

MODELS = st.sampled_from(["m", "n", ""])
COMMANDS = st.builds(
    RequestLoad,
    MODELS,
    st.integers(1, 2),
    st.sampled_from([CONTENTS, OTHERS, None]),
    st.just("alice"),
    cause=st.sampled_from(Cause),
) | st.builds(
    RequestUnload,
    MODELS | st.none(),
    st.just("alice"),
    st.booleans(),
    st.sampled_from([cause for cause in Cause if cause is not Cause.SWAP]),  # names its load, as a fact
)
CODES = {
    *("not_loaded", "nothing_loaded", "queue_full"),
    *("already_finished", "already_started", "idempotency_mismatch", OUTDATED),
}
KEYS = st.none() | st.builds(Idempotency, st.sampled_from("kl"), st.sampled_from("fg"))
CANCEL_COMMANDS = st.builds(
    RequestCancel, st.sampled_from(["job1", "job2", "job3", "a"]), st.just("alice"), KEYS
)
AUTOMATIC = st.builds(
    RequestUnload,
    MODELS,
    st.just("system"),
    cause=st.sampled_from([Cause.IDLE, Cause.EVICTION]),
    conditions=st.just((JobUnchanged("job1", 1),)),
)
KEYED = st.builds(lambda command, key: replace(command, idempotency=key), COMMANDS, KEYS)
RECORDS = drafts().map(lambda draft: Record((draft,)))


@FEWER
@given_any(st.lists(COMMANDS | KEYED | CANCEL_COMMANDS | AUTOMATIC | RECORDS, max_size=40))
def test_accept_names_existing_jobs_for_any_commands(commands: list[Command]) -> None:
    state, new_id = State(), ids("job")
    for command in commands:
        decision = accept(state, command, new_id, at(state.position))
        match decision:
            case Accepted(accepted):
                for draft in accepted:
                    position = state.position + 1
                    state.apply(record_draft(draft, position, at(position)))
            case Existing(job_id):
                serving = {model.serving.load_job_id for model in state.models.values() if model.serving}
                known = {key.job_id for key in state.keys.values()}
                assert job_id in {job.id for job in state.unended()} | serving | known
            case Refused(code, message):
                assert code in CODES
                assert message


@FEWER
@given_any(st.lists(drafts(), max_size=30), COMMANDS)
def test_repeated_command_is_one_job(facts: list[Draft], command: RequestLoad | RequestUnload) -> None:
    state = fold(facts).state
    ids = iter(["first", "of a superseded load"])
    first = accept(state, command, lambda: next(ids), at(99))
    expected: Decision = first
    if isinstance(first, Accepted):
        for draft in first.drafts:
            state.apply(record_draft(draft, state.position + 1, at(state.position + 1)))
        expected = Existing(first.job_id or "")
    assert accept(state, command, lambda: "second", at(99)) == expected
