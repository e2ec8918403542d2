"""Who is believed about whom a request is for, and what a forged, odd or malformed field comes to."""

import ipaddress
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import models
from support.events import PLAIN
from support.http import LocalApi
from support.models import TEXT, save, save_bytes

from server.auth.proxies import (
    FORWARDED,
    MAX_HOPS,
    X_FORWARDED_FOR,
    Proxies,
    forwarded_hop,
    parse_address,
    parse_networks,
    x_forwarded_for_hop,
)

Start = Callable[..., Awaitable[LocalApi]]

PROXY = "10.0.0.1"
TRUSTED = parse_networks("10.0.0.0/8, fd00::/8")
LIMITED = (429, "too_many_failures")
INVALID = {"Authorization": "Bearer a.b.c"}


def peer(*fields: str, header: str = X_FORWARDED_FOR) -> str:
    return Proxies(TRUSTED, header).client_address(PROXY, fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ((), PROXY),
        (("",), PROXY),
        (("192.0.2.1",), "192.0.2.1"),
        (("192.0.2.1, 198.51.100.2",), "198.51.100.2"),
        (("192.0.2.1, 198.51.100.2, 10.9.9.9",), "198.51.100.2"),
        (("192.0.2.1", "10.9.9.9"), "192.0.2.1"),
        (("10.2.2.2, 10.9.9.9",), "10.2.2.2"),
        (("192.0.2.1:4711",), "192.0.2.1"),
        (("[2001:db8::1]:4711",), "2001:db8::1"),
        (("[2001:db8::1]",), "2001:db8::1"),
        (("2001:db8::1",), "2001:db8::1"),
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
def test_the_rightmost_address_that_is_not_trusted_is_the_client_s(
    fields: tuple[str, ...], expected: str
) -> None:
    assert peer(*fields) == expected


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("for=192.0.2.1", "192.0.2.1"),
        ('For="192.0.2.1:4711";proto=https', "192.0.2.1"),
        ('proto=https; for = "[2001:db8::1]:_port" ;by=10.0.0.2', "2001:db8::1"),
        ("for=192.0.2.1, for=10.9.9.9;host=x", "192.0.2.1"),
        ("for=192.0.2.1, for=unknown", PROXY),
        ("for=192.0.2.1, for=_hidden", PROXY),
        ("for=192.0.2.1, proto=https", PROXY),
        ("for=192.0.2.1;for=192.0.2.2", PROXY),
        ('for="192.0.2.1', PROXY),
        ('for=", for=192.0.2.1', "192.0.2.1"),
        ("192.0.2.1", PROXY),
        ("for=", PROXY),
        ('for="', PROXY),
    ],
)
def test_forwarded_is_read_by_the_same_rule(field: str, expected: str) -> None:
    assert peer(field, header=FORWARDED) == expected


ADDRESSES = st.ip_addresses().map(str)
WORDS = st.text(st.characters(blacklist_characters="\r\n\0"), max_size=30)


@PLAIN
@given(st.lists(WORDS, max_size=5), ADDRESSES)
@example(words=["1.2.3.4, ", '"'], client="192.0.2.1")
def test_nothing_that_a_client_writes_changes_what_the_proxy_says_of_it(
    words: list[str], client: str
) -> None:
    """The proxy adds the client's address on the right, in the same line or in one of its own."""
    address = parse_address(client)
    if any(address in network for network in TRUSTED):
        return
    told = str(address)
    node = f'for="[{client}]"' if ":" in client else f"for={client}"
    for header, added in ((X_FORWARDED_FOR, client), (FORWARDED, node)):
        assert peer(*words, added, header=header) == told
        assert peer(", ".join([*words, added]), header=header) == told


@PLAIN
@given(st.lists(WORDS | ADDRESSES, max_size=4), st.sampled_from([X_FORWARDED_FOR, FORWARDED]))
def test_whatever_is_sent_comes_to_an_address(fields: list[str], header: str) -> None:
    ipaddress.ip_address(peer(*fields, header=header))


@PLAIN
@given(ADDRESSES, st.integers(0, 65535))
def test_an_address_is_the_same_with_a_port_and_in_quotes(address: str, port: int) -> None:
    bracketed = f"[{address}]" if ":" in address else address
    expected = parse_address(address)
    assert expected is not None
    spellings = [address, bracketed, f"{bracketed}:{port}", f" {bracketed}:{port}\t"]
    assert {x_forwarded_for_hop(text) for text in spellings} == {expected}
    assert {forwarded_hop(f'for="{text.strip()}"') for text in spellings} == {expected}


