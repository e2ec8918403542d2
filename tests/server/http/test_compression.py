"""gzip and deflate in both directions: round trips, bombs, damage, and the choice of a coding."""

import asyncio
import gzip
import zlib
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.history import PLAIN
from support.workers import until

from runtime.wire import Buffer
from server.http import compression
from server.http.bodies import BodyTooLarge
from server.http.validation import UnsupportedMediaType

MIB = 2**20
PACK: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}
UNPACK: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.decompress, "deflate": zlib.decompress}


@PLAIN
@given(st.lists(st.binary(max_size=50)), st.sampled_from(compression.CODINGS))
def test_compressed_body_round_trips(parts: list[bytes], coding: str) -> None:
    buffers: list[Buffer] = [*parts, memoryview(b"end")]
    packed, plain = compression.deflate(buffers, coding), b"".join(buffers)
    assert compression.inflate(packed, coding, len(plain)) == plain
    assert UNPACK[coding](packed) == plain
    assert compression.inflate(PACK[coding](plain), coding.upper(), len(plain)) == plain


@pytest.mark.parametrize("coding", compression.CODINGS)
@pytest.mark.parametrize("size", [0, 1, compression.INLINE_BYTES, compression.INLINE_BYTES + 1, 5 * MIB])
async def test_compression_is_the_same_in_a_thread(coding: str, size: int) -> None:
    body = bytes(size)
    assert await compression.decompress(await compression.compress([body], coding), coding, size) == body
    if size:
        with pytest.raises(BodyTooLarge):
            await compression.decompress(PACK[coding](body), coding, size - 1)


async def test_client_that_leaves_holds_the_turn_until_its_thread_has_ended() -> None:
    body, turn = gzip.compress(bytes(256 * MIB)), asyncio.Lock()
    leaving = asyncio.create_task(compression.decompress(body, "gzip", 256 * MIB, turn))
    await until(turn.locked)
    leaving.cancel()
    await asyncio.wait([leaving])
    assert turn.locked()
    await until(lambda: not turn.locked())


async def test_identity_and_old_name_of_gzip_are_known() -> None:
    body = bytes(compression.INLINE_BYTES * 2)
    for encoding in (None, "", " ", "identity", "Identity"):
        assert compression.inflate(body, encoding, 1) is body
        assert await compression.decompress(body, encoding, 1) is body
    assert compression.inflate(gzip.compress(b"a"), "x-gzip", 1) == b"a"


@pytest.mark.parametrize("coding", compression.CODINGS)
async def test_bomb_is_decompressed_up_to_the_limit(coding: str) -> None:
    bomb = PACK[coding](bytes(16 * MIB))
    assert len(bomb) < MIB
    with pytest.raises(BodyTooLarge, match="1048576 bytes") as refused:
        await compression.decompress(bomb, coding, MIB)
    assert refused.value.code == "body_too_large"
    with pytest.raises(BodyTooLarge):
        compression.inflate(bomb, coding, 0)


@pytest.mark.parametrize("coding", compression.CODINGS)
def test_damaged_body_is_refused(coding: str) -> None:
    packed = PACK[coding](b"some text, some text, some text")
    damaged = bytearray(packed)
    damaged[-6] ^= 1
    raw = zlib.compress(b"some text", wbits=-15)
    wrong = [packed[:end] for end in range(len(packed))]
    wrong += [packed + b"\0", packed + b"\x1f", packed + packed[:-1], bytes(damaged), packed + bytes(damaged)]
    wrong += [b"text", raw, PACK["gzip"](packed)[3:], *([packed + packed] if coding == "deflate" else [])]
    wrong.append(PACK[next(other for other in compression.CODINGS if other != coding)](b"a"))
    for body in wrong:
        with pytest.raises(compression.MalformedCoding, match="body") as refused:
            compression.inflate(body, coding, MIB)
        assert refused.value.code == "invalid_request"


