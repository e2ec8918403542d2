"""The store of prepared forms, on a real folder: what is kept, used, evicted, and left by the killed."""

import os
import random
import resource
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.events import PLAIN, child
from support.keptforms import MODEL, check_whole, halves, keep, key, made, written
from support.soak import new_dice, of_both, tell

from runtime.prepared.files import hashes_of
from runtime.prepared.leastused import Use, Uses
from runtime.prepared.store import Cleared, PreparedStore, PreparedUnavailable, key_of
from runtime.wire import LoadedFile, SourceHash

A, B, C = map(key, "abc")
LIMIT = 1_000


def opened(folder: Path, limit_bytes: int = LIMIT) -> PreparedStore:
    store = PreparedStore(folder, limit_bytes)
    store.open()
    return store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "prepared"


@pytest.fixture
def store(folder: Path) -> PreparedStore:
    return opened(folder)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Have the file system refuse to write more than this into a file of ours: EFBIG, for ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def drafts(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith("draft-")]


# What is kept


def test_a_form_that_was_kept_is_found_and_used(store: PreparedStore, folder: Path) -> None:
    assert store.find(A) is None
    assert store.use(A) is None
    prepared = keep(store, "a", 100)
    assert prepared is not None
    assert prepared == store.use(A)
    assert (prepared.folder, prepared.form) == (str(folder / A), "prepacked")
    assert prepared.sources == (SourceHash("model.onnx", "ab" * 32),)
    check_whole(prepared)
    entry = store.find(A)
    assert entry is not None
    assert (entry.key, entry.model_id, entry.version, entry.bytes) == (A, MODEL, 1, 100)
    assert (entry.form, entry.sha256, entry.took_ms) == ("prepacked", prepared.sha256, 2_500)
    assert entry.figures == {"loading_us": 1_000, "ratio": 0.5, "tolerance": "bit-equal"}
    assert entry.made_at <= entry.used_at
    assert store.entries() == [entry]


def test_the_hash_of_a_form_is_of_its_files_in_order_of_their_paths(store: PreparedStore) -> None:
    prepared = keep(store, "a")
    assert prepared is not None
    first, second = prepared.files
    assert (first.path, second.path) == ("model.onnx", "weights.bin")
    by_hand = subprocess.run(
        ["sha256sum"], input=f"{first.sha256} model.onnx\n{second.sha256} weights.bin\n".encode(),
        capture_output=True, check=True,
    ).stdout.split()[0]  # fmt: skip
    assert prepared.sha256 == by_hand.decode()


def test_what_is_kept_is_nobody_else_s_to_read(store: PreparedStore, folder: Path) -> None:
    keep(store, "a")
    draft = store.draft(B)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / A, draft)] == [0o700] * 3


def test_a_store_that_is_opened_again_has_what_was_kept(store: PreparedStore, folder: Path) -> None:
    prepared = keep(store, "a")
    store.settle_none(B, {"prepacked": "slower"}, model_id="b", version=2)
    again = opened(folder)
    assert again.use(A) == prepared
    assert again.entries() == [again.find(A), again.find(B)]


def test_a_form_takes_the_place_of_what_was_there(store: PreparedStore, folder: Path) -> None:
    old = keep(store, "a", seed="old")
    assert old is not None
    with (Path(old.folder) / "weights.bin").open("rb") as mapped:
        new = keep(store, "a", seed="new")
        assert mapped.read() == halves(10, "aold")["weights.bin"]  # who has it open keeps it
    assert new is not None
    assert new.sha256 != old.sha256
    assert store.use(A) == new
    check_whole(new)
    assert os.listdir(folder) == [A]  # noqa: PTH208


def test_what_else_lies_in_a_draft_is_not_kept(store: PreparedStore, tmp_path: Path) -> None:
    draft = store.draft(A)
    (draft / "log").mkdir()
    (draft / "log" / "deep").write_bytes(b"x" * 10_000)
    (draft / "manifest.json").mkdir()
    (tmp_path / "elsewhere").write_text("stays")
    (draft / "link").symlink_to(tmp_path / "elsewhere")
    prepared = store.keep(A, draft, made(written(draft, halves(10, "a"))))
    assert prepared is not None
    check_whole(prepared)
    assert (tmp_path / "elsewhere").read_text() == "stays"


