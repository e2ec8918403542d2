"""The client's address behind trusted proxies; forged, unusual and malformed header fields."""

import ipaddress
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest
from aiohttp import web
from hypothesis import example, given
from hypothesis import strategies as st
from multidict import CIMultiDict
from support.history import PLAIN
from support.http import LocalApi
from support.models import TEXT

from server.auth import proxies

Start = Callable[..., Awaitable[LocalApi]]

PROXY = "10.0.0.1"
TRUSTED = proxies.parse_networks("10.0.0.0/8, fd00::/8")
BEHIND = proxies.Proxies(TRUSTED)
REFUSED, LIMITED = (401, "invalid_token"), (429, "too_many_failures")


def peer(*fields: str) -> str:
    return BEHIND.client_address(PROXY, fields)


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


@dataclass
class Request:
    """The members of a request that are read."""

    remote: str | None
    headers: CIMultiDict[str]


def relocated(
    *prefixes: str, by: proxies.Proxies = BEHIND, direct: str | None = PROXY, to: str = "/api"
) -> str:
    """Return the location of an answer to a request with these prefixes."""
    request = Request(direct, CIMultiDict(("X-Forwarded-Prefix", each) for each in prefixes))
    response = web.Response(headers={"Location": to})
    by.relocate(request, response)
    return response.headers["Location"]


def test_one_prefix_that_is_a_path_relocates() -> None:
    for prefix, path in (("/ml", "/ml"), ("/ml/", "/ml"), ("/a/b-c.d", "/a/b-c.d")):
        assert relocated(prefix) == f"{path}/api"
    for prefix in ("/", "", "ml", "//evil.example", "https://evil.example", "/a/../b", "/a b"):
        assert relocated(prefix) == "/api"
    assert relocated("/ml", "/ml") == relocated() == "/api"
    assert relocated("/ml", to="https://a/b") == "https://a/b"


@pytest.mark.parametrize(
    ("by", "direct"),
    [(BEHIND, "192.0.2.9"), (BEHIND, None), (proxies.Proxies(), PROXY)],
    ids=["another is trusted", "no address", "nobody is trusted"],
)
def test_fields_of_anybody_else_are_ignored(by: proxies.Proxies, direct: str | None) -> None:
    assert by.peer(Request(direct, CIMultiDict({"X-Forwarded-For": "192.0.2.1"}))) == direct
    assert relocated("/ml", by=by, direct=direct) == "/api"


async def test_server_reads_the_fields_of_its_proxy_on_both_paths(start: Start) -> None:
    """The fast path of inferences, and that of all requests."""
    api = await start(limit_auth_failures="1/hour", trusted_proxies="127.0.0.1", on_demand="on")
    api.save(TEXT, "text")
    behind = {"X-Forwarded-Prefix": "/ml"}
    load = await api.post("/api/v1/models/text/load", headers=behind)
    infer = await api.post("/v2/models/text/infer", json={"inputs": []}, headers=behind)
    assert load.headers["Location"] == f"/ml/api/v1/jobs/{load.json['id']}"
    assert infer.headers["Location"].startswith("/ml/api/v1/jobs/")

    async def fail(path: str, **fields: str) -> tuple[int, str]:
        headers = {"Authorization": "Bearer a.b.c", **fields}
        return (await api.post(path, roles=(), headers=headers)).refusal

    models, inference = "/api/v1/models/m/load", "/v2/models/m/infer"
    for path, fields, expected in (
        (models, {"X-Forwarded-For": "9.9.9.9, 192.0.2.1"}, REFUSED),
        (models, {"X-Forwarded-For": "8.8.8.8, 192.0.2.1"}, LIMITED),
        (inference, {"X-Forwarded-For": "192.0.2.1"}, LIMITED),
        (models, {"Forwarded": "for=192.0.2.7"}, REFUSED),  # which no proxy overwrites
        (models, {"Forwarded": "for=192.0.2.8"}, LIMITED),
    ):
        assert await fail(path, **fields) == expected
    assert (await api.get("/api/v1/models", headers={"X-Forwarded-For": "192.0.2.2"})).status == 200
