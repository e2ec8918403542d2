"""How long it is known that no form is of use: a day where trials say so, for good where a load did."""

from pathlib import Path

import pytest
from support.forms import found
from support.prepared import LIMIT_BYTES

from runtime.prepared.entries import Entry, hash_of, is_open
from runtime.prepared.store import NONE_KNOWN_S, Made, PreparedStore
from runtime.wire import SourceHash, Tensor

KEY = "a" * 64
SECOND_NS = 10**9


class Clock:
    """A time that stands still until it is set."""

    def __init__(self) -> None:
        self.now_ns = 1_700_000_000 * SECOND_NS

    def __call__(self) -> int:
        return self.now_ns


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> PreparedStore:
    store = PreparedStore(tmp_path / "prepared", LIMIT_BYTES, now_ns=clock)
    store.open()
    return store


def known(store: PreparedStore) -> Entry:
    entry = store.find(KEY)
    assert entry is not None
    return entry


def keep(store: PreparedStore) -> None:
    draft = store.draft(KEY)
    (draft / "model.onnx").write_bytes(b"form")
    sources = (SourceHash("model.onnx", "b" * 64),)
    assert store.keep(KEY, draft, Made("optimised", found(draft), sources, "m", 1, 1)) is not None


def test_that_trials_found_nothing_of_use_is_known_for_a_day(store: PreparedStore, clock: Clock) -> None:
    store.settle_none(KEY, {"prepacked": "slower"}, model_id="m", version=1)
    clock.now_ns += NONE_KNOWN_S * SECOND_NS
    assert known(store).tried == {"prepacked": "slower"}
    clock.now_ns += SECOND_NS
    assert store.find(KEY) is None
    store.settle_none(KEY, {"prepacked": "slower again"}, model_id="m", version=1)
    assert known(store).tried == {"prepacked": "slower again"}


def test_a_form_is_kept_for_longer(store: PreparedStore, clock: Clock) -> None:
    keep(store)
    clock.now_ns += 1000 * NONE_KNOWN_S * SECOND_NS
    assert known(store).form == "optimised"


def test_a_form_that_a_load_could_do_nothing_with_is_not_made_again(
    store: PreparedStore, clock: Clock
) -> None:
    keep(store)
    assert store.drop(KEY, "killed by signal 11")
    clock.now_ns += 1000 * NONE_KNOWN_S * SECOND_NS
    assert known(store).tried == {"optimised": "killed by signal 11"}


def test_what_could_not_be_tried_is_open_again_with_other_inputs(store: PreparedStore) -> None:
    given = (Tensor("x", "FP32", (1,), b"[1]", text=True),)
    assert is_open(None, given)
    store.settle_none(KEY, {}, model_id="m", version=1, untried_on=hash_of(()))
    assert not is_open(known(store), ())
    assert is_open(known(store), given)
    store.settle_none(KEY, {}, model_id="m", version=1)
    assert not is_open(known(store), given)
