"""Somebody with a copy of an admin's token, who makes others of it before it expires or is revoked."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support.history import opened, steady
from support.http import Answer, LocalApi, local_server

from events.clock import format_timestamp
from events.registercommands import IssueToken
from events.tokens import SWEEP_EVERY
from events.types import TokenIssued
from server.api.tokens import MAX_TOKEN_S
from server.auth.keys import ensure_data_dir, sign_token


async def ask(api: LocalApi, token: str, path: str, body: dict[str, Any]) -> Answer:
    headers = {"Authorization": f"Bearer {token}"}
    return await api.send("POST", path, roles=(), headers=headers, json=body)


async def works(api: LocalApi, token: str) -> bool:
    answer = await api.send("GET", "/api/v1/models", roles=(), headers={"Authorization": f"Bearer {token}"})
    return answer.status == 200


async def stolen(api: LocalApi, expires_s: int) -> dict[str, Any]:
    body = {"subject": "ops", "roles": ["admin"], "expires_s": expires_s}
    answer = await api.post("/api/v1/tokens", json=body)
    taken: dict[str, Any] = answer.json
    return taken


async def session_of(api: LocalApi, token: str) -> Answer:
    link = await ask(api, token, "/api/v1/sign-in-links", {})
    code = link.json["path"].removeprefix("/#sign-in=")
    return await api.post("/api/v1/sign-in-links/use", roles=(), json={"code": code})


async def test_session_ends_no_later_than_the_token_that_made_it(tmp_path: Path) -> None:
    async with local_server(tmp_path) as api:
        short = await stolen(api, 60)
        session = (await session_of(api, short["token"])).json
        assert session["expires_at"] <= short["expires_at"]


async def test_revoked_token_takes_along_what_it_made(tmp_path: Path) -> None:
    async with local_server(tmp_path) as api:
        taken = await stolen(api, 600)
        session = (await session_of(api, taken["token"])).json
        child = await ask(
            api, session["token"], "/api/v1/tokens", {"subject": "x", "roles": ["admin"], "expires_s": 9999}
        )
        assert child.status == 201
        path = f"/api/v1/tokens/{taken['jti']}/revoke"
        revoked = (await api.post(path)).json
        assert not await works(api, session["token"])
        assert revoked["issued"] == [session["jti"], child.json["jti"]]  # it says what is left
        assert await works(api, child.json["token"])
        assert (await api.post(path, json={"issued": True})).json["issued"] == []
        assert not await works(api, child.json["token"])


@pytest.mark.parametrize("wanted", [MAX_TOKEN_S + 1, 3_000_000_000])
async def test_no_token_outlives_the_longest_life(tmp_path: Path, wanted: int) -> None:
    async with local_server(tmp_path) as api:
        taken = await stolen(api, 600)
        body = {"subject": "ops", "roles": ["admin"], "expires_s": wanted}
        refused = await ask(api, taken["token"], "/api/v1/tokens", body)
        assert refused.refusal == (400, "invalid_body")
        assert f"at most {MAX_TOKEN_S} s" in refused.json["detail"]
        body["expires_s"] = MAX_TOKEN_S
        assert (await ask(api, taken["token"], "/api/v1/tokens", body)).status == 201


async def test_revoking_a_token_reaches_what_forgotten_ones_issued(tmp_path: Path) -> None:
    """The stolen token issues one for two seconds, which issues one for a year, two days ago."""
    data, began = tmp_path / "data", datetime.now(UTC) - timedelta(days=2)
    ensure_data_dir(data)
    clock, lives_s = [began], {"stolen": 30 * 86_400, "middle": 2, "last": 360 * 86_400}
    async with opened(data / "ledger.db", **steady(lambda: clock[0])) as log:
        issued_with = None
        for jti, life_s in lives_s.items():
            until = format_timestamp(began + timedelta(seconds=life_s))
            token = TokenIssued(jti, "ops", ("admin",), until, "api", issued_with)
            await log.submit(IssueToken(token, "ops"))
            issued_with = jti
        clock[0] = datetime.now(UTC)
        for number in range(2 * SWEEP_EVERY):  # those that expired long ago are forgotten
            short = TokenIssued(f"other{number}", "x", (), format_timestamp(began), "api")
            await log.submit(IssueToken(short, "x"))
    async with local_server(tmp_path) as api:
        audience = api.config.jwt_audience
        last = sign_token(data, "ops", ["admin"], expires_s=9_999, audience=audience, jti="last")
        assert await works(api, last)
        revoked = await api.post("/api/v1/tokens/stolen/revoke", json={"issued": True})
        assert revoked.status == 200
        assert not await works(api, last)
