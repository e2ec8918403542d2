"""The fold of a model's versions and their labels, and what is decided on labels.

`support.history.STEPS` explains the words.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import msgspec
import pytest
from hypothesis import given as given_any
from msgspec import UNSET
from support.history import CONTENTS, DIGEST, FEWER, MODEL, STEPS, History, at, given
from support.strategies import histories

from events.accept import accept
from events.commands import Accepted, Command, Decision, Existing, Refused
from events.jobcommands import RequestLoad
from events.jobs import JobStatus
from events.models import Model
from events.sqlite.queries import as_text
from events.state import State
from events.types import (
    SYSTEM,
    AddedFile,
    Draft,
    LoadParameters,
    LoadRequested,
    ModelSettingsChanged,
    VersionAdded,
    VersionRemoved,
)
from events.versioncommands import RemoveVersion
from events.versions import AddedVersion, ModelVersions
from features.labels.commands import MAX_VERSION_LABELS, RemoveLabel, SetLabel, draft_label
from features.labels.conditions import LabelAllowed
from features.labels.facts import LabelRemoved, LabelSet
from features.labels.fold import LABEL_NAME, Label

HOLDERS = [
    # what happens to a version: it is added (+) to or removed (-) from a node's repository or the shared one,
    # or its place is taken (!); who has it then; whether it is removed
    ("+a", "a", False),
    ("+b +a +b", "a b", False),
    ("+a +b -a", "b", False),
    ("+a +b -a -b", "", True),
    ("+a -a +b", "b", False),
    ("+a -b", "a", False),
    ("-a", "", False),  # somebody had put it there
    ("+ -", "", True),
    ("+a -", "a", True),
    ("+a +", "", False),
    ("+ +a", "a", False),
    ("+a +b !a", "b", False),
    ("+a !a", "", False),
    ("+a load", "a", False),
    ("+a load request_unload start_unload finish_unload", "a", False),
]


@pytest.mark.parametrize(("words", "holders", "is_removed"), HOLDERS)
def test_version_has_holders_from_adds_to_own_repositories(
    words: str, holders: str, *, is_removed: bool
) -> None:
    history = History()
    history.add_version("c", version=2)
    verbs: dict[str, Callable[..., None]] = {
        "+": history.add_version,
        "-": history.remove_version,
        "!": partial(history.remove_version, reason="not_placed"),
    }
    for word in words.split():
        if word[0] in verbs:
            verbs[word[0]](word[1:] or UNSET)
        else:
            STEPS[word](history)
    versions = history.versions()
    assert " ".join(versions.find_holders(1).servers) == holders
    assert (1 in versions.removed) == is_removed
    assert versions.find_holders(2).servers == ("c",)


def added(*versions: tuple[int, str, str]) -> History:
    """Return a model with versions: each with its number, the digest of its only file, and who added it."""
    history = History()
    for version, sha256, actor in versions:
        files = (AddedFile("model.onnx", 1, sha256 * 32),)
        history.add(VersionAdded(files), of=MODEL, version=version, by=actor)
    return history


def test_each_adder_of_bytes_is_remembered_after_a_removal() -> None:
    history = added((1, "ab", "alice"), (2, "cd", "alice"), (1, "ab", "bob"), (1, "ab", "alice"))
    history.add(VersionRemoved(), of=MODEL, version=1)
    versions = history.versions()
    assert [(each.version, each.by, each.position) for each in versions.added] == [
        (2, "alice", 2),
        (1, "bob", 3),
        (1, "alice", 4),
    ]
    assert versions.find_added(1) == AddedVersion(1, DIGEST, "alice", 4)
    assert versions.find_added(3) is None


@FEWER
@given_any(histories())
def test_stored_versions_are_the_folded_ones(history: History) -> None:
    for versions in history.state.registers.versions.values():
        assert msgspec.json.decode(as_text(versions), type=ModelVersions) == versions


def test_versions_change_no_model() -> None:
    history = added((1, "ab", "alice"))
    history.set_label("champion")
    assert history.state.models == {}
    assert history.model() == Model(MODEL)


# Labels.

FOLDED = [
    # what was recorded, the versions that the labels name
    ("label", {"champion": 1}),
    ("label label_v2", {"champion": 2}),
    ("label unlabel", {}),
    ("unlabel", {}),
    ("load label", {"champion": 1}),
    ("load label request_unload start_unload finish_unload", {"champion": 1}),
    ("load label load_v2", {"champion": 1}),
    ("load label restart", {"champion": 1}),
    ("label request_labelled_v2 start_v2 fail_v2", {"champion": 1}),
    ("request_labelled start finish", {}),  # `LabelSet` is an event of its own
]


@pytest.mark.parametrize(("facts", "labels"), FOLDED)
def test_label_names_version_until_it_moves(facts: str, labels: dict[str, int]) -> None:
    assert {each.name: each.version for each in given(facts).versions().labels} == labels


def test_labels_are_in_order_of_their_names() -> None:
    history = History()
    for version, name in enumerate(("b", "a", "b"), 1):
        history.set_label(name, version=version)
    assert history.versions().labels == (Label("a", 2, 2), Label("b", 3, 3))


def decide(facts: str | State, command: Command) -> Decision:
    new_ids = iter(("new", "new2", "new3"))
    state = given(facts).state if isinstance(facts, str) else facts
    return accept(state, command, lambda: next(new_ids), at(9_999))


def load(version: int = 1, label: str = "champion") -> RequestLoad:
    return RequestLoad(MODEL, version, CONTENTS, "bob", version_name=label)


PINNED = replace(load(), parameters=LoadParameters(pinned=True), asked=frozenset({"pinned"}))
SET, SET_V2 = SetLabel(MODEL, "champion", 1, "bob"), SetLabel(MODEL, "champion", 2, "bob")
REMOVE = RemoveLabel(MODEL, "champion", "bob")

DECISIONS: list[tuple[str, Command, str]] = [
    # what was recorded, the command, what is appended or the job that answers or the code of a refusal
    ("", SET, "LabelSet 1"),
    ("load", SET_V2, "LabelSet 2"),
    ("label", SET, "nothing"),
    ("label", SET_V2, "LabelSet 2"),
    ("", REMOVE, "unknown_label"),
    ("label", REMOVE, "LabelRemoved 1"),
    ("label unlabel", REMOVE, "unknown_label"),
    ("label", RemoveVersion(MODEL, 1, "bob", "e"), "version_in_use"),
    ("label", RemoveVersion(MODEL, 2, "bob", "e"), "VersionRemoved 2"),
    ("label label_v2", RemoveVersion(MODEL, 1, "bob", "e"), "VersionRemoved 1"),
    ("label unlabel", RemoveVersion(MODEL, 1, "bob", "e"), "VersionRemoved 1"),
    # Loads with a label: a job with another label, or with none, is not joined.
    ("", load(), "LoadRequested 1"),
    ("request_labelled", load(), "LoadJoined 1"),
    ("request_labelled", load(label="other"), "LoadRequested 1"),
    ("request_labelled", replace(load(), version_name=UNSET), "LoadJoined 1"),
    ("request", load(), "LoadRequested 1"),
    ("load request_labelled_v2", load(2), "LoadJoined 2"),
    # The version serves: the label moves at once, and a label that is there changes nothing.
    ("load", load(), "LoadRequested 1, ModelSettingsChanged 1, LabelSet 1"),
    ("load label_v2", load(), "LoadRequested 1, ModelSettingsChanged 1, LabelSet 1"),
    ("load label", load(), "LoadJoined 1"),
    ("load label", PINNED, "LoadRequested 1, ModelSettingsChanged 1"),
    ("load", PINNED, "LoadRequested 1, ModelSettingsChanged 1, LabelSet 1"),
    ("load label", load(2), "LoadRequested 2"),
    ("load request_v2", load(2), "LoadRequested 2"),
]


def describe(decision: Decision) -> str:
    match decision:
        case Accepted(drafts):
            return ", ".join(f"{draft.data.TYPE} {draft.version}" for draft in drafts)
        case Existing(job):
            return job or "nothing"
        case Refused(code):
            return code


@pytest.mark.parametrize(("facts", "command", "expected"), DECISIONS)
def test_label_command_appends_what_is_new(facts: str, command: Command, expected: str) -> None:
    assert describe(decide(facts, command)) == expected


def test_label_moves_with_outcome_of_load_of_what_serves() -> None:
    history, decision = given("load"), decide("load", load())
    assert isinstance(decision, Accepted)
    request, outcome, label = decision.drafts
    assert isinstance(request.data, LoadRequested)
    assert (request.id, request.actor, request.data.version_name) == ("new", "bob", "champion")
    assert (type(outcome.data), outcome.actor) == (ModelSettingsChanged, SYSTEM)
    assert label == Draft(label.id, LabelSet("champion", outcome.id), "bob", "new", MODEL, 1)
    for draft in decision.drafts:
        history.add(draft.data, draft.job_id, event_id=draft.id, by=draft.actor)
    assert history.versions().labels == (Label("champion", 1, history.state.position),)
    assert history.job("new").status is JobStatus.COMPLETED


def test_label_of_loaded_version_is_set_by_who_asked() -> None:
    outcome = Draft("loaded", LabelRemoved("x"), SYSTEM, "L", MODEL, 2, "w")
    moved = draft_label(outcome, "champion", "bob", lambda: "id")
    assert moved == Draft("id", LabelSet("champion", "loaded"), "bob", "L", MODEL, 2)


def test_label_of_removed_version_is_refused() -> None:
    history = given("load load_v2")
    history.remove_version()
    assert describe(decide(history.state, SET)) == "unknown_version"


def test_labels_beyond_limit_are_refused() -> None:
    history = History()
    for number in range(MAX_VERSION_LABELS - 1):
        history.set_label(f"label{number}")
    history.ask_load("L", version_name="champion")  # it will set the last one
    limited = replace(load(2, label="other"), conditions=(LabelAllowed(MODEL, "other"),))
    others = SetLabel(MODEL, "other", 1, "bob"), limited
    assert [describe(decide(history.state, each)) for each in others] == ["too_many_labels"] * 2
    assert describe(decide(history.state, SET)) == "LabelSet 1"
    assert describe(decide(history.state, SetLabel(MODEL, "label0", 2, "bob"))) == "LabelSet 2"


def test_refused_removal_names_labels_and_what_to_do() -> None:
    history = given("label")
    history.set_label("stable")
    refused = decide(history.state, RemoveVersion(MODEL, 1, "bob", "e"))
    assert isinstance(refused, Refused)
    assert refused.message.endswith("by the label 'champion', 'stable': move or remove that first")


NAMES = ["champion", "A", "v1", "a.b-c_d", "a" * 63]
NO_NAMES = ["", "1", "1a", "-a", ".", "..", "a/b", "a b", "a\n", "ä", "a" * 64, "a%2f"]


def test_label_begins_with_a_letter() -> None:
    assert [name for name in [*NAMES, *NO_NAMES] if LABEL_NAME.fullmatch(name)] == NAMES
