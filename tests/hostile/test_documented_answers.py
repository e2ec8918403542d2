"""Requests that schemathesis makes of the server's own openapi.yaml, right and wrong ones, with each role."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from random import Random
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from support import models
from support.fleet import SOAK, UNLIMITED, as_text, check_ledger, new_dice, tell
from support.servers import Server, limited, serving

from server.config import Config

ROLE_S = 30.0
"""For each role; an operation under way then is finished."""
EXAMPLES = 3
"""Of each operation and mode, before the next operation's turn."""
REQUEST_S = 90.0
"""More than `Prefer: wait` allows."""
STREAM = "/api/v1/events/stream"
"""Its answers do not end; `hostile.conversations` has it."""
CHECKS = {
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "ignored_auth",
}
OF_ANY_ROUTE = {414, 431}
"""Refusals before there is a route, which the document's description has."""


@pytest.mark.skipif(not SOAK, reason="takes long, and `make hostile` runs it")
async def test_answers_are_as_documented_for_each_role(config: Config) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="`make hostile` installs it")
    dice = new_dice()
    for version in (1, 2):
        models.save(models.add(version), config.repository, "digits", version)
    models.save_bytes(models.TEXT, config.repository, "invalid")
    command = limited(limit_auth_failures="off", timeout_s=30)
    async with serving(config, *UNLIMITED, command=command) as server:
        await server.api.load("digits")
        document = yaml.load((await server.api.get("/openapi.yaml", roles=())).body, yaml.CSafeLoader)
        del document["paths"][STREAM]
        schema = schemathesis.openapi.from_dict(document)
        for roles in (("infer",), ("audit",), ("admin",), ()):
            counts = await asyncio.to_thread(_send_all, schemathesis, schema, server, roles, dice)
            tell(f"{'no token' if not roles else roles[0]}: {as_text(counts)}")
        assert (await server.api.get("/health/ready")).status == 200
        assert await server.stop() == 0
        output = server.output.read_text()
    assert "Traceback" not in output
    assert "ERROR" not in output, output[-4000:]
    await check_ledger(config, (), failures=None)


def _send_all(
    schemathesis: Any, schema: Any, server: Server, roles: tuple[str, ...], dice: Random
) -> Counter[str]:
    """Send requests of one role to all operations, again and again; returns the counts of statuses."""
    headers = {"Authorization": f"Bearer {server.api.token(*roles)}"} if roles else {}
    checks = [check for check in schemathesis.checks.CHECKS.get_all() if check.__name__ in CHECKS]
    statuses, until = Counter[str](), time.monotonic() + ROLE_S

    def send(case: Any) -> None:
        answer = case.call(base_url=server.url, headers=headers, timeout=REQUEST_S)
        statuses[str(answer.status_code)] += 1
        assert answer.status_code < 500 or answer.status_code == 503, (case.as_curl_command(), answer.content)
        if answer.status_code not in OF_ANY_ROUTE:
            case.validate_response(answer, checks=checks)

    while time.monotonic() < until:
        for strategy in _strategies(schemathesis, schema):
            _send_examples(strategy, send, dice.randrange(2**32))
            if time.monotonic() > until:
                break
    return statuses


def _strategies(schemathesis: Any, schema: Any) -> Iterator[Any]:
    for found in schema.get_all_operations():
        for mode in schemathesis.GenerationMode:
            yield found.ok().as_strategy(generation_mode=mode)


def _send_examples(strategy: Any, send: Any, number: int) -> None:
    chosen = settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    with suppress(Unsatisfiable):  # without parameters and body, nothing can be wrong
        seed(number)(chosen(given(case=strategy)(send)))()
