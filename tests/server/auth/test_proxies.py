"""The client's address behind trusted proxies; forged, unusual and malformed header fields."""

import ipaddress
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import models
from support.history import PLAIN
from support.http import LocalApi
from support.models import TEXT, save, save_bytes

from server.auth import proxies

Start = Callable[..., Awaitable[LocalApi]]

PROXY = "10.0.0.1"
TRUSTED = proxies.parse_networks("10.0.0.0/8, fd00::/8")
LIMITED = (429, "too_many_failures")
INVALID = {"Authorization": "Bearer a.b.c"}


def peer(*fields: str) -> str:
    return proxies.Proxies(TRUSTED).client_address(PROXY, fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ((), PROXY),
        (("",), PROXY),
        (("192.0.2.1, 198.51.100.2",), "198.51.100.2"),
        (("192.0.2.1, 198.51.100.2, 10.9.9.9",), "198.51.100.2"),
        (("192.0.2.1", "10.9.9.9"), "192.0.2.1"),
        (("10.2.2.2, 10.9.9.9",), "10.2.2.2"),
        (("192.0.2.1, FD00::5",), "192.0.2.1"),
        (("192.0.2.1, ::ffff:10.3.3.3",), "192.0.2.1"),
        (("fe80::1%eth0",), "fe80::1"),
        (("192.0.2.1,unknown",), PROXY),
        (("192.0.2.1, unknown, 10.9.9.9",), "10.9.9.9"),
        (("192.0.2.1,",), PROXY),
        (("192.0.2.1, 198.51.100.2 10.9.9.9",), PROXY),
        (("192.0.2.1:port",), PROXY),
        (("192.0.2.300",), PROXY),
        (("010.0.0.1",), PROXY),
        (("\u0661.1.1.1",), PROXY),
    ],
)
def test_client_is_the_rightmost_untrusted_address(fields: tuple[str, ...], expected: str) -> None:
    assert peer(*fields) == expected


ADDRESSES = st.ip_addresses().map(str)
WORDS = st.text(st.characters(blacklist_characters="\r\n\0"), max_size=30)


@PLAIN
@given(st.lists(WORDS, max_size=5), ADDRESSES)
@example(words=["1.2.3.4, ", '"'], client="192.0.2.1")
def test_client_cannot_change_what_the_proxy_adds(words: list[str], client: str) -> None:
    """The proxy adds the client's address on the right, in the same line or in one of its own."""
    address = proxies.parse_address(client)
    if any(address in network for network in TRUSTED):
        return
    expected = str(address)
    assert peer(*words, client) == expected
    assert peer(", ".join([*words, client])) == expected


@PLAIN
@given(st.lists(WORDS | ADDRESSES, max_size=4))
def test_any_field_leads_to_an_address(fields: list[str]) -> None:
    ipaddress.ip_address(peer(*fields))


@PLAIN
@given(ADDRESSES, st.integers(0, 65535))
def test_port_and_brackets_do_not_change_the_address(address: str, port: int) -> None:
    bracketed = f"[{address}]" if ":" in address else address
    expected = proxies.parse_address(address)
    assert expected is not None
    spellings = [address, bracketed, f"{bracketed}:{port}", f" {bracketed}:{port}\t"]
    assert {proxies.parse_hop(text) for text in spellings} == {expected}


def test_chain_of_proxies_is_followed_to_a_limit() -> None:
    hops = ["192.0.2.1", *["10.9.9.9"] * (proxies.MAX_HOPS - 1)]
    assert peer(",".join(hops)) == "192.0.2.1"
    assert peer(",".join(["192.0.2.1", "10.1.1.1", *hops[1:]])) == "10.1.1.1"


def test_invalid_or_universal_network_is_refused() -> None:
    for reason, texts in (
        ("no address", ("", "10.0.0.0/8,", "proxy.example", "10.0.0.0/33")),
        ("that is 10.0.0.0/8", ("10.0.0.1/8",)),
        ("everybody", ("0.0.0.0/0", "10.0.0.1, ::/0")),
    ):
        for text in texts:
            with pytest.raises(ValueError, match=reason):
                proxies.parse_networks(text)


async def fail(api: LocalApi, forwarded_for: str = "", **headers: str) -> tuple[int, str]:
    if forwarded_for:
        headers["X-Forwarded-For"] = forwarded_for
    return (await api.get("/api/v1/models", roles=(), headers=INVALID | headers)).refusal


REFUSED = (401, "invalid_token")


PREFIXES = {
    "/ml": "/ml", "/ml/": "/ml", "/a/b-c.d": "/a/b-c.d", "/": "", "": "", "ml": "", "//evil.example": "",
    "https://evil.example": "", "/a/../b": "", "/a b": "",
}  # fmt: skip


async def test_fields_of_a_trusted_proxy_are_read(start: Start, repository: Path) -> None:
    save(models.add(1), repository, "m")
    save_bytes(TEXT, repository, "text")
    api = await start(limit_auth_failures="1/hour", trusted_proxies="127.0.0.1", on_demand="on")
    for prefix, expected in PREFIXES.items():
        answer = await api.post("/api/v1/models/m/load", wait=30, headers={"X-Forwarded-Prefix": prefix})
        assert answer.headers["Location"] == f"{expected}/api/v1/jobs/{answer.json['id']}", prefix
    headers = {"X-Forwarded-Prefix": "/ml"}
    failed = await api.post("/v2/models/text/infer", json={"inputs": []}, headers=headers)  # the fast path
    assert failed.headers["Location"].startswith("/ml/api/v1/jobs/")
    assert await fail(api, "9.9.9.9, 192.0.2.1") == REFUSED
    assert await fail(api, "8.8.8.8, 192.0.2.1") == LIMITED
    client = INVALID | {"X-Forwarded-For": "192.0.2.1"}
    assert (
        await api.post("/v2/models/m/infer", roles=(), headers=client)
    ).refusal == LIMITED  # the fast path
    assert await fail(api, Forwarded="for=192.0.2.7") == REFUSED  # which no proxy overwrites
    assert await fail(api, Forwarded="for=192.0.2.8") == LIMITED
    assert (await api.get("/api/v1/models", headers={"X-Forwarded-For": "192.0.2.2"})).status == 200


@pytest.mark.parametrize(
    "trusted", [{}, {"trusted_proxies": "192.0.2.1"}], ids=["nobody is trusted", "another is trusted"]
)
async def test_fields_of_anybody_else_are_ignored(
    start: Start, repository: Path, trusted: dict[str, str]
) -> None:
    save(models.add(1), repository, "m")
    api = await start(limit_auth_failures="1/hour", **trusted)
    answer = await api.post("/api/v1/models/m/load", headers={"X-Forwarded-Prefix": "/ml"})
    assert answer.headers["Location"].startswith("/api/v1/jobs/")
    assert [await fail(api, client) for client in ("192.0.2.1", "192.0.2.2")] == [REFUSED, LIMITED]