def test_files_that_are_not_those_that_were_made_are_of_no_use(store: PreparedStore, folder: Path) -> None:
    def changed(draft: Path) -> tuple[LoadedFile, ...]:
        files = written(draft, halves(10, "a"))
        (draft / "weights.bin").write_bytes(b"other")
        return files

    def renamed(draft: Path, path: str) -> tuple[LoadedFile, ...]:
        return tuple(msgspec.structs.replace(file, path=path) for file in written(draft, halves(10, "a"))[:1])

    def linked(draft: Path) -> tuple[LoadedFile, ...]:
        files = written(draft, halves(10, "a"))
        (draft / "weights.bin").rename(folder / "elsewhere")
        (draft / "weights.bin").symlink_to(folder / "elsewhere")
        return files

    wrong: list[Callable[[Path], tuple[LoadedFile, ...]]] = [
        changed,
        linked,
        lambda _: (),
        lambda draft: written(draft, halves(10, "a")) * 2,
        *(
            lambda draft, path=path: renamed(draft, path)
            for path in ("../elsewhere", "/etc/passwd", "a/b", "", ".", "..", "manifest.json", "a\0b", "gone")
        ),
    ]
    for make in wrong:
        draft = store.draft(A)
        assert store.keep(A, draft, made(make(draft))) is None
        entry = store.find(A)
        assert entry is not None
        assert (entry.form, entry.tried) == (
            None,
            {"prepacked": "its files are not those that the worker wrote"},
        )
        assert not drafts(folder)


# What is of no use


def test_it_is_remembered_that_no_form_is_of_use_and_why(store: PreparedStore, folder: Path) -> None:
    why = "killed by signal 11 \ud800 " + "x" * 10_000
    store.settle_none(A, {"prepacked": why, "optimised": "slower"}, model_id="m", version=3, took_ms=9)
    for each in (store, opened(folder)):
        entry = each.find(A)
        assert entry is not None
        assert (entry.form, entry.sha256, entry.bytes) == (None, None, 0)
        assert (entry.model_id, entry.version, entry.took_ms) == ("m", 3, 9)
        assert entry.tried["prepacked"].startswith("killed by signal 11 ? xxx")
        assert entry.tried["optimised"] == "slower"
        assert each.use(A) is None


def test_a_form_that_is_dropped_is_gone_and_its_reason_stays(store: PreparedStore, folder: Path) -> None:
    used = keep(store, "a", form="optimised")
    assert store.drop(A, "it killed its worker", used)
    assert store.use(A) is None
    entry = opened(folder).find(A)
    assert entry is not None
    assert entry.form is None
    assert entry.tried == {
        "prepacked": "the worker ended: signal 11",
        "optimised": "it killed its worker",
    }
    assert os.listdir(folder / A) == ["manifest.json"]  # noqa: PTH208
    assert not store.drop(A, "again", used)


def test_what_was_evicted_or_made_anew_meanwhile_is_not_to_blame(store: PreparedStore) -> None:
    used = keep(store, "a")
    store.clear()
    assert not store.drop(A, "its files are gone", used)
    assert store.find(A) is None
    new = keep(store, "a")
    assert not store.drop(A, "its files are not what they were", used)
    assert store.use(A) == new


def test_what_is_larger_than_all_may_be_is_left_out_until_it_is_not(
    store: PreparedStore, folder: Path
) -> None:
    keep(store, "b", LIMIT)
    assert keep(store, "a", LIMIT + 1) is None
    entry = store.find(A)
    assert entry is not None
    assert entry.form is None
    assert entry.tried == {
        "prepacked": f"it takes {LIMIT + 1} bytes, and all forms together may take {LIMIT}"
    }
    assert store.use(B) is not None  # nothing had to go for it
    assert opened(folder, LIMIT).find(A) is not None
    assert opened(folder, LIMIT + 1).find(A) is None


