"""Whose request it is when a proxy passes it on: forwarded fields, believed from trusted addresses only.

Anybody can send `X-Forwarded-For`; what a proxy adds to it stands on the right. So it is read from there: the
first address that is no trusted proxy's is the client's, and what stands left of it is only what the client
said (RFC 7239 section 8.1). Which of the two fields is read is a setting, because a proxy writes one of them
and passes the other on as the client sent it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from aiohttp import hdrs, web

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

X_FORWARDED_FOR = "x-forwarded-for"
FORWARDED = "forwarded"
PREFIX = "X-Forwarded-Prefix"
"""Names the path under which a proxy has this server, if not at the top; de facto, of Traefik and Spring."""

MAX_HOPS = 32
"""Of so many proxies at most one is behind the other; a longer list is an attempt to keep us busy."""

_WITH_PORT = re.compile(r"\[([^\]]*)\](?::(?:\d{1,5}|_[\w.-]+))?|([^:]*):(?:\d{1,5}|_[\w.-]+)", re.ASCII)
_PATH = re.compile(r"(?:/[A-Za-z0-9._~-]+){1,16}", re.ASCII)
"""Segments with something in them: of `//host` a browser would make another server."""


def parse_networks(text: str) -> tuple[Network, ...]:
    """Return the networks that a setting names: addresses and CIDR blocks, separated by commas.

    Raises:
        ValueError: it names something else; its text says what it must be.
    """
    return tuple(_network(part.strip()) for part in text.split(","))


def _network(text: str) -> Network:
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        try:
            meant = ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise ValueError(
                f"{text[:64]!r} is no address or network. Give them like 10.0.0.0/8, separated by commas."
            ) from None
        raise ValueError(f"{text!r} is an address within a network; that is {meant}.") from None
    if network.prefixlen == 0:
        raise ValueError(f"{text!r} is everybody, and would let each client choose its address.")
    return network


def plain_address(text: str | None) -> str | None:
    """Return an address in the one form that it is compared in; None if it is none.

    An IPv4 address that is mapped into IPv6 is an IPv4 address, and an interface (`%eth0`) is left out.
    """
    parsed = _parsed(text)
    return None if parsed is None else str(parsed)


def _parsed(text: str | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        parsed = ipaddress.ip_address((text or "").partition("%")[0])
    except ValueError:
        return None
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return parsed if mapped is None else mapped


def client_address(
    direct: str, fields: Iterable[str], read_hop: Callable[[str], str | None], trusts: Callable[[str], bool]
) -> str:
    """Return whose request this is.

    Args:
        direct: where the connection comes from, which is trusted.
        fields: the values of the forwarded fields, in their order.
        read_hop: gives the address of one entry, None where there is none.
        trusts: says whether an address is one of our proxies'.

    Returns:
        The rightmost address that is not trusted; the leftmost one if all are. An entry that is no address
        ends the list: what stands left of it might be anybody's words.
    """
    client = direct
    for entry in _from_the_right(fields):
        address = read_hop(entry)
        if address is None:
            break
        client = address
        if not trusts(address):
            break
    return client


def _from_the_right(fields: Iterable[str]) -> Iterator[str]:
    joined = ",".join(fields)  # RFC 9110 section 5.3: several lines are one list
    yield from reversed(joined.rsplit(",", MAX_HOPS)[-MAX_HOPS:] if joined else [])


def x_forwarded_for_hop(entry: str) -> str | None:
    """Return the address of an entry of X-Forwarded-For, which may have a port; None if it is none."""
    text = entry.strip(" \t")
    found = _WITH_PORT.fullmatch(text)
    # What has several colons and no brackets is an IPv6 address, and has no port.
    return plain_address(text if found is None else found[1] or found[2])


def forwarded_hop(entry: str) -> str | None:
    """Return the address of an element of Forwarded (RFC 7239); None if it hides it or is malformed.

    A quoted value with a comma or semicolon in it, which no address has, counts as malformed.
    """
    pairs = [pair.partition("=") for pair in entry.split(";")]
    nodes = [value.strip(" \t") for name, _, value in pairs if name.strip(" \t").lower() == "for"]
    if len(nodes) != 1:
        return None
    node = nodes[0]
    quoted = len(node) >= 2 and node[0] == node[-1] == '"'  # noqa: PLR2004 - two quotation marks
    return x_forwarded_for_hop(node[1:-1] if quoted else node)


@dataclass(frozen=True, slots=True)
class Proxies:
    """The proxies that are trusted, and the field in which they say whom they pass on.

    Attributes:
        trusted: none by default: then nobody's word is taken.
        header: `X_FORWARDED_FOR` or `FORWARDED`.
    """

    trusted: tuple[Network, ...] = ()
    header: str = X_FORWARDED_FOR

    def peer(self, request: web.BaseRequest) -> str | None:
        """Return the address that a request comes from; None where the connection has none."""
        direct = request.remote
        if not self.trusted or direct is None or not self.trusts(direct):
            return direct
        read_hop = forwarded_hop if self.header == FORWARDED else x_forwarded_for_hop
        return client_address(direct, request.headers.getall(self.header, ()), read_hop, self.trusts)

    def trusts(self, address: str) -> bool:
        """Say whether an address is a trusted proxy's."""
        parsed = _parsed(address)
        return parsed is not None and any(parsed in network for network in self.trusted)

    def prefix(self, request: web.BaseRequest) -> str:
        """Return the path under which a trusted proxy says that it has this server; else nothing."""
        if not self.trusted or request.remote is None or not self.trusts(request.remote):
            return ""
        given = request.headers.getall(PREFIX, ())
        text = given[0].rstrip("/") if len(given) == 1 else ""
        return text if _PATH.fullmatch(text) and ".." not in text.split("/") else ""

    def relocate(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        """Put that path before the response's `Location`, if it has one."""
        location = response.headers.get(hdrs.LOCATION)
        if location is not None and location.startswith("/") and (prefix := self.prefix(request)):
            response.headers[hdrs.LOCATION] = prefix + location
