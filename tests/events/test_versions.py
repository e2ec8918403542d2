"""The fold of a model's versions. `support.history.STEPS` explains the words."""

from functools import partial

import msgspec
import pytest
from hypothesis import given as given_any
from msgspec import UNSET
from support.history import DIGEST, FEWER, MODEL, STEPS, History
from support.strategies import histories

from events.models import Model
from events.sqlite.queries import as_text
from events.types import AddedFile, VersionAdded, VersionRemoved
from events.versions import AddedVersion, ModelVersions

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
    verbs = {
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