# What goes


def test_the_least_recently_used_goes_for_what_is_new(store: PreparedStore, folder: Path) -> None:
    for name in "abc":
        keep(store, name, 300)
    assert store.use(A) is not None
    keep(store, "d", 300)
    assert [entry.key for entry in store.entries()] == [key("d"), A, C]
    assert not drafts(folder)


def test_a_smaller_limit_holds_from_the_next_start(store: PreparedStore, folder: Path) -> None:
    for name in "abc":
        keep(store, name, 300)
    store.use(A)
    assert [entry.key for entry in opened(folder, 600).entries()] == [A, C]


def test_keys_without_a_form_are_bounded_by_their_number(folder: Path) -> None:
    store = PreparedStore(folder, LIMIT, max_without_form=2)
    store.open()
    keep(store, "x", LIMIT)
    for name in "abc":
        store.settle_none(key(name), {}, model_id=name, version=1)
        store.use(A)
    assert {entry.key for entry in store.entries()} == {key("x"), A, C}
    again = PreparedStore(folder, LIMIT, max_without_form=1)
    again.open()
    assert {entry.key for entry in again.entries()} == {key("x"), A}


def test_a_clock_that_is_set_back_does_not_change_what_was_used_last(folder: Path) -> None:
    times = iter([5 * 10**18, *range(100, 0, -1)])
    store = PreparedStore(folder, LIMIT, now_ns=lambda: next(times))
    store.open()
    for name in "abcd":
        keep(store, name, 300)
    assert [entry.model_id for entry in store.entries()] == [MODEL] * 3
    assert [entry.key for entry in store.entries()] == [key("d"), C, B]


NAMES = st.sampled_from("abcdef")
STEPS = st.one_of(
    st.tuples(st.just("keep"), NAMES, st.integers(1, 60) | st.integers(1, 150)),
    st.tuples(st.sampled_from(["settle", "use", "drop", "clear", "clear beside"]), NAMES, st.none()),
    st.tuples(st.just("open"), st.none(), st.integers(20, 120)),
)


