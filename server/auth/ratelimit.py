"""Rate limits: by subject and class of route; by address for refused credentials.

Fixed windows, counted in bounded memory. The header fields `RateLimit` and `RateLimit-Policy` of a response
show the rest of the limit (draft-ietf-httpapi-ratelimit-headers).
"""

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import lru_cache

import msgspec
from aiohttp import web

from server.auth.access import Access
from server.auth.proxies import parse_address
from server.config import Config, RateLimit, parse_limit
from server.errors import ServerProblem

MAX_COUNTERS = 10_000
"""Some 2 MB; beyond it the least recently used counters are forgotten."""

AUTH_FAILURES = "auth-failures"


class Quota(msgspec.Struct, frozen=True, gc=False):
    """The rest of a limit after a request: `remaining` of `amount`, for `reset_s` more seconds."""

    policy: str
    amount: int
    window_s: int
    remaining: int
    reset_s: int

    def headers(self) -> dict[str, str]:
        """Return the two header fields, as structured fields (RFC 9651)."""
        return {
            "RateLimit-Policy": f'"{self.policy}";q={self.amount};w={self.window_s}',
            "RateLimit": f'"{self.policy}";r={self.remaining};t={self.reset_s}',
        }


QUOTA: web.RequestKey[Quota] = web.RequestKey("quota", Quota)
"""Set on requests that a limit counts."""


class RateLimited(ServerProblem):
    """The limit on requests of this kind is used up."""

    code = "rate_limited"
    detail = "the limit {policy} of {amount} requests in {window_s} s is used up; try again in {reset_s} s"

    def __init__(self, quota: Quota) -> None:
        super().__init__(self.detail.format(**msgspec.structs.asdict(quota)), http_headers=quota.headers())
        self.retry_after_s = quota.reset_s
        self.problem_members: Mapping[str, object] = {"violated-policies": [quota.policy]}


class TooManyFailures(RateLimited):
    """Credentials from this address were refused too often."""

    code = "too_many_failures"
    detail = (
        "credentials from this address were refused {amount} times in {window_s} s; try again in {reset_s} s"
    )


class Windows:
    """Fixed windows of one length: each begins with the first request counted in it.

    A library's windows are coroutines, which took 8 of the 60 µs of an inference.
    """

    def __init__(self, limit: RateLimit, clock: Callable[[], float], capacity: int) -> None:
        self.amount, self.window_s = limit
        self._clock = clock
        self._capacity = capacity
        self._counters: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def count(self, who: str) -> tuple[int, float]:
        """Count a request; return the number of requests in this window, and the seconds until its end."""
        now = self._clock()
        counted, ends_at = self._counters.get(who, (0, 0.0))
        if ends_at <= now:
            counted, ends_at = 0, now + self.window_s
        counted += 1
        self._counters[who] = (counted, ends_at)
        self._counters.move_to_end(who)
        if len(self._counters) > self._capacity:
            self._counters.popitem(last=False)
        return counted, ends_at - now

    def peek(self, who: str) -> tuple[int, float]:
        """Return the result of `count` without counting."""
        counted, ends_at = self._counters.get(who, (0, 0.0))
        left_s = ends_at - self._clock()
        return (counted, left_s) if left_s > 0 else (0, 0.0)

    def __len__(self) -> int:
        return len(self._counters)


class RateLimits:
    """All limits of one server."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        def windows(notation: str) -> Windows | None:
            limit = parse_limit(notation)
            return None if limit is None else Windows(limit, clock, MAX_COUNTERS)

        self._failures = windows(config.limit_auth_failures)
        reads = ("reads", windows(config.limit_reads))
        self._of_others = ("management", windows(config.limit_management))
        self._limits = {
            Access.ANY: reads,
            Access.AUDIT: reads,
            Access.INFER: ("inference", windows(config.limit_inference)),
        }

    def count(self, access: Access, subject: str) -> Quota | None:
        """Count a request to a route with this access; return the rest of its limit, or None without a limit.

        Raises:
            RateLimited: the limit was used up (`rate_limited`).
        """
        policy, windows = self._limits.get(access, self._of_others)
        if windows is None:
            return None
        counted, left_s = windows.count(subject)
        quota = _quota(policy, windows, counted, left_s)
        if counted > windows.amount:
            raise RateLimited(quota)
        return quota

    def check_peer(self, peer: str | None) -> None:
        """Refuse an address whose credentials were refused too often.

        Raises:
            TooManyFailures: `too_many_failures`.
        """
        if self._failures is None:
            return
        counted, left_s = self._failures.peek(peer_of(peer))
        if counted >= self._failures.amount:
            raise TooManyFailures(_quota(AUTH_FAILURES, self._failures, counted, left_s))

    def count_failure(self, peer: str | None) -> None:
        if self._failures is not None:
            self._failures.count(peer_of(peer))


def _quota(policy: str, windows: Windows, counted: int, left_s: float) -> Quota:
    remaining = max(0, windows.amount - counted)
    return Quota(policy, windows.amount, windows.window_s, remaining, max(1, math.ceil(left_s)))


@lru_cache(maxsize=1024)
def peer_of(address: str | None) -> str:
    """Return the key of an address: for IPv6 its /64 network, in which a host can choose its addresses."""
    if address is None:
        return "local"  # a Unix socket
    parsed = parse_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((parsed, 64), strict=False))
    return address if parsed is None else str(parsed)
