"""Rate limits: per subject and class of route, and per peer address for refused credentials.

Fixed windows of the `limits` library, counted in bounded memory. The answers say what is left in the fields
`RateLimit` and `RateLimit-Policy` (draft-ietf-httpapi-ratelimit-headers).
"""

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import limits
from aiohttp import web
from limits.aio.storage import Storage
from limits.aio.strategies import FixedWindowRateLimiter

from server.config import OFF, Config
from server.errors import ServerProblem
from server.routes import LimitClass

MAX_COUNTERS = 10_000
"""Some 2 MB. Past it the counters used least recently are forgotten: nobody can fill the memory."""

AUTH_FAILURES = "auth-failures"


@dataclass(frozen=True, slots=True)
class Quota:
    """What is left of a limit after a request.

    Attributes:
        policy: Its name in the header fields.
        amount: Requests per window.
        window_s: The window's length.
        remaining: Requests left in this window.
        reset_s: Whole seconds until the window ends.
    """

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
"""What the request left of its limit, if it had one."""


class RateLimited(ServerProblem):
    """The limit on requests of this kind is used up."""

    code = "rate_limited"

    def __init__(self, quota: Quota) -> None:
        super().__init__(self._detail(quota), http_headers=quota.headers())
        self.retry_after_s = quota.reset_s
        self.problem_members: Mapping[str, object] = {"violated-policies": [quota.policy]}

    @staticmethod
    def _detail(quota: Quota) -> str:
        return (
            f"the limit {quota.policy} of {quota.amount} requests in {quota.window_s} s is used up; "
            f"try again in {quota.reset_s} s"
        )


class TooManyFailures(RateLimited):
    """Credentials from this address were refused too often."""

    code = "too_many_failures"

    @staticmethod
    def _detail(quota: Quota) -> str:
        return (
            f"credentials from this address were refused {quota.amount} times in {quota.window_s} s; "
            f"try again in {quota.reset_s} s"
        )


class CounterStorage(Storage):
    """A storage of `limits` that holds a bounded number of counters and starts no task for it."""

    STORAGE_SCHEME = ["async+loadledger"]  # noqa: RUF012 -- as the base class declares it

    def __init__(self, clock: Callable[[], float], capacity: int = MAX_COUNTERS) -> None:
        super().__init__()
        self._clock = clock
        self._capacity = capacity
        self._counters: OrderedDict[str, tuple[int, float]] = OrderedDict()

    @property
    def base_exceptions(self) -> type[Exception]:
        """Return what a failing storage raises: this one does not fail."""
        return ValueError

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        """Count, in a window that begins with the first one counted."""
        count, expires_at = self._live(key) or (0, self._clock() + expiry)
        self._counters[key] = (count + amount, expires_at)
        self._counters.move_to_end(key)
        if len(self._counters) > self._capacity:
            self._counters.popitem(last=False)
        return count + amount

    async def get(self, key: str) -> int:
        """Return the count in the present window."""
        counter = self._live(key)
        return counter[0] if counter is not None else 0

    async def get_expiry(self, key: str) -> float:
        """Return when the present window ends."""
        counter = self._live(key)
        return counter[1] if counter is not None else self._clock()

    async def check(self) -> bool:
        """Return that it works."""
        return True

    async def reset(self) -> int:
        """Forget everything."""
        count = len(self._counters)
        self._counters.clear()
        return count

    async def clear(self, key: str) -> None:
        """Forget one counter."""
        self._counters.pop(key, None)

    def _live(self, key: str) -> tuple[int, float] | None:
        counter = self._counters.get(key)
        if counter is not None and counter[1] <= self._clock():
            del self._counters[key]
            return None
        return counter


class RateLimits:
    """All limits of one server."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._window = FixedWindowRateLimiter(CounterStorage(clock))
        # Of its own, so that a flood from many addresses cannot push the subjects' counters out.
        self._failure_window = FixedWindowRateLimiter(CounterStorage(clock))
        self._failures = _parsed(config.limit_auth_failures)
        self._limits = {
            LimitClass.READS: _parsed(config.limit_reads),
            LimitClass.MANAGEMENT: _parsed(config.limit_management),
            LimitClass.INFERENCE: _parsed(config.limit_inference),
        }

    async def count(self, limit: LimitClass, subject: str) -> Quota | None:
        """Count a request; return what is left, None where nothing limits it.

        Raises:
            RateLimited: nothing was left (`rate_limited`).
        """
        item = self._limits.get(limit)
        if item is None:
            return None
        allowed = await self._window.hit(item, limit.value, subject)
        quota = await self._quota(self._window, item, limit.value, subject)
        if not allowed:
            raise RateLimited(quota)
        return quota

    async def check_peer(self, peer: str | None) -> None:
        """Refuse an address whose credentials were refused too often.

        Raises:
            TooManyFailures: it is one (`too_many_failures`).
        """
        if self._failures is None:
            return
        address = peer_of(peer)
        if not await self._failure_window.test(self._failures, address):
            raise TooManyFailures(
                await self._quota(self._failure_window, self._failures, AUTH_FAILURES, address)
            )

    async def count_failure(self, peer: str | None) -> None:
        """Count refused credentials against the address they came from."""
        if self._failures is not None:
            await self._failure_window.hit(self._failures, peer_of(peer))

    async def _quota(
        self, window: FixedWindowRateLimiter, item: limits.RateLimitItem, policy: str, who: str
    ) -> Quota:
        identifiers = (who,) if policy == AUTH_FAILURES else (policy, who)
        stats = await window.get_window_stats(item, *identifiers)
        reset_s = max(1, math.ceil(stats.reset_time - self._clock()))
        return Quota(policy, item.amount, item.get_expiry(), stats.remaining, reset_s)


async def add_quota_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Tell a client what is left of its limit; for `app.on_response_prepare`."""
    quota = request.get(QUOTA)
    if quota is not None:
        response.headers.update(quota.headers())


@lru_cache(maxsize=1024)
def peer_of(address: str | None) -> str:
    """Return whom an address stands for: an IPv6 host has a whole /64 to choose addresses from."""
    if address is None:
        return "local"  # a Unix socket
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((parsed, 64), strict=False))


def _parsed(notation: str) -> limits.RateLimitItem | None:
    return None if notation == OFF else limits.parse(notation)
