import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jwt
import pytest

from server.auth.keys import (
    KeyProblem,
    create_key,
    ensure_data_dir,
    issue_token,
    list_keys,
    load_private_key,
    revoke,
    rotate,
    subject_refusal,
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    ensure_data_dir(folder)
    return folder


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_data_directory_is_for_its_owner_only(data: Path) -> None:
    (key,) = (data / "keys").iterdir()
    assert [_mode(path) for path in (data, data / "keys", key, data / "ledger.key")] == [
        0o700,
        0o700,
        0o600,
        0o600,
    ]
    assert sorted(path.name for path in data.iterdir()) == ["keys", "ledger.key"]


def test_what_exists_is_kept(data: Path) -> None:
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    ensure_data_dir(data)
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before


def test_the_key_of_the_ledger_signs_no_tokens(data: Path) -> None:
    ledger = load_private_key(data / "ledger.key").public_key()
    token = issue_token(data, "alice", ["admin"], expires_s=60, audience="loadledger")
    with pytest.raises(jwt.InvalidSignatureError):
        jwt.decode(token, ledger, ["EdDSA"], audience="loadledger")


def test_the_newest_key_signs_and_the_others_stay(data: Path) -> None:
    (first,) = list_keys(data)
    kid = rotate(data)
    assert [(key.kid, key.signs) for key in list_keys(data)] == [(first.kid, False), (kid, True)]
    token = issue_token(data, "alice", ["admin", "audit"], expires_s=60, audience="here", issuer="us")
    assert jwt.get_unverified_header(token) == {"alg": "EdDSA", "kid": kid, "typ": "JWT"}
    key = load_private_key(data / "keys" / f"{kid}.pem").public_key()
    claims = jwt.decode(token, key, ["EdDSA"], audience="here", issuer="us")
    assert claims["exp"] - claims["iat"] == 60
    assert (claims["sub"], claims["roles"]) == ("alice", ["admin", "audit"])


def test_a_clock_that_was_set_back_does_not_make_a_new_key_older(data: Path) -> None:
    kid = create_key(data, datetime.now(UTC) - timedelta(days=400))
    assert list_keys(data)[-1].kid == kid


def test_a_revoked_key_is_gone(data: Path) -> None:
    (first,) = list_keys(data)
    kid = rotate(data)
    revoke(data, first.kid)
    assert [key.kid for key in list_keys(data)] == [kid]
    with pytest.raises(KeyProblem, match="no key"):
        revoke(data, first.kid)


def test_without_a_key_nothing_is_signed_until_one_is_made(data: Path) -> None:
    revoke(data, list_keys(data)[0].kid)
    with pytest.raises(KeyProblem, match="key rotate"):
        issue_token(data, "alice", ["admin"], expires_s=60, audience="loadledger")
    ensure_data_dir(data)
    assert issue_token(data, "alice", ["admin"], expires_s=60, audience="loadledger")


@pytest.mark.parametrize(
    "kid", ["", "..", "../ledger", "../../etc/passwd", "a/b", "a\0b", "*", "x" * 5000, "ledger"]
)
def test_a_hostile_kid_revokes_nothing(data: Path, kid: str) -> None:
    before = sorted(data.rglob("*"))
    with pytest.raises(KeyProblem):
        revoke(data, kid)
    assert sorted(data.rglob("*")) == before


def test_files_that_are_no_keys_are_passed_over(data: Path) -> None:
    for name in ("notes.txt", "x.pem", "99999999T999999999999Z-00000000.pem", ".hidden.pem"):
        (data / "keys" / name).write_text("?")
    assert len(list_keys(data)) == 1


@pytest.mark.parametrize(
    ("subject", "roles", "expires_s"),
    [("", ["admin"], 60), ("system", ["admin"], 60), ("a", [], 60), ("a", ["root"], 60), ("a", ["admin"], 0)],
)
def test_a_token_that_no_server_would_take_is_not_signed(
    data: Path, subject: str, roles: list[str], expires_s: float
) -> None:
    with pytest.raises(KeyProblem):
        issue_token(data, subject, roles, expires_s=expires_s, audience="loadledger")


@pytest.mark.parametrize(
    "subject",
    ["", "x" * 129, "a\nb", "a\0", "\ud800", "\u202e", "system", "System", " system ", "\uff53ystem"],
)
def test_these_are_no_subjects(subject: str) -> None:
    assert subject_refusal(subject) is not None


@pytest.mark.parametrize(
    "subject", ["a", "x" * 128, "alice@example.org", "Jürgen Müller", "system-test", "部署"]
)
def test_these_are_subjects(subject: str) -> None:
    assert subject_refusal(subject) is None


def test_what_root_makes_is_left_to_whom_the_data_directory_belongs(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    data = tmp_path / "owned"
    data.mkdir(mode=0o700)
    os.chown(data, 12345, 12346)
    rotate(data)
    rotate(data)
    made = sorted(data.rglob("*"))
    assert [path.name for path in made if path.suffix != ".pem"] == ["keys", "ledger.key"]
    assert {(path.stat().st_uid, path.stat().st_gid) for path in made} == {(12345, 12346)}