class Expected:
    """What should be there, in order of use: the size of each form, None for no form."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.sizes: dict[str, int | None] = {}
        self.too_large: dict[str, int] = {}

    def put(self, name: str, size: int | None) -> None:
        self.remove(name)
        if size is not None and size > self.limit:
            self.too_large[name], size = size, None
        self.sizes[name] = size
        self.evict()

    def use(self, name: str) -> int | None:
        if name in self.sizes:
            self.sizes[name] = self.sizes.pop(name)
        return self.sizes.get(name)

    def remove(self, name: str) -> None:
        self.sizes.pop(name, None)
        self.too_large.pop(name, None)

    def open(self, limit: int) -> None:
        self.limit = limit
        for name in [each for each, size in self.too_large.items() if size <= limit]:
            self.remove(name)
        self.evict()

    def evict(self) -> None:
        while sum(size or 0 for size in self.sizes.values()) > self.limit:
            self.remove(next(name for name, size in self.sizes.items() if size is not None))


@settings(PLAIN, max_examples=of_both(short=60, long=1_000))
@given(steps=st.lists(STEPS, max_size=25))
def test_what_is_there_is_what_a_list_in_order_of_use_says(
    steps: list[tuple[str, str | None, int | None]],
) -> None:
    expected = Expected(limit=100)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "prepared"
        store = opened(folder, expected.limit)
        for step in steps:
            match step:
                case "keep", str(name), int(size):
                    keep(store, name, size, model_id=name)
                    expected.put(name, size)
                case "settle", str(name), _:
                    store.settle_none(key(name), {}, model_id=name, version=1)
                    expected.put(name, None)
                case "use", str(name), _:
                    assert (store.use(key(name)) is not None) == (expected.use(name) is not None)
                case "drop", str(name), _:
                    has_form = expected.sizes.get(name) is not None
                    assert store.drop(key(name), "bad") == has_form
                    if has_form:
                        expected.put(name, None)
                case "clear" | "clear beside" as who, str(name), _:
                    (store if who == "clear" else PreparedStore(folder, 0)).clear(name)
                    expected.remove(name)
                case "open", _, int(limit):
                    store = opened(folder, limit)
                    expected.open(limit)
            found = [(entry.model_id, entry.bytes) for entry in store.entries()]
            assert found == [(name, size or 0) for name, size in reversed(expected.sizes.items())]


@PLAIN
@given(
    limit=st.integers(0, 50),
    most=st.integers(0, 3),
    uses=st.lists(st.tuples(st.integers(0, 8), st.none() | st.integers(0, 60)), max_size=40),
)
def test_no_more_goes_than_has_to_and_the_oldest_first(
    limit: int, most: int, uses: list[tuple[int, int | None]]
) -> None:
    least, expected = Uses(limit, most), dict[str, int | None]()
    for number, size in uses:
        name = str(number)
        least.use(name, size, 0)
        expected.pop(name, None)
        expected[name] = size
        for gone in least.next_to_go():
            least.forget(gone)
        forms = [each for each, taken in expected.items() if taken is not None]
        bare = [each for each, taken in expected.items() if taken is None]
        while sum(taken or 0 for taken in expected.values()) > limit:
            del expected[forms.pop(0)]
        for each in bare[: max(0, len(bare) - most)]:
            del expected[each]
        assert sorted(least) == sorted(expected)
        assert not least.are_too_many()


def test_of_what_was_used_at_the_same_time_the_first_key_goes() -> None:
    least = Uses(limit_bytes=1, max_without_form=0)
    least.put("b", Use(7, 1))
    least.put("a", Use(7, 1))
    assert next(least.next_to_go()) == "a"


# What is not what it was


def test_a_file_with_another_identity_is_trusted_again_when_its_content_is_the_same(
    store: PreparedStore, folder: Path, tmp_path: Path
) -> None:
    before = keep(store, "a")
    assert before is not None
    moved = shutil.copytree(folder, tmp_path / "restored" / "prepared")
    after = opened(moved).use(A)
    assert after is not None
    assert (after.sha256, after.folder) == (before.sha256, str(moved / A))
    assert {file.inode for file in after.files}.isdisjoint(file.inode for file in before.files)
    check_whole(after)
    (moved / A / "weights.bin").rename(tmp_path / "away")  # what was written then is believed from then on
    (tmp_path / "away").rename(moved / A / "weights.bin")
    assert PreparedStore(moved, LIMIT).use(A) is not None


@pytest.mark.parametrize("change", ["same size", "other size", "gone", "link", "folder", "FIFO"])
def test_a_form_whose_content_is_another_is_as_if_it_were_not_there(
    store: PreparedStore, folder: Path, tmp_path: Path, change: str
) -> None:
    keep(store, "a", 64)
    file = folder / A / "weights.bin"
    content = file.read_bytes()
    file.unlink()
    match change:
        case "same size":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "other size":
            file.write_bytes(content + b"x")
        case "link":
            (tmp_path / "elsewhere").write_bytes(content)
            file.symlink_to(tmp_path / "elsewhere")
        case "folder":
            file.mkdir()
        case "FIFO":
            os.mkfifo(file)
    assert store.use(A) is None
    assert opened(folder).find(A) is None
    assert not (folder / A).exists()
    assert keep(store, "a", 64) is not None


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"null", b"[]", b"\xff\xfe", b"{}" * 9, b"[" * 100_000, b'{"layout": 1}',
        b'{"layout": 1, "key": 1}',
    ],
    ids=["empty", "cut", "null", "list", "not-text", "twice", "deep", "partial", "wrong-type"],
)  # fmt: skip
def test_a_manifest_that_says_nothing_is_none(store: PreparedStore, folder: Path, text: bytes) -> None:
    keep(store, "a")
    keep(store, "b")
    (folder / A / "manifest.json").write_bytes(text)
    assert store.find(A) is None
    assert store.use(A) is None
    assert not store.drop(A, "bad")
    assert [entry.key for entry in store.entries()] == [B]
    store.open()
    assert os.listdir(folder) == [B]  # noqa: PTH208


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layout", 2), ("key", B), ("form", "other"), ("form", None), ("sha256", "ab" * 32), ("sha256", None),
        ("files", []), ("took_ms", -1), ("version", 2**70), ("model_id", 7), ("new", 1), ("figures", [1]),
        ("tried", {"best": "?"}), ("path", "../model.onnx"), ("path", "manifest.json"), ("bytes", 2**63),
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_that_says_what_cannot_be_is_none(
    store: PreparedStore, folder: Path, field: str, value: object
) -> None:
    keep(store, "a")
    file = folder / A / "manifest.json"
    told = msgspec.json.decode(file.read_bytes())
    (told["files"][0] if field in {"path", "bytes"} else told)[field] = value
    file.write_bytes(msgspec.json.encode(told))
    assert store.find(A) is None
    assert store.use(A) is None
    assert store.entries() == []


@PLAIN
@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_any_byte_of_a_manifest_may_be_wrong(position: int, byte: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        store = opened(Path(scratch) / "prepared")
        before = keep(store, "a")
        file = Path(scratch) / "prepared" / A / "manifest.json"
        text = bytearray(file.read_bytes())
        text[position % len(text)] = byte
        file.write_bytes(text)
        store.find(A)
        used = store.use(A)
        assert used is None or (before is not None and used.sha256 == before.sha256)
        store.entries()
        store.open()


def test_a_time_that_no_date_has_is_told_as_another(store: PreparedStore, folder: Path) -> None:
    keep(store, "a")
    for time_ns in (-(10**18), 2**62):
        os.utime(folder / A / "manifest.json", ns=(time_ns, time_ns))
        assert len(store.entries()) == 1
        store.open()


# What the folder is


def test_what_a_dead_server_left_is_removed_and_what_is_not_ours_stays(
    store: PreparedStore, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep(store, "a")
    for name in (f"draft-{'0' * 16}-{'1' * 8}", B):
        (folder / name).mkdir()
        (folder / name / "weights.bin").write_bytes(b"x")
    (folder / C).symlink_to(folder / A)
    (folder / key("file")).write_text("no folder")
    for name in ("lost+found", "draft-1", B[:-1], B.upper()):
        (folder / name).mkdir()
    opened(folder)
    assert {path.name for path in folder.iterdir()} == {A, "lost+found", "draft-1", B[:-1], B.upper()}
    assert "'lost+found'" in caplog.text
    assert opened(folder).use(A) is not None


def test_a_store_that_is_opened_again_leaves_its_own_drafts_alone(store: PreparedStore) -> None:
    draft = store.draft(A)
    files = written(draft, halves(10, "a"))
    store.open()
    assert store.keep(A, draft, made(files)) is not None


@pytest.mark.parametrize("kind", ["link", "broken link", "file", "writable"])
def test_a_folder_that_others_may_have_filled_is_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    match kind:
        case "link":
            (elsewhere / A).mkdir(parents=True)
            folder.symlink_to(elsewhere)
        case "broken link":
            folder.symlink_to(elsewhere)
        case "file":
            folder.write_text("mine")
        case "writable":
            folder.mkdir()
            folder.chmod(0o777)
    store = PreparedStore(folder, LIMIT)
    with pytest.raises(PreparedUnavailable, match=str(folder)):
        store.open()
    with pytest.raises(PreparedUnavailable, match=str(folder)):
        store.draft(A)
    with pytest.raises(PreparedUnavailable, match=str(folder)):
        store.settle_none(A, {}, model_id="m", version=1)
    assert store.use(A) is None
    assert kind != "link" or (elsewhere / A).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(store: PreparedStore, folder: Path) -> None:
    os.chown(folder, 12_345, -1)
    with pytest.raises(PreparedUnavailable, match="user 12345"):
        store.open()


def test_what_a_group_could_write_is_made_anew(store: PreparedStore, folder: Path) -> None:
    keep(store, "a")
    folder.chmod(0o755)
    opened(folder)
    assert store.use(A) is not None  # who could only read has changed nothing
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o2770)
    assert opened(folder).entries() == []
    assert stat.S_IMODE(folder.stat().st_mode) & 0o777 == 0o700


def test_a_folder_that_goes_while_the_store_is_open_comes_back(store: PreparedStore, folder: Path) -> None:
    keep(store, "a")
    shutil.rmtree(folder)
    assert store.entries() == []
    assert store.use(A) is None
    assert store.clear() == Cleared(0, 0)
    assert keep(store, "b") is not None
    draft = store.draft(A)
    files = written(draft, halves(10, "a"))
    shutil.rmtree(folder)
    with pytest.raises(PreparedUnavailable, match="gone"):
        store.keep(A, draft, made(files))


# What the file system refuses


def test_a_full_disk_makes_it_unavailable_and_leaves_what_was_there(
    store: PreparedStore, folder: Path
) -> None:
    old = keep(store, "a", seed="old")
    draft = store.draft(A)
    files = written(draft, halves(10, "new"))
    with file_size_limit(100), pytest.raises(PreparedUnavailable, match="cannot be kept in"):
        store.keep(A, draft, made(files))
    with file_size_limit(100), pytest.raises(PreparedUnavailable):
        store.settle_none(B, {}, model_id="b", version=1)
    with file_size_limit(100), pytest.raises(PreparedUnavailable):
        store.drop(A, "bad")
    assert os.listdir(folder) == [A]  # noqa: PTH208
    assert store.use(A) == old
    assert keep(store, "b") is not None


def with_room(folder: Path, capacity: int) -> PreparedStore:
    """Open a store on a disk of this size that holds nothing but forms' weights."""

    def room(of: Path) -> int:
        return capacity - sum(path.stat().st_size for path in of.glob("*/weights.bin"))

    store = PreparedStore(folder, LIMIT, room=room)
    store.open()
    return store


