"""Somebody with a copy of an admin's token, who makes others of it before it expires or is revoked."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from support.history import opened, steady
from support.http import Answer, LocalApi, local_server

from events.clock import format_timestamp
from events.registercommands import IssueToken
from events.tokens import SWEEP_EVERY
from events.types import TokenIssued
from server.api.tokens import MAX_TOKEN_S
from server.auth.keys import ensure_data_dir, sign_token

OPS = {"subject": "ops", "roles": ["admin"]}


async def ask(api: LocalApi, token: str, path: str, body: dict[str, Any]) -> Answer:
    headers = {"Authorization": f"Bearer {token}"}
    return await api.send("POST", path, roles=(), headers=headers, json=body)


async def works(api: LocalApi, token: str) -> bool:
    answer = await api.send("GET", "/api/v1/models", roles=(), headers={"Authorization": f"Bearer {token}"})
    return answer.status == 200


async def test_session_ends_with_the_token_that_made_it(tmp_path: Path) -> None:
    async with local_server(tmp_path) as api:
        taken = (await api.post("/api/v1/tokens", json=OPS | {"expires_s": 600})).json
        link = await ask(api, taken["token"], "/api/v1/sign-in-links", {})
        code = link.json["path"].removeprefix("/#sign-in=")
        session = (await api.post("/api/v1/sign-in-links/use", roles=(), json={"code": code})).json
        assert session["expires_at"] <= taken["expires_at"]
        too_long = await ask(api, session["token"], "/api/v1/tokens", OPS | {"expires_s": MAX_TOKEN_S + 1})
        assert f"at most {MAX_TOKEN_S} s" in too_long.json["detail"]
        child = await ask(api, session["token"], "/api/v1/tokens", OPS | {"expires_s": MAX_TOKEN_S})
        assert child.status == 201
        path = f"/api/v1/tokens/{taken['jti']}/revoke"
        revoked = (await api.post(path)).json
        assert revoked["issued"] == [session["jti"], child.json["jti"]]  # it says what is left
        assert [await works(api, each) for each in (session["token"], child.json["token"])] == [False, True]
        assert (await api.post(path, json={"issued": True})).json["issued"] == []
        assert not await works(api, child.json["token"])


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
