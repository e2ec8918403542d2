"""What a route is: its path and handler, who may call it and which limit counts it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler


class Access(Enum):
    """Who may call a route. The value is the roles of which one is enough; PUBLIC needs no token."""

    PUBLIC = frozenset[str]()
    ANY = frozenset({"admin", "predict", "audit"})
    ADMIN = frozenset({"admin"})
    PREDICT = frozenset({"predict", "admin"})
    AUDIT = frozenset({"audit", "admin"})


class LimitClass(Enum):
    """Which of the per-subject limits counts a route. NONE is for routes without a subject."""

    NONE = "none"
    READS = "reads"
    MANAGEMENT = "management"
    INFERENCE = "inference"


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path."""

    method: str
    path: str
    handler: Handler
    access: Access
    limit: LimitClass

    @property
    def name(self) -> str:
        """What the route does, as the ledger says it of who was refused."""
        return f"{self.method} {self.path}"


RouteTable = Mapping[web.AbstractRoute, Route]

ROUTES: web.AppKey[RouteTable] = web.AppKey("routes", Mapping)
"""From the framework's matched route to ours."""


def add_routes(app: web.Application, routes: Iterable[Route]) -> None:
    """Register routes and remember them under `ROUTES`; HEAD comes with each GET. Call it once per app."""
    table: dict[web.AbstractRoute, Route] = {}
    for route in routes:
        resource = app.router.add_resource(route.path)
        methods = (hdrs.METH_GET, hdrs.METH_HEAD) if route.method == hdrs.METH_GET else (route.method,)
        for method in methods:
            added = resource.add_route(method, route.handler, expect_handler=_ask_for_body)
            table[added] = route
    app[ROUTES] = MappingProxyType(table)


def matched_route(request: web.Request) -> Route | None:
    """Return the route a request was matched to; None for unknown paths and wrong methods."""
    return request.app[ROUTES].get(request.match_info.route)


async def _ask_for_body(request: web.Request) -> None:
    # RFC 9110 section 10.1.1 allows to ignore other expectations; the framework would answer 417 as text.
    if request.headers[hdrs.EXPECT].lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # nothing of the answer has been sent yet
