"""Whose request it is when a proxy passes it on: forwarded fields, believed from trusted addresses only.

Anybody can send `X-Forwarded-For`; what a proxy adds to it stands on the right. So it is read from there: the
first address that is no trusted proxy's is the client's, and what stands left of it is only what the client
said (RFC 7239 section 8.1). Which of the two fields is read is a setting, because a proxy writes one of them
and passes the other on as the client sent it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from aiohttp import hdrs, web

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
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


def parse_address(text: str | None) -> Address | None:
    """Return an address in the one form that it is compared in; None if the text is none.

    An IPv4 address that is mapped into IPv6 is an IPv4 address, and an interface (`%eth0`) is left out.
    """
    try:
        parsed = ipaddress.ip_address((text or "").partition("%")[0])
    except ValueError:
        return None
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return parsed if mapped is None else mapped


def x_forwarded_for_hop(entry: str) -> Address | None:
    """Return the address of an entry of X-Forwarded-For, which may have a port; None if it is none."""
    text = entry.strip(" \t")
    found = _WITH_PORT.fullmatch(text)
    # What has several colons and no brackets is an IPv6 address, and has no port.
    return parse_address(text if found is None else found[1] or found[2])


def forwarded_hop(entry: str) -> Address | None:
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
        if direct is None or not self._trusts(direct):
            return direct
        return self.client_address(direct, request.headers.getall(self.header, ()))

    def client_address(self, direct: str, fields: Iterable[str]) -> str:
        """Return whose request this is.

        Args:
            direct: where the connection comes from, which is trusted.
            fields: the values of the forwarded fields, in their order.

        Returns:
            The rightmost address that is not trusted; the leftmost one if all are. What is no address ends
            the list: what stands left of it might be anybody's words.
        """
        read_hop = forwarded_hop if self.header == FORWARDED else x_forwarded_for_hop
        client = direct
        # RFC 9110 section 5.3: several lines are one list.
        for entry in reversed(",".join(fields).rsplit(",", MAX_HOPS)[-MAX_HOPS:]):
            address = read_hop(entry)
            if address is None:
                break
            client = str(address)
            if not self._has(address):
                break
        return client

    def relocate(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        """Put the path under which a trusted proxy says that it has this server before a `Location`."""
        location = response.headers.get(hdrs.LOCATION, "")
        given = request.headers.getall(PREFIX, ())
        if not location.startswith("/") or len(given) != 1 or not self._trusts(request.remote):
            return
        prefix = given[0].rstrip("/")
        if _PATH.fullmatch(prefix) and ".." not in prefix.split("/"):
            response.headers[hdrs.LOCATION] = prefix + location

    def _trusts(self, text: str | None) -> bool:
        address = parse_address(text) if self.trusted else None
        return address is not None and self._has(address)

    def _has(self, address: Address) -> bool:
        return any(address in network for network in self.trusted)