@PLAIN
@given(st.lists(st.binary(max_size=50), min_size=1))
def test_gzip_members_are_one_body(parts: list[bytes]) -> None:
    packed, plain = b"".join(map(gzip.compress, parts)), b"".join(parts)
    assert compression.inflate(packed, "gzip", len(plain)) == gzip.decompress(packed) == plain
    with pytest.raises(BodyTooLarge):
        compression.inflate(packed + gzip.compress(b"x"), "gzip", len(plain))


async def test_gzip_members_longer_than_a_piece_are_one_body() -> None:
    long = bytes(range(256)) * 2**14
    packed = gzip.compress(b"a") + gzip.compress(long, 0) + gzip.compress(b"")
    assert await compression.decompress(packed, "gzip", len(long) + 1) == b"a" + long
    with pytest.raises(BodyTooLarge):
        await compression.decompress(packed, "gzip", len(long))


def test_countless_gzip_members_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "MAX_MEMBERS", 9)
    empty = gzip.compress(b"")
    assert compression.inflate(empty * compression.MAX_MEMBERS, "gzip", 0) == b""
    with pytest.raises(compression.MalformedCoding, match="members"):
        compression.inflate(empty * (compression.MAX_MEMBERS + 1), "gzip", 0)


@PLAIN
@given(st.binary(max_size=40), st.sampled_from(compression.CODINGS), st.integers(0, 20))
def test_any_bytes_decompress_or_are_refused(body: bytes, coding: str, max_bytes: int) -> None:
    for candidate in (body, PACK[coding](body), PACK[coding](body)[: len(body)]):
        with suppress(compression.MalformedCoding, BodyTooLarge):
            assert len(compression.inflate(candidate, coding, max_bytes)) <= max_bytes


@pytest.mark.parametrize(
    "encoding", ["br", "gzip, gzip", "gzip,deflate", "gzip, identity", "zstd", "*", ",", "é"]
)
def test_unknown_coding_is_415_with_the_known_ones(encoding: str) -> None:
    with pytest.raises(UnsupportedMediaType, match="gzip, deflate") as refused:
        compression.inflate(b"", encoding, MIB)
    assert refused.value.http_headers == {"Accept-Encoding": "gzip, deflate"}


@pytest.mark.parametrize(
    ("accepted", "expected"),
    [
        (None, None), ("", None), (" ", None), ("identity", None), ("br", None), ("br, zstd", None),
        ("gzip", "gzip"), ("deflate", "deflate"), ("deflate, gzip", "gzip"), ("gzip, deflate, br", "gzip"),
        ("GZIP", "gzip"), ("x-gzip", "gzip"), ("*", "gzip"), ("*;q=0", None), ("gzip;q=0", None),
        ("gzip;q=0, *", "deflate"), ("gzip;q=0,*;q=0.1", "deflate"), ("*;q=0, deflate", "deflate"),
        ("gzip;q=0.5, deflate;q=0.8", "deflate"), ("gzip; q=0.8 , deflate ;q=0.8", "gzip"),
        ("gzip;q=0.5, identity", None), ("gzip;q=0.5, identity;q=0.5", "gzip"), ("identity;q=0", None),
        ("identity;q=0, gzip;q=0.001", "gzip"), ("identity;q=0, *", "gzip"), ("gzip;q=1.000", "gzip"),
        ("gzip;Q=0.3", "gzip"), ("gzip;q=2", None), ("gzip;q=x", None), ("gzip;q=", None),
        ("gzip;q=-1", None),
        ("gzip;q=0.0001", None), ("gzip;q=nan, deflate", "deflate"), (";q=1", None), (",,gzip,", "gzip"),
        ("gzip;a=b;q=1", "gzip"), ("gzip deflate", None),
    ],
)  # fmt: skip
def test_chosen_encoding_is_the_best_accepted(accepted: str | None, expected: str | None) -> None:
    assert compression.chosen_encoding(accepted) == expected
