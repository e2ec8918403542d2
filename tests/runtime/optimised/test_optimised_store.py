"""Optimised models in a real folder: what it keeps, uses, evicts and clears."""

import json
import os
import random
import shutil
import stat
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fleet import new_dice, of_both, tell
from support.history import PLAIN, child
from support.ledgers import FAST_FOLDER
from support.optimised import (
    KEPT_LIMIT_BYTES,
    MODEL,
    change_store,
    check_store,
    check_whole,
    drop,
    files_of,
    halves,
    keep,
    key,
    manifest_of,
    opened,
    record,
    write,
)

from events.types import digest_of
from runtime.optimised.key import make_key
from runtime.optimised.store import STORE_PROBLEMS, USELESS_KNOWN_S, Manifest, OptimisedStore, Useless

A, B, C = map(key, "abc")
LIMIT = 1_000
SECOND_NS = 10**9


class Clock:
    """A time that stands still until it is set."""

    now_ns = 1_700_000_000 * SECOND_NS

    def __call__(self) -> int:
        return self.now_ns


def found(store: OptimisedStore, key: str) -> Manifest:
    entry = store.find(key)
    assert entry is not None
    return entry


def keys(store: OptimisedStore) -> list[str]:
    return [entry.key for entry in store.entries()]


# Keep and use


def test_kept_model_is_found_and_used(store: OptimisedStore, folder: Path) -> None:
    assert store.find(A) is None
    assert store.use(A) is None
    prepared = keep(store, "a", 100)
    assert prepared is not None
    assert prepared == store.use(A)
    assert (prepared.key, prepared.folder) == (A, str(folder / "forms" / A / "files"))
    assert prepared.bytes == 100
    check_whole(store, prepared)
    entry = found(store, A)
    assert (entry.key, entry.model_id, entry.version, entry.bytes) == (A, MODEL, 1, 100)
    assert (entry.reason, entry.sha256, entry.took_ms) == (None, prepared.sha256, 2_500)
    assert entry.figures == {"load_us": 1_000, "bare_load_us": 2_000}
    assert entry.made_at <= entry.used_at
    record(store, "b", model_id="b", version=2)
    again = opened(folder, LIMIT)
    assert again.use(A) == prepared
    assert again.entries() == [again.find(A), again.find(B)]
    paths = (folder, folder / "forms" / A, store.draft())
    assert [stat.S_IMODE(path.stat().st_mode) for path in paths] == [0o700] * 3


def test_hash_covers_files_in_order_of_their_paths(store: OptimisedStore) -> None:
    prepared = keep(store, "a")
    assert prepared is not None
    first, second = files_of(prepared)
    assert (first.path, second.path) == ("model.onnx", "weights.bin")
    text = f"{first.sha256} model.onnx\n{second.sha256} weights.bin\n".encode()
    ran = subprocess.run(["sha256sum"], input=text, capture_output=True, check=True)
    assert prepared.sha256 == ran.stdout.split()[0].decode()


def test_new_optimised_model_replaces_the_old_one(store: OptimisedStore, folder: Path) -> None:
    old = keep(store, "a", seed="old")
    with (folder / "forms" / A / "files" / "weights.bin").open("rb") as mapped:
        new = keep(store, "a", seed="new")
        assert mapped.read() == halves(10, "aold")["weights.bin"]  # a worker that has it open keeps it
    assert old is not None
    assert new is not None
    assert new.sha256 != old.sha256
    assert store.use(A) == new
    check_whole(store, new)
    assert os.listdir(folder / "forms") == [A]  # noqa: PTH208


# Useless


def test_reason_against_a_key_is_remembered(store: OptimisedStore, folder: Path) -> None:
    why = "killed by signal 11 \ud800 " + "x" * 10_000
    record(store, "a", why, model_id="m", version=3)
    for each in (store, opened(folder, LIMIT)):
        entry = found(each, A)
        assert (entry.sha256, entry.bytes) == (None, 0)
        assert (entry.model_id, entry.version, entry.took_ms) == ("m", 3, 2_500)
        assert (entry.reason or "").startswith("killed by signal 11 ? xxx")
        assert each.use(A) is None


