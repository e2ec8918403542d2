"""Which server a command talks to: options, then variables, then profiles; and where a token goes."""

import os
import stat
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.history import PLAIN

from loadledger.profiles import (
    DEFAULT_URL,
    MAX_PROFILE_BYTES,
    ProfileProblem,
    ServerTarget,
    find_target,
    profile_path,
    read_profile,
    write_profile,
)

HERE, THERE = "http://127.0.0.1:1", "https://example.org/ledger"


def write(home: Path, profile: ServerTarget, name: str = "profile") -> Path:
    path = home / ".config" / "loadledger" / f"{name}.toml"
    write_profile(path, profile)
    return path


def test_option_overrides_variable_overrides_profile(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    for environment in ({}, home):
        assert find_target(None, None, environment) == ServerTarget(DEFAULT_URL)
    write(tmp_path, ServerTarget(HERE, "of-profile", tmp_path / "ca.pem"))
    two = write(tmp_path, ServerTarget(THERE, "of-two"), "two")
    moved = {"HOME": "/nowhere", "XDG_CONFIG_HOME": str(tmp_path / ".config")}
    of_profile = ServerTarget(HERE, "of-profile", tmp_path / "ca.pem")
    for url, profile, environment, place in (
        (None, None, home, of_profile),
        (None, None, moved, of_profile),
        (f"{HERE}/", None, home, ServerTarget(f"{HERE}/", "of-profile", tmp_path / "ca.pem")),
        (None, "two", home, ServerTarget(THERE, "of-two")),
        (None, None, home | {"LOADLEDGER_PROFILE": "two"}, ServerTarget(THERE, "of-two")),
        (None, str(two), {}, ServerTarget(THERE, "of-two")),
        (None, None, home | {"LOADLEDGER_TOKEN": "t"}, ServerTarget(HERE, "t", tmp_path / "ca.pem")),
        (None, None, home | {"LOADLEDGER_CA": "/ca"}, ServerTarget(HERE, "of-profile", Path("/ca"))),
    ):
        assert find_target(url, profile, environment) == place


@pytest.mark.parametrize(
    ("port", "url"),
    [
        ("9000", "http://127.0.0.1:9000"),
        *((port, DEFAULT_URL) for port in ("", "0", "-1", "99999999", "x", "\u0661", "tcp://10.0.0.1:80")),
    ],
)
def test_port_of_serve_is_the_default_servers(tmp_path: Path, port: str, url: str) -> None:
    variables = {"HOME": str(tmp_path), "LOADLEDGER_PORT": port}
    for environment in (variables, {"LOADLEDGER_PORT": port}):
        assert find_target(None, None, environment) == ServerTarget(url)
    assert find_target(THERE, None, variables) == ServerTarget(THERE)
    assert find_target(None, None, variables | {"LOADLEDGER_URL": THERE}) == ServerTarget(THERE)
    write(tmp_path, ServerTarget(HERE, "t"))
    assert find_target(None, None, variables) == ServerTarget(HERE, "t")


def test_token_of_profile_goes_to_no_other_server(tmp_path: Path) -> None:
    write(tmp_path, ServerTarget(HERE, "secret", tmp_path / "ca.pem"))
    home = {"HOME": str(tmp_path)}
    for url, variables, place in (
        (THERE, {}, ServerTarget(THERE)),
        (None, {"LOADLEDGER_URL": THERE}, ServerTarget(THERE)),
        (f"{HERE}0", {}, ServerTarget(f"{HERE}0")),
        (THERE, {"LOADLEDGER_TOKEN": "given"}, ServerTarget(THERE, "given")),
    ):
        assert find_target(url, None, home | variables) == place
    write(tmp_path, ServerTarget(token="of no server"))
    assert find_target(None, None, home) == ServerTarget(DEFAULT_URL, "of no server")
    assert find_target(THERE, None, home) == ServerTarget(THERE)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666, 0o601])
def test_profile_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    write(tmp_path, ServerTarget(HERE, "secret")).chmod(mode)
    with pytest.raises(ProfileProblem, match=rf"mode 0{mode:o}.*chmod 600") as refused:
        find_target(None, None, {"HOME": str(tmp_path)})
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"token = secret", "not TOML"),
        (b"\xff", "not UTF-8"),
        (b"tokens = 'secret'", "'tokens' is unknown: use url, token, ca"),
        (b"token = 7", 'like token = "'),
        (b"url = ''", 'like url = "'),
        (b"[token]\na = 'secret'", "has to be a string"),
        (b"#" * (MAX_PROFILE_BYTES + 1), "is no profile"),
    ],
)
def test_invalid_profile_is_refused_without_its_token(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "p.toml"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ProfileProblem, match=words) as refused:
        read_profile(path)
    assert "secret" not in str(refused.value)


def test_profile_with_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_bytes(b"\xef\xbb\xbftoken = 'secret'")
    path.chmod(0o600)
    assert read_profile(path).token == "secret"


def test_fifo_or_folder_as_profile_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.toml", 0o600)
    (tmp_path / "folder.toml").mkdir(mode=0o700)
    for name in ("fifo.toml", "folder.toml"):
        with pytest.raises(ProfileProblem, match=name):
            read_profile(tmp_path / name)


@pytest.mark.parametrize("name", ["-", ".x", "a b", "x" * 65, "a\n"])
def test_profile_name_is_refused(name: str) -> None:
    with pytest.raises(ProfileProblem, match="cannot name a profile"):
        profile_path(name, {"HOME": "/home/a"})


def test_profile_without_home_needs_path(tmp_path: Path) -> None:
    with pytest.raises(ProfileProblem, match="no HOME"):
        profile_path(None, {})
    assert profile_path(f"{tmp_path}/mine.toml", {}) == tmp_path / "mine.toml"
    with pytest.raises(ProfileProblem, match="loadledger login"):
        find_target(None, f"{tmp_path}/mine.toml", {})


PRINTABLE = st.text(st.sampled_from(string.ascii_letters + string.digits + " \\\"'#=[]é😀"), min_size=1)


@PLAIN
@given(url=PRINTABLE, token=PRINTABLE)
def test_written_profile_reads_back(tmp_path_factory: pytest.TempPathFactory, url: str, token: str) -> None:
    path = tmp_path_factory.mktemp("home") / "p.toml"
    write_profile(path, ServerTarget(url, token))
    assert read_profile(path) == ServerTarget(url, token)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["p.toml"]
