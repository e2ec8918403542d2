"""Who may have a connection: as many as there are places, as many of one address, and a reserve for probes.

Nothing here knows a socket: addresses come in, places go out, and who holds one says how it is ended.
"""

from __future__ import annotations

import ipaddress
import resource
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from server.auth.proxies import plain_address
from server.auth.ratelimit import peer_of
from server.config import Config

SPARE_DESCRIPTORS = 4
"""Of so many descriptors one is left to the ledger, the models and the logs."""

RESERVE = 64
"""Beyond the limit: more than connect between two turns of the loop as long as the server keeps up at all."""

SPARE_OF_SPARE = 8
"""Of so many descriptors that are left one may go to the reserve, and one to who is leaving it."""


@dataclass(eq=False, slots=True)
class Place:
    """What one connection takes, from its handshake on.

    Attributes:
        peer: whom it counts for; None if that is not counted.
        is_spare: whether it is of the reserve, which is for probes alone.
        give_way: ends it for another one, in its own time; None while it may not be ended.
        abort: ends it at once, whatever it is being told.
    """

    peer: str | None
    is_spare: bool
    give_way: Callable[[], object] | None = None
    abort: Callable[[], object] | None = None


def nobody(_address: str) -> bool:
    """Exempt no address."""
    return False


@dataclass(slots=True)
class Places:
    """The places there are, and those that are taken.

    Attributes:
        most: how many connections there may be.
        most_of_peer: how many of one peer address, or /64 of IPv6; 0 means no limit.
        reserve: how many there may be beyond either limit, to ask how the server is.
        is_exempt: says of which addresses there may be any number.
        taken: those that are, without the reserve.
        of_peers: how many of each peer that has any, where that is limited.
        spare: those of the reserve, the oldest first.
        leaving: those that gave way and are not gone: no more than the reserve has, the oldest first.
    """

    most: int
    most_of_peer: int = 0
    reserve: int = RESERVE
    is_exempt: Callable[[str], bool] = nobody
    taken: set[Place] = field(default_factory=set)
    of_peers: Counter[str] = field(default_factory=Counter)
    spare: dict[Place, None] = field(default_factory=dict)
    leaving: dict[Place, None] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config) -> Places:
        """Return those of a configuration and of this process."""
        most, reserve = config.max_connections, RESERVE
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if descriptors != resource.RLIM_INFINITY:
            left = descriptors // SPARE_DESCRIPTORS
            most = min(most, max(1, descriptors - left))
            reserve = min(reserve, max(1, left // SPARE_OF_SPARE))
        proxies = config.proxies()
        return cls(
            most,
            0,
            reserve,
            lambda address: proxies.trusts(address) or _is_loopback(address),
        )

    def take(self, address: str | None) -> Place | None:
        """Return a place, of the reserve if there is no other; None if there is none at all."""
        peer = self._counted(address)
        if len(self.taken) < self.most and (peer is None or self.of_peers[peer] < self.most_of_peer):
            place = Place(peer, is_spare=False)
            self.taken.add(place)
            if peer is not None:
                self.of_peers[peer] += 1
            return place
        if not self._has_spare():
            return None
        place = Place(peer, is_spare=True)
        self.spare[place] = None
        return place

    def leave(self, place: Place) -> None:
        """Take a place back; it may have been already."""
        self.spare.pop(place, None)
        self.leaving.pop(place, None)
        if place not in self.taken:
            return
        self.taken.remove(place)
        if place.peer is not None:
            self.of_peers[place.peer] -= 1
            if not self.of_peers[place.peer]:
                del self.of_peers[place.peer]

    def _counted(self, address: str | None) -> str | None:
        if not self.most_of_peer or address is None or self.is_exempt(address):
            return None
        return peer_of(address)

    def _has_spare(self) -> bool:
        """Whether the reserve has room, if need be because the oldest of it gives way.

        Not the newest: who asks how the server is does so at once, and who only holds a place becomes the
        oldest.
        """
        if len(self.spare) < self.reserve:
            return True
        for place in self.spare:
            if place.give_way is not None:
                self._have_leave(place, place.give_way)
                return True
        return False

    def _have_leave(self, place: Place, give_way: Callable[[], object]) -> None:
        """End one of the reserve for another; it has a descriptor until it is gone, so few may linger."""
        del self.spare[place]
        self.leaving[place] = None
        give_way()
        if len(self.leaving) > self.reserve:
            oldest = next(iter(self.leaving))
            del self.leaving[oldest]
            if oldest.abort is not None:
                oldest.abort()


def _is_loopback(address: str) -> bool:
    plain = plain_address(address)
    return plain is not None and ipaddress.ip_address(plain).is_loopback