def test_a_draft_that_the_disk_has_no_room_for_is_refused_and_nothing_goes_for_it(
    store: PreparedStore, folder: Path
) -> None:
    keep(store, "a")
    with pytest.raises(PreparedUnavailable, match=f"needs {2 * 10**18} bytes on the disk of {folder}, and"):
        store.draft(B, 10**18)
    assert os.listdir(folder) == [A]  # noqa: PTH208
    assert store.draft(B, 10).is_dir()


def test_the_least_recently_used_goes_where_the_disk_has_no_room_for_a_draft(folder: Path) -> None:
    store = with_room(folder, 500)
    for name in "abc":
        keep(store, name, 300)
    assert store.use(A) is not None
    assert store.draft(key("d"), 25).is_dir()
    assert {entry.key for entry in store.entries()} == {A, B, C}
    assert store.draft(key("d"), 100).is_dir()
    assert {entry.key for entry in store.entries()} == {A, C}


def test_forms_that_free_nothing_when_they_go_stay_but_for_the_first(folder: Path) -> None:
    store = PreparedStore(folder, LIMIT, room=lambda _: 100)  # the others are mapped as well
    store.open()
    for name in "abc":
        keep(store, name, 300)
    with pytest.raises(PreparedUnavailable, match=r"needs 200 bytes .* 100 can be spared"):
        store.draft(key("d"), 100)
    assert {entry.key for entry in store.entries()} == {B, C}
    assert not drafts(folder)