def test_dropped_model_is_gone_and_its_reason_stays(store: OptimisedStore, folder: Path) -> None:
    used = keep(store, "a")
    assert used is not None
    assert store.drop(used, "it killed its worker")
    assert store.use(A) is None
    entry = found(opened(folder, LIMIT), A)
    assert (entry.sha256, entry.reason) == (None, "it killed its worker")
    assert list((folder / "forms" / A / "files").iterdir()) == []
    assert not store.drop(used, "again")
    store.clear()
    assert not store.drop(used, "its files are gone")
    assert store.find(A) is None
    new = keep(store, "a", seed="new")  # what replaced it is spared
    assert not store.drop(used, "its files are not what they were")
    assert store.use(A) == new


def test_model_larger_than_the_limit_is_useless(store: OptimisedStore, folder: Path) -> None:
    keep(store, "b", LIMIT)
    draft = write(store.draft(), halves(LIMIT + 1, "a"))
    with pytest.raises(Useless, match=f"it takes {LIMIT + 1} bytes, and .* may take {LIMIT}"):
        store.seal(manifest_of("a"), draft)
    store.discard(draft)
    assert store.find(A) is None
    assert store.use(B) is not None  # nothing was evicted for it
    assert list((folder / "incoming").iterdir()) == []


def test_reason_holds_for_a_day(folder: Path) -> None:
    clock = Clock()
    store = OptimisedStore(folder, LIMIT, now_ns=clock)
    store.open()
    record(store, "a")
    keep(store, "b")
    keep(store, "c")
    assert drop(store, "c", "killed by signal 11")
    clock.now_ns += USELESS_KNOWN_S * SECOND_NS
    assert found(store, A).reason == "slower"
    assert found(store, C).reason == "killed by signal 11"
    clock.now_ns += SECOND_NS
    assert (store.find(A), store.find(C)) == (None, None)
    record(store, "a", "slower again")
    assert found(store, A).reason == "slower again"
    clock.now_ns += 1000 * USELESS_KNOWN_S * SECOND_NS
    assert found(store, B).reason is None


# Eviction