def test_a_list_of_endless_proxies_is_not_followed_further_than_any_real_one() -> None:
    hops = ["192.0.2.1", *["10.9.9.9"] * (MAX_HOPS - 1)]
    assert peer(",".join(hops)) == "192.0.2.1"
    assert peer(",".join(["192.0.2.1", "10.1.1.1", *hops[1:]])) == "10.1.1.1"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no address"),
        ("10.0.0.0/8,", "no address"),
        ("proxy.example", "no address"),
        ("10.0.0.0/33", "no address"),
        ("10.0.0.1/8", "that is 10.0.0.0/8"),
        ("0.0.0.0/0", "everybody"),
        ("10.0.0.1, ::/0", "everybody"),
    ],
)
def test_what_names_no_network_or_everybody_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_networks(text)


# Over HTTP


async def failed(api: LocalApi, **headers: str) -> tuple[int, str]:
    answer = await api.get("/api/v1/models", roles=(), headers=INVALID | headers)
    return answer.refusal


def xff(value: str) -> dict[str, str]:
    return {"X-Forwarded-For": value}


async def test_without_trusted_proxies_the_field_is_not_looked_at(start: Start) -> None:
    api = await start(limit_auth_failures="1/hour")
    assert await failed(api, **xff("192.0.2.1")) == (401, "invalid_token")
    assert await failed(api, **xff("192.0.2.2")) == LIMITED


async def test_failures_behind_a_trusted_proxy_count_for_the_client_and_not_for_its_neighbours(
    start: Start,
) -> None:
    api = await start(limit_auth_failures="1/hour", trusted_proxies="127.0.0.1")
    inference = "/v2/models/m/infer"
    assert await failed(api, **xff("9.9.9.9, 192.0.2.1")) == (401, "invalid_token")
    assert await failed(api, **xff("8.8.8.8, 192.0.2.1")) == LIMITED
    assert (await api.post(inference, headers=xff("192.0.2.1"))).refusal == LIMITED  # the short way, too
    assert await failed(api, Forwarded="for=192.0.2.7") == (401, "invalid_token")  # not the field in use
    assert await failed(api, Forwarded="for=192.0.2.8") == LIMITED
    answer = await api.get("/api/v1/models", headers=xff("192.0.2.2"))
    assert answer.status == 200


async def test_forwarded_is_read_where_the_setting_says_so(start: Start) -> None:
    api = await start(limit_auth_failures="1/hour", trusted_proxies="127.0.0.0/8", forwarded_header=FORWARDED)
    assert await failed(api, Forwarded="for=192.0.2.1") == (401, "invalid_token")
    assert await failed(api, Forwarded="for=192.0.2.1") == LIMITED
    assert await failed(api, Forwarded="for=192.0.2.2", **xff("192.0.2.1")) == (401, "invalid_token")


PREFIXES = {
    "/ml": "/ml", "/ml/": "/ml", "/a/b-c.d": "/a/b-c.d", "/": "", "": "", "ml": "", "//evil.example": "",
    "https://evil.example": "", "/a/../b": "", "/a b": "",
}  # fmt: skip


async def test_a_path_that_a_trusted_proxy_adds_is_put_before_location_and_nothing_else_is(
    start: Start, repository: Path
) -> None:
    save(models.add(1), repository, "m")
    save_bytes(TEXT, repository, "text")
    api = await start(trusted_proxies="127.0.0.1", on_demand="on")
    for prefix, expected in PREFIXES.items():
        answer = await api.post("/api/v1/models/m/load", wait=30, headers={"X-Forwarded-Prefix": prefix})
        assert answer.headers["Location"] == f"{expected}/api/v1/jobs/{answer.json['id']}", prefix
    answer = await api.post(
        "/v2/models/text/infer", json={"inputs": []}, headers={"X-Forwarded-Prefix": "/ml"}
    )
    assert answer.headers["Location"].startswith("/ml/api/v1/jobs/")  # of the load that failed, the short way


async def test_a_path_that_anybody_else_adds_is_not(start: Start, repository: Path) -> None:
    save(models.add(1), repository, "m")
    api = await start(trusted_proxies="192.0.2.1")
    answer = await api.post("/api/v1/models/m/load", headers={"X-Forwarded-Prefix": "/ml"})
    assert answer.headers["Location"].startswith("/api/v1/jobs/")