def test_a_folder_that_is_gone_has_room_again(store: PreparedStore, folder: Path) -> None:
    shutil.rmtree(folder)
    assert store.draft(A, 1).is_dir()


def test_what_is_no_draft_is_not_discarded(store: PreparedStore, folder: Path, tmp_path: Path) -> None:
    keep(store, "a")
    for path in (folder / A, folder, tmp_path / f"draft-{'0' * 16}-{'1' * 8}"):
        path.mkdir(exist_ok=True)
        store.discard(path)
        assert path.is_dir()
    store.discard(folder / f"draft-{'0' * 16}-{'1' * 8}")


@pytest.mark.parametrize("name", ["", "..", "../x", "a" * 63, "A" * 64, "a" * 64 + "\n", "draft-1"])
def test_what_is_no_key_names_no_folder(store: PreparedStore, name: str) -> None:
    with pytest.raises(ValueError, match="no key"):
        store.use(name)
    with pytest.raises(ValueError, match="no key"):
        store.draft(name)


# What is cleared


def test_all_or_what_was_made_of_one_model_can_be_cleared(store: PreparedStore, folder: Path) -> None:
    keep(store, "a", 10, model_id="one")
    keep(store, "b", 20, model_id="two")
    store.settle_none(C, {}, model_id="two", version=1)
    (folder / key("d")).mkdir()
    assert store.clear("three") == Cleared(0, 0)
    assert store.clear("two") == Cleared(2, 20)
    assert [entry.key for entry in store.entries()] == [A]
    assert store.clear() == Cleared(2, 10)
    assert list(folder.iterdir()) == []
    assert store.clear() == Cleared(0, 0)