def test_useless_entries_are_bounded_by_number(
    store: OptimisedStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.optimised.store.MAX_USELESS", 2)
    keep(store, "x", LIMIT)
    for name in "abc":
        record(store, name, model_id=name)
        store.use(A)
    assert set(keys(store)) == {key("x"), A, C}
    monkeypatch.setattr("runtime.optimised.store.MAX_USELESS", 1)
    assert set(keys(opened(folder, LIMIT))) == {key("x"), A}


def test_clock_set_back_keeps_the_order_of_use(folder: Path) -> None:
    times = iter([5 * 10**18, 5 * 10**18, *range(1000, 0, -1)])
    store = OptimisedStore(folder, LIMIT, now_ns=lambda: next(times))
    store.open()
    for name in "abcd":
        keep(store, name, 300)
    assert keys(store) == [key("d"), C, B]


NAMES = st.sampled_from("abcdef")
STEPS = st.one_of(
    st.tuples(st.just("keep"), NAMES, st.integers(1, 60) | st.integers(1, 150)),
    st.tuples(st.sampled_from(["settle", "use", "drop", "clear", "clear beside"]), NAMES, st.none()),
    st.tuples(st.just("open"), st.none(), st.integers(20, 120)),
)


class Expected:
    """The expected entries in order of use: the size of each, None for a useless one."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.sizes: dict[str, int | None] = {}

    def put(self, name: str, size: int | None) -> None:
        self.remove(name)
        self.sizes[name] = size
        self.evict()

    def use(self, name: str) -> int | None:
        if name in self.sizes:
            self.sizes[name] = self.sizes.pop(name)
        return self.sizes.get(name)

    def remove(self, name: str) -> None:
        self.sizes.pop(name, None)

    def open(self, limit: int) -> None:
        self.limit = limit
        self.evict()

    def evict(self) -> None:
        while sum(size or 0 for size in self.sizes.values()) > self.limit:
            self.remove(next(name for name, size in self.sizes.items() if size is not None))


@settings(PLAIN, max_examples=of_both(short=60, long=1_000))
@given(steps=st.lists(STEPS, max_size=25))
def test_entries_follow_a_list_in_order_of_use(
    steps: list[tuple[str, str | None, int | None]],
) -> None:
    expected = Expected(limit=100)
    with tempfile.TemporaryDirectory(dir=FAST_FOLDER) as scratch:
        folder = Path(scratch) / "prepared"
        store = opened(folder, expected.limit)
        for step in steps:
            match step:
                case "keep", str(name), int(size):
                    kept = keep(store, name, size, model_id=name)
                    assert (kept is not None) == (size <= expected.limit)
                    if kept is not None:
                        expected.put(name, size)
                        expected.use(name)
                case "settle", str(name), _:
                    record(store, name, model_id=name)
                    expected.put(name, None)
                case "use", str(name), _:
                    assert (store.use(key(name)) is not None) == (expected.use(name) is not None)
                case "drop", str(name), _:
                    has_form = expected.sizes.get(name) is not None
                    expected.use(name)
                    assert drop(store, name) == has_form
                    if has_form:
                        expected.put(name, None)
                case "clear" | "clear beside" as who, str(name), _:
                    (store if who == "clear" else OptimisedStore(folder, 0)).clear(name)
                    expected.remove(name)
                case "open", _, int(limit):
                    store = opened(folder, limit)
                    expected.open(limit)
            listed = [(entry.model_id, entry.bytes) for entry in store.entries()]
            assert listed == [(name, size or 0) for name, size in reversed(expected.sizes.items())]


# Clear


def test_clear_takes_all_or_one_model(store: OptimisedStore, folder: Path) -> None:
    keep(store, "a", 10, model_id="one")
    keep(store, "b", 20, model_id="two")
    record(store, "c", model_id="two")
    (folder / "forms" / key("d")).mkdir()
    assert store.clear("three") == (0, 0)
    assert store.clear("two") == (2, 20)
    assert keys(store) == [A]
    assert store.clear() == (2, 10)
    assert list(folder.glob("*/*")) == []
    assert store.clear() == (0, 0)


def test_clear_beside_a_server_spares_its_drafts(store: OptimisedStore, folder: Path) -> None:
    draft = write(store.draft(), halves(10, "a"))
    keep(store, "b")
    assert OptimisedStore(folder, 0).clear() == (1, 10)
    store.keep(store.seal(manifest_of("a"), draft)[0], draft)


def test_folder_removed_while_open_comes_back(store: OptimisedStore, folder: Path) -> None:
    keep(store, "a")
    shutil.rmtree(folder)
    assert (store.entries(), store.use(A), store.clear()) == ([], None, (0, 0))
    assert keep(store, "b") is not None
    draft = store.draft()
    shutil.rmtree(folder)
    with pytest.raises(STORE_PROBLEMS):
        store.seal(manifest_of("a"), draft)
    assert store.draft(1).is_dir()


# Threads, processes, and their deaths


def test_threads_and_another_process_share_the_cache(folder: Path) -> None:
    store, beside = opened(folder, KEPT_LIMIT_BYTES), OptimisedStore(folder, 0)

    def work(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(of_both(short=40, long=1_000)):
            change_store(store, dice, beside)

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(work, seed) for seed in range(4)]:
            done.result()
    check_store(store, folder)


def test_kill_while_keeping_leaves_nothing_wrong(folder: Path) -> None:
    lives, seed = of_both(short=40, long=5_000), new_dice().randrange(2**32)
    script = (
        "from pathlib import Path; from support.optimised import keep_and_be_killed; "
        "keep_and_be_killed(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))"
    )
    command = child(script, folder, lives, seed)
    done = subprocess.run(command, capture_output=True, text=True, timeout=1_200, check=False)
    assert done.returncode == 0, done.stderr
    tell(done.stdout)
    counts = json.loads(done.stdout)
    assert counts["lives"] == lives
    assert min(counts["drafts"], counts["models"]) > 0  # some were killed in the middle of it


def test_key_covers_names_and_contents_of_files() -> None:
    one, two = ("model.onnx", "ab" * 32), ("weights", "cd" * 32)
    versions = [[one, two], [one], [("other", one[1]), two], [(one[0], two[1]), two]]
    keys = [make_key(digest_of(files)) for files in versions]
    assert len(set(keys)) == len(keys)
    assert all(len(each) == 64 for each in keys)
