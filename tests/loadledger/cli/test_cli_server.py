"""Which server is meant: options before variables before profiles; and no token goes astray."""

import os
import stat
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.events import PLAIN

from loadledger.cli.profile import (
    DEFAULT_URL,
    MAX_PROFILE_BYTES,
    Place,
    Profile,
    ProfileProblem,
    find_place,
    profile_path,
    read_profile,
    write_profile,
)

HERE, THERE = "http://127.0.0.1:1", "https://example.org/ledger"


def kept(home: Path, profile: Profile, name: str = "profile") -> Path:
    path = home / ".config" / "loadledger" / f"{name}.toml"
    write_profile(path, profile)
    return path


def test_without_anything_it_is_the_server_here(tmp_path: Path) -> None:
    assert find_place(None, None, {}) == Place(DEFAULT_URL)
    assert find_place(None, None, {"HOME": str(tmp_path)}) == Place(DEFAULT_URL)


def test_an_option_goes_before_the_variable_and_that_before_the_profile(tmp_path: Path) -> None:
    kept(tmp_path, Profile(HERE, "of-profile", tmp_path / "ca.pem"))
    kept(tmp_path, Profile(THERE, "of-two"), "two")
    home = {"HOME": str(tmp_path)}
    assert find_place(None, None, home) == Place(HERE, "of-profile", tmp_path / "ca.pem")
    assert find_place(None, "two", home) == Place(THERE, "of-two")
    assert find_place(None, None, {**home, "LOADLEDGER_PROFILE": "two"}) == Place(THERE, "of-two")
    path = str(tmp_path / ".config" / "loadledger" / "two.toml")
    assert find_place(None, path, {}) == Place(THERE, "of-two")
    assert find_place(None, None, {**home, "LOADLEDGER_TOKEN": "t"}).token == "t"
    assert find_place(None, None, {**home, "LOADLEDGER_CA": "/ca"}).ca == Path("/ca")
    assert find_place(f"{HERE}/", None, home).token == "of-profile"
    moved = {"HOME": "/nowhere", "XDG_CONFIG_HOME": str(tmp_path / ".config")}
    assert find_place(None, None, moved).url == HERE


def test_the_token_of_a_profile_goes_to_no_other_server(tmp_path: Path) -> None:
    kept(tmp_path, Profile(HERE, "secret", tmp_path / "ca.pem"))
    home = {"HOME": str(tmp_path)}
    assert find_place(THERE, None, home) == Place(THERE)
    assert find_place(None, None, {**home, "LOADLEDGER_URL": THERE}) == Place(THERE)
    assert find_place(f"{HERE}0", None, home) == Place(f"{HERE}0")
    assert find_place(THERE, None, {**home, "LOADLEDGER_TOKEN": "given"}) == Place(THERE, "given")
    kept(tmp_path, Profile(None, "of no server"))
    assert find_place(None, None, home) == Place(DEFAULT_URL, "of no server")
    assert find_place(THERE, None, home) == Place(THERE)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666, 0o601])
def test_a_profile_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = kept(tmp_path, Profile(HERE, "secret"))
    path.chmod(mode)
    with pytest.raises(ProfileProblem, match=f"mode 0{mode:o}.*chmod 600") as refused:
        find_place(None, None, {"HOME": str(tmp_path)})
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"token = secret", "not TOML"),
        (b"\xff", "not UTF-8"),
        (b"tokens = 'secret'", "'tokens' is none of url, token, ca"),
        (b"token = 7", 'like token = "'),
        (b"url = ''", 'like url = "'),
        (b"[token]\na = 'secret'", "has to be a text"),
        (b"#" * (MAX_PROFILE_BYTES + 1), "it is no profile"),
    ],
)
def test_what_is_no_profile_is_told_and_not_repeated(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "p.toml"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ProfileProblem, match=words) as refused:
        read_profile(path)
    assert "secret" not in str(refused.value)


def test_a_fifo_or_a_folder_in_its_place_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.toml", 0o600)
    (tmp_path / "folder.toml").mkdir(mode=0o700)
    for name in ("fifo.toml", "folder.toml"):
        with pytest.raises(ProfileProblem, match=name):
            read_profile(tmp_path / name)


@pytest.mark.parametrize("name", ["", ".x", "a b", "x" * 65, "a\n"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ProfileProblem):
        profile_path(name or "-", {"HOME": "/home/a"})


def test_without_a_home_only_a_path_will_do(tmp_path: Path) -> None:
    with pytest.raises(ProfileProblem, match="no HOME"):
        profile_path(None, {})
    assert profile_path(f"{tmp_path}/mine.toml", {}) == tmp_path / "mine.toml"
    with pytest.raises(ProfileProblem, match="loadledger login"):
        find_place(None, f"{tmp_path}/mine.toml", {})


PRINTABLE = st.text(st.sampled_from(string.ascii_letters + string.digits + " \\\"'#=[]é😀"), min_size=1)


@PLAIN
@given(url=PRINTABLE, token=PRINTABLE)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, url: str, token: str) -> None:
    path = tmp_path_factory.mktemp("home") / "p.toml"
    write_profile(path, Profile(url, token))
    assert read_profile(path) == Profile(url, token)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["p.toml"]
