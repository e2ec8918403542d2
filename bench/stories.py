"""A ledger as a busy server leaves it: many models loaded and unloaded, some failures, and restarts."""

import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from events.clock import add_seconds
from events.codec import GENESIS, encode_event, hash_body
from events.sqlite import queries
from events.sqlite.queries import Row
from events.sqlite.schema import connect
from events.sqlite.storage import FOLDS
from events.state import Attempt, State
from events.types import (
    SYSTEM,
    Cause,
    Data,
    Draft,
    Durations,
    LoadedFile,
    LoadFailed,
    LoadParameters,
    LoadRequested,
    LoadStarted,
    ModelLoaded,
    ModelUnloaded,
    ServerStarted,
    UnloadRequested,
    UnloadStarted,
    record_draft,
)

MODELS = 100
GROUP = 256
# One start for so many facts, and one failed load for so many.
RESTARTS, FAILURES = 20_000, 20
START = "2026-01-01T00:00:00.000000Z"
APART_S = 0.25


def write(path: Path, facts: int) -> None:
    """Write a ledger of so many facts, through the writer's own statements but not synced to the disk."""
    state, digest, told = State(), GENESIS, stories()
    with closing(connect(path)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("UPDATE projected SET folds = ?", (FOLDS,))
        while state.position < facts:
            attempt, rows = Attempt(state), list[Row]()
            for _ in range(min(GROUP, facts - state.position)):
                position = attempt.state.position + 1
                event = record_draft(next(told), position, add_seconds(START, APART_S * position))
                body = encode_event(event)
                digest = hash_body(digest, body)
                rows.append(Row(position, body, digest))
                attempt.state.apply(event)
            queries.write_group(connection, rows, attempt.changes, len(state.models) + attempt.state.backlog)
            attempt.commit()


def stories() -> Iterator[Draft]:
    """Yield facts without end: several models at once, each loaded and unloaded again and again."""
    dice = random.Random(1)  # noqa: S311 - the same ledger each time
    under_way = [cycles(f"model-{number:03}", dice) for number in range(MODELS)]
    yield Draft(_id(dice), ServerStarted(unclean=False), SYSTEM)
    for number in range(1, 2**63):
        if number % RESTARTS == 0:
            yield Draft(
                _id(dice),
                ServerStarted(unclean=True, down_since=add_seconds(START, APART_S * number)),
                SYSTEM,
            )
        else:
            yield next(dice.choice(under_way))


def cycles(model_id: str, dice: random.Random) -> Iterator[Draft]:
    """Yield the facts of a model that is loaded and unloaded again and again."""
    while True:
        job, who = _id(dice), dice.choice(["alice@example.org", "bob@example.org", "scheduler", SYSTEM])
        version = dice.randint(1, 9)

        def fact(data: Data, actor: str = SYSTEM, event_id: str = "") -> Draft:
            return Draft(event_id or _id(dice), data, actor, job, model_id, version)  # noqa: B023 - used at once

        yield fact(LoadRequested.of(LoadParameters(), Cause.REQUEST), who, job)
        yield fact(LoadStarted(1))
        if dice.randrange(FAILURES) == 0:
            yield fact(
                LoadFailed("invalid_model", "the model cannot be loaded: Load model failed: bad graph")
            )
            continue
        yield fact(_loaded(dice))
        load, job = job, _id(dice)
        yield fact(UnloadRequested(dice.random() < 0.1, load, Cause.REQUEST), who, job)  # noqa: PLR2004 - some
        yield fact(UnloadStarted())
        yield fact(ModelUnloaded(dice.randrange(10**9), dice.randrange(5), 0))


def _loaded(dice: random.Random) -> ModelLoaded:
    names = ("model.onnx", "model.onnx.data")[: dice.randint(1, 2)]
    files = tuple(
        LoadedFile(name, dice.randrange(10**9), dice.randrange(10**18), dice.randbytes(32).hex())
        for name in names
    )
    part = dice.randrange(10**5)
    peak = dice.randrange(10**9)
    durations = Durations(part, part, part, part, part, part, 6 * part)
    return ModelLoaded(files, (_id(dice),), None, peak // 2, peak, durations)


def _id(dice: random.Random) -> str:
    text = dice.randbytes(16).hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
