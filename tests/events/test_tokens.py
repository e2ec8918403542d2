"""Issued and revoked tokens: decisions, the fold, and what restarts and verification make of it."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from msgspec.structs import replace
from support.history import START, at, opened, steady
from support.ledgers import change_ledger

from events.accept import accept
from events.audit.verify import FindingKind, verify
from events.clock import add_seconds
from events.commands import Accepted, Command, Existing, Refused
from events.registercommands import IssueToken, RevokeToken
from events.registers import Registers
from events.sqlite import storage
from events.state import State, Transaction
from events.tokens import (
    KEPT_AFTER_EXPIRY_S,
    MAX_TOKENS,
    SWEEP_EVERY,
    Token,
    evolve_tokens,
    find_issued,
    is_refused,
    list_issuers,
)
from events.types import Event, SignInLinkUsed, TokenData, TokenIssued, TokenRevoked

BOB = TokenIssued("t1", "bob", ("admin",), at(600), "api")
BY_BOB = TokenIssued("t2", "eve", ("admin",), at(600), "api", "t1")
REVOKED, FOREIGN = TokenRevoked("t1"), TokenRevoked("t1", at(600))
ISSUED_BY_T1 = {  # t1 > t2 > session t3 > session t4; t5 is of another one
    "t1": Token("t1", "bob", ("admin",), at(600), 1),
    "t2": Token("t2", "eve", (), at(600), 2, via="api", issued_with="t1"),
    "t3": Token("t3", "eve", (), at(600), 3, via="link", issued_with="t2"),
    "t4": Token("t4", "eve", (), at(600), 4, via="link", issued_with="t3"),
    "t5": Token("t5", "eve", (), at(600), 5, via="link", issued_with="t0"),
}


ISSUED = Token("t1", "bob", ("admin",), at(600), 1, at(1), "by1", "api")
REVOKED_TOKEN = replace(ISSUED, revoked_at=at(2), revoked_by="by2")
UNKNOWN = Token("t1", None, (), at(600), 1, revoked_at=at(1), revoked_by="by1")


def fold(*facts: TokenData) -> Token | None:
    tokens = dict[str, Token]()
    for position, data in enumerate(facts, 1):
        evolve(tokens, data, position, at(position), f"by{position}")
    return next(iter(tokens.values()), None)


def evolve(
    tokens: dict[str, Token], data: TokenData, position: int, now: str, actor: str = "a"
) -> Mapping[str, Token | None]:
    return evolve_tokens(tokens, Event(position, "e", data, actor, now), data)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ((BOB,), ISSUED),
        ((BOB, REVOKED), REVOKED_TOKEN),
        ((BOB, REVOKED, BOB), REVOKED_TOKEN),
        ((FOREIGN,), UNKNOWN),
        ((FOREIGN, BOB), UNKNOWN),
        ((REVOKED,), None),
    ],
)
def test_token_folds_to_its_state(facts: tuple[TokenData, ...], expected: Token | None) -> None:
    assert fold(*facts) == expected


def test_revoked_token_ends_its_sessions_alone() -> None:
    tokens = dict(ISSUED_BY_T1)
    assert find_issued(tokens, "t1") == ["t2", "t3", "t4"]
    evolve(tokens, TokenRevoked("t1"), 6, at(6))
    assert [jti for jti in tokens if is_refused(tokens, jti)] == ["t1"]
    evolve(tokens, TokenRevoked("t2"), 7, at(7))
    assert [jti for jti in tokens if is_refused(tokens, jti)] == ["t1", "t2", "t3", "t4"]
    assert find_issued(tokens, "t1") == ["t3", "t4"]


def test_forged_ring_of_tokens_is_read_to_its_end() -> None:
    ring = {each: Token(each, "x", (), at(9), 1, via="link", issued_with=of) for each, of in ("ab", "ba")}
    assert not is_refused(ring, "a")
    assert find_issued(ring, "a") == ["b"]


def test_expired_tokens_leave_the_fold() -> None:
    tokens: dict[str, Token] = {}
    for position in range(1, 10 * SWEEP_EVERY):
        data = TokenIssued(f"t{position}", "bob", (), add_seconds(at(position * 3600), -KEPT_AFTER_EXPIRY_S))
        changed = evolve(tokens, data, position, at(position * 3600))
        assert all((changed[key] is None) == (key not in tokens) for key in changed)
        assert len(tokens) < SWEEP_EVERY
    revoked = TokenRevoked("late", at(1e9))
    evolve(tokens, revoked, position, at(1e8))
    assert tokens["late"].is_revoked


def test_expired_token_stays_while_what_came_from_it_is_valid() -> None:
    tokens: dict[str, Token] = {}
    chain = [("a", at(1e9), None), ("m", at(3), "a"), ("s", at(4), "m"), ("l", at(1e7), "s")]
    others = [(f"n{each}", at(5), None) for each in range(3 * SWEEP_EVERY)]
    for position, (jti, expires_at, of) in enumerate([*chain, *others], 1):
        data, hours = TokenIssued(jti, "x", (), expires_at, "api", of), at(position * 3600)
        evolve(tokens, data, position, hours, "x")
    assert find_issued(tokens, "a") == ["m", "s", "l"]
    assert list_issuers(tokens, "l") == ("x",)
    last = TokenIssued("z", "x", (), at(1e9), "api")
    for _ in range(SWEEP_EVERY):  # the number of tokens passes a multiple of it
        evolve(tokens, last, 1000, at(1e8), "x")
        last = replace(last, jti=last.jti + "z")
    assert not {"m", "s", "l"} & tokens.keys()


def state_of(*facts: TokenData, count: int = 0, expires_at: str = "") -> State:
    token = fold(*facts)
    others = {f"n{number}": Token(f"n{number}", "x", (), expires_at, number) for number in range(count)}
    return State(registers=Registers(others if token is None else {**others, token.id: token}))


ISSUE = IssueToken(BOB, "alice")
CHAIN = State(registers=Registers(ISSUED_BY_T1))


@pytest.mark.parametrize(
    ("state", "command", "expected"),
    [
        (state_of(), ISSUE, [BOB]),
        (state_of(), IssueToken(BOB, "alice", "l1"), [SignInLinkUsed("l1"), BOB]),
        (state_of(BOB, REVOKED), IssueToken(BY_BOB, "bob"), "invalid_token"),
        (state_of(BOB), IssueToken(BY_BOB, "alice"), [BY_BOB]),
        (state_of(count=MAX_TOKENS, expires_at=at(9)), ISSUE, "too_many_tokens"),
        (state_of(count=MAX_TOKENS, expires_at=at(5)), ISSUE, [BOB]),
        (state_of(BOB), RevokeToken("t1", "alice", at(900)), [REVOKED]),
        (state_of(BOB, REVOKED), RevokeToken("t1", "alice"), "existing"),
        (state_of(), RevokeToken("t1", "alice"), "unknown_token"),
        (state_of(), RevokeToken("t1", "alice", at(600)), [FOREIGN]),
        (CHAIN, RevokeToken("t1", "alice", with_issued=True), [*map(TokenRevoked, ("t1", "t2", "t3", "t4"))]),
        (CHAIN, RevokeToken("t4", "alice", with_issued=True), [TokenRevoked("t4")]),
    ],
)
def test_command_about_token_is_decided(state: State, command: Command, expected: object) -> None:
    match accept(state, command, lambda: "new", at(5)):
        case Accepted(drafts, None):
            assert [draft.data for draft in drafts] == expected
            assert {draft.actor for draft in drafts} == {"alice"}
        case Refused(code):
            assert code == expected
        case Existing(None):
            assert expected == "existing"
        case other:
            pytest.fail(str(other))


async def write(path: Path, *commands: Command, runs: bool = True) -> dict[str, Token]:
    """Append to a ledger, as a server that runs and stops or as a command, and return its tokens."""
    async with opened(path, **steady(lambda: START)) as log:
        if runs:
            await log.server_started()
        for command in commands:
            await log.submit(command)
        if runs:
            await log.server_stopped()
        return dict(log.state.registers.tokens)


async def test_revocation_survives_restart_and_rebuild(path: Path) -> None:
    known = await write(path, ISSUE, RevokeToken("t1", "carol"), RevokeToken("idp", "carol", at(900)))
    assert [token.is_revoked for token in known.values()] == [True, True]
    other = TokenIssued("t2", "eve", ("audit",), at(600))
    last = await write(path, IssueToken(other, "alice"))
    assert last == await write(path, runs=False)
    assert verify(path).verified
    for statement, problem in (
        ("DELETE FROM tokens WHERE id = 't1'", "the stored tokens lack 't1'"),
        ("UPDATE tokens SET body = replace(body, 'carol', 'dave')", "tokens differ"),
        ("UPDATE tokens SET body = '{}'", "tokens differ"),
    ):
        change_ledger(path, statement)
        finding = verify(path).finding
        assert finding is not None
        assert finding.kind is FindingKind.PROJECTIONS
        assert problem in finding.problem
    assert len(storage.rebuild_file(path).differences) == 3
    assert await write(path, runs=False) == last
    assert [is_refused(last, each) for each in ("t1", "idp", "t2")] == [True, True, False]
    assert verify(path).verified


def test_group_that_fails_changes_no_token() -> None:
    state = state_of(BOB)
    attempt = Transaction(state)
    attempt.apply(Event(2, "e", REVOKED, "carol", at(2)))
    assert not state.registers.tokens["t1"].is_revoked
    assert attempt.state.registers.tokens["t1"].is_revoked
    attempt.commit()
    assert state.registers.tokens["t1"].is_revoked
