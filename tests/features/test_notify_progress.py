"""Progress of receivers: its file, and the latest of several."""

import stat
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.history import PLAIN

from events.errors import WrongTarget
from features.notify.progress import Progress, find_latest, read_progress, write_progress

HASHES = st.binary(min_size=32, max_size=32).map(bytes.hex) | st.just("")
PROGRESS = st.builds(Progress, st.integers(0, 9) | st.integers(0, 2**63 - 1), HASHES)
OTHER_TEXTS = st.text() | st.sampled_from(
    ["", "null", "5", "[]", "{}", '{"position":"5"}', '{"position":5.5}', '{"position":5', "\ud800"]
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A receiver's file in a folder that is not there yet."""
    return tmp_path / "notify" / "[::1]:8080"


# The file.


@pytest.mark.parametrize(
    "progress", [Progress(0), Progress(7, "ab" * 32), Progress(2**63 - 1, "00" * 32), Progress(5)]
)
def test_progress_is_read_as_written(path: Path, progress: Progress) -> None:
    write_progress(path, Progress(3, "cd" * 32))
    write_progress(path, progress)
    assert read_progress(path) == progress
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_file_has_known_bytes(path: Path) -> None:
    write_progress(path, Progress(7, "ab" * 32))
    assert path.read_bytes() == b'{"position":7,"hash":"%b"}' % (b"ab" * 32)


def test_missing_file_is_no_progress(path: Path) -> None:
    assert read_progress(path) is None
    path.parent.mkdir()
    assert read_progress(path) is None


WHOLE = Progress(7, "ab" * 32).encode()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\n", WHOLE[:-1], WHOLE[:13], WHOLE + WHOLE, WHOLE + b"\x00", bytes(100)),
        *(b"null", b"7", b"[]", b"{}", b'{"hash":""}', b'{"position":null}', b'{"position":"7"}'),
        *(b'{"position":7.5}', b'{"position":true}', b'{"position":7,"hash":null}', b"\xff", b"# notes\n"),
    ],
    ids=range(19),
)
def test_other_content_is_refused_with_path(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match="does not say how far the receiver has events: ") as caught:
        read_progress(path)
    assert str(caught.value).startswith(f"{path} does not say")
    assert path.read_bytes() == content


def test_folder_in_place_of_file_is_refused_with_path(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=str(path).replace("[", r"\[")):
        read_progress(path)
    with pytest.raises(WrongTarget, match=str(path).replace("[", r"\[")):
        write_progress(path, Progress(7))
    assert list(path.parent.iterdir()) == [path]


def test_file_in_place_of_folder_is_refused_with_path(path: Path) -> None:
    path.parent.touch()
    with pytest.raises(NotADirectoryError, match=str(path.parent)):
        read_progress(path)
    with pytest.raises(OSError, match=str(path.parent)):
        write_progress(path, Progress(7))


def test_link_in_place_of_file_is_not_replaced(path: Path) -> None:
    path.parent.mkdir()
    target = path.with_name("target")
    write_progress(target, Progress(7))
    path.symlink_to(target)
    with pytest.raises(WrongTarget, match="is not a regular file"):
        write_progress(path, Progress(8))
    assert read_progress(path) == read_progress(target) == Progress(7)


# The latest of several.


@PLAIN
@given(st.none() | PROGRESS, st.lists(PROGRESS), st.lists(OTHER_TEXTS), st.randoms())
def test_latest_is_one_of_those_with_highest_position(
    own: Progress | None, others: list[Progress], texts: list[str], random: Random
) -> None:
    left = [*(each.encode().decode() for each in others), *texts]
    random.shuffle(left)
    latest, known = find_latest(own, left), [each for each in (own, *others) if each is not None]
    assert (latest is None) == (not known)
    if latest is not None:
        assert latest in known
        assert latest.position == max(each.position for each in known)
        assert latest == own or own is None or latest.position > own.position


@PLAIN
@given(st.none() | PROGRESS, OTHER_TEXTS)
def test_text_that_is_no_progress_changes_nothing(own: Progress | None, text: str) -> None:
    assert find_latest(own, [text, ""]) == own