def test_clearing_beside_a_server_leaves_what_it_is_making(store: PreparedStore, folder: Path) -> None:
    draft = store.draft(A)
    files = written(draft, halves(10, "a"))
    (folder / f"draft-{'0' * 16}-{'1' * 8}").mkdir()
    PreparedStore(folder, 0).clear()
    assert [path.name for path in folder.iterdir()] == [draft.name]
    assert store.keep(A, draft, made(files)) is not None


# Threads, processes, and their deaths


def test_threads_and_another_process_may_use_it_at_once(folder: Path) -> None:
    store, beside = opened(folder, 2_000), PreparedStore(folder, 0)

    def work(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(of_both(short=40, long=1_000)):
            name = dice.choice("abcdefgh")
            match dice.randrange(8):
                case 0:
                    store.settle_none(key(name), {}, model_id=name, version=1)
                case 1:
                    store.drop(key(name), "bad")
                case 2:
                    beside.clear(name)
                case 3:
                    beside.entries()
                case 4:
                    store.find(key(name))
                case 5:
                    used = store.use(key(name))
                    assert used is None or used.form == "prepacked"
                case _:
                    keep(store, name, dice.randrange(1, 700), model_id=name, seed=str(dice.random()))

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(work, seed) for seed in range(4)]:
            done.result()
    entries = store.entries()
    assert {path.name for path in folder.iterdir()} == {entry.key for entry in entries}
    assert sum(entry.bytes for entry in entries) <= 2_000
    for entry in entries:
        used = store.use(entry.key)
        assert (used is None) == (entry.form is None)
        if used is not None:
            check_whole(used)


def test_who_is_killed_while_keeping_leaves_nothing_wrong(folder: Path) -> None:
    lives, seed = of_both(short=60, long=5_000), new_dice().randrange(2**32)
    script = (
        "from pathlib import Path; from support.keptprocess import main; "
        "main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))"
    )
    command = child(script, folder, lives, seed)
    done = subprocess.run(command, capture_output=True, text=True, timeout=1_200, check=False)
    assert done.returncode == 0, done.stderr
    tell(done.stdout)
    counts = dict(each.split("=") for each in done.stdout.replace("drafts left", "drafts").split())
    assert int(counts["lives"]) == lives
    assert int(counts["drafts"]) > 0  # some were killed in the middle of it
    assert int(counts["forms"]) > 0


# What a key depends on


def test_a_key_is_of_all_files_in_any_order_and_of_the_threads() -> None:
    one, two = SourceHash("model.onnx", "ab" * 32), SourceHash("weights", "cd" * 32)
    assert key_of([one, two], 1) == key_of([two, one], 1)
    keys = [
        key_of([one, two], 1),
        key_of([one, two], 2),
        key_of([one], 1),
        key_of([SourceHash("other", one.sha256), two], 1),
        key_of([SourceHash(one.path, two.sha256), two], 1),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(each) == 64 for each in keys)


def test_what_a_form_is_made_of_is_told_from_the_files_that_were_loaded(tmp_path: Path) -> None:
    files = written(tmp_path, {"b": b"2", "a": b"1"})
    assert [(source.path, source.sha256) for source in hashes_of(files)] == sorted(
        (file.path, file.sha256) for file in files
    )
