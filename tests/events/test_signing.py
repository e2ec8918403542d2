"""What a signed head says and how: byte for byte, so that anybody can check it without us."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from shutil import which

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from support.events import PLAIN, at
from support.ledgers import SIGN

from events.signing import Base, HeadSigner, SignedHead, Statement, as_signed_head, key_id

HASHES = st.binary(min_size=32, max_size=32)
STATEMENTS = st.builds(
    Statement,
    st.integers(0, 2**63 - 1),
    HASHES,
    st.just("") | st.integers(0, 10**9).map(at),
    st.builds(Base, st.integers(0, 2**63 - 1), HASHES),
)
VECTOR = Statement(7, bytes(range(32)), "2026-01-01T00:00:07.000000Z", Base(0, bytes(32)))
MESSAGE = (
    b"loadledger-head-v1\n"
    b"7\n"
    b"000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f\n"
    b"2026-01-01T00:00:07.000000Z\n"
    b"0\n"
    b"0000000000000000000000000000000000000000000000000000000000000000\n"
)


def test_the_message_has_these_bytes_and_no_others() -> None:
    assert VECTOR.message() == MESSAGE
    empty = Statement(0, bytes(32), "", Base(0, bytes(32)))
    assert empty.message().split(b"\n")[3] == b""


def test_ed25519_has_no_randomness_so_the_signature_is_known() -> None:
    signed = SIGN(VECTOR)
    assert signed.signature == Ed25519PrivateKey.from_private_bytes(bytes(range(32))).sign(MESSAGE)
    assert signed == SIGN(VECTOR)


@PLAIN
@given(STATEMENTS)
def test_what_was_signed_holds_and_comes_back_from_json(statement: Statement) -> None:
    signed = SIGN(statement)
    assert signed.holds()
    assert as_signed_head(json.loads(json.dumps(signed.members()))) == signed


@PLAIN
@given(STATEMENTS, STATEMENTS, st.integers(0, 63), st.integers(1, 255))
def test_nothing_else_holds(statement: Statement, other: Statement, index: int, bits: int) -> None:
    signed = SIGN(statement)
    assert replace(signed, statement=other).holds() == (statement == other)
    broken = bytearray(signed.signature)
    broken[index] ^= bits
    assert not replace(signed, signature=bytes(broken)).holds()
    assert not replace(signed, public_key=HeadSigner(Ed25519PrivateKey.generate()).public_key).holds()


@pytest.mark.parametrize("key", [b"", b"no key", bytes(44)])
def test_a_key_that_is_none_holds_nothing(key: bytes) -> None:
    assert not replace(SIGN(VECTOR), public_key=key).holds()


@pytest.mark.parametrize(
    "members",
    [
        None,
        [],
        {},
        {**SIGN(VECTOR).members(), "position": None},
        {**SIGN(VECTOR).members(), "hash": "xyz"},
        {**SIGN(VECTOR).members(), "base": 7},
        {**SIGN(VECTOR).members(), "signature": "not base64!"},
        {**SIGN(VECTOR).members(), "recorded_at": "\u0661"},
    ],
)
def test_what_is_no_signed_head_is_refused(members: object) -> None:
    with pytest.raises(ValueError, match="no signed head"):
        as_signed_head(members)


def test_the_name_of_a_key_is_of_its_public_part() -> None:
    assert len(key_id(SIGN.public_key)) == 32
    assert SIGN(VECTOR).members()["key_id"] == key_id(SIGN.public_key)


def test_openssl_agrees(tmp_path: Path) -> None:
    if which("openssl") is None:
        pytest.skip("openssl is not installed here")
    signed = SIGN(VECTOR)
    assert verified_by_openssl(tmp_path, signed, MESSAGE)
    assert not verified_by_openssl(tmp_path, signed, MESSAGE.replace(b"\n7\n", b"\n8\n"))


def verified_by_openssl(folder: Path, signed: SignedHead, message: bytes) -> bool:
    for name, content in (("key", signed.public_key), ("sig", signed.signature), ("message", message)):
        (folder / name).write_bytes(content)
    command = "openssl pkeyutl -verify -pubin -keyform DER -inkey key -rawin -in message -sigfile sig"
    done = subprocess.run(command.split(), cwd=folder, capture_output=True, check=False)
    return done.returncode == 0
