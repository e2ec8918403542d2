"""A process that keeps prepared forms, and is killed at random moments of it: again and again.

It is forked, so `main` is for a process that has one thread, and nothing else to do.
"""

import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from runtime.cache.store import ModelCache
from support.cache import check_whole, keep, key

NAMES = "abcdef"
LIMIT_BYTES = 400_000
"""Room for four of six forms, more or less."""
LIFE_S = 0.03
"""At most: some forms are kept in that time, and most lives end while one is."""


def main(folder: Path, lives: int, seed: int) -> None:
    """Have it live and die so often, and look at what is left each time, as a server does that starts.

    Prints what was seen; the first thing that is wrong ends this with an error.
    """
    dice, seen = random.Random(seed), Counter[str]()
    for _ in range(lives):
        _live(folder, dice.random(), dice.uniform(0, LIFE_S))
        seen["lives"] += 1
        seen["drafts left"] += len(list(folder.glob("draft-*")))
        _look(folder, seen)
    sys.stdout.write(" ".join(f"{name}={count}" for name, count in sorted(seen.items())) + "\n")


def _live(folder: Path, seed: float, seconds: float) -> None:
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _keep_for_ever(folder, random.Random(seed), told)
        finally:
            os._exit(1)  # whatever it was: who is not killed has failed
    os.close(told)
    os.read(ready, 1)
    os.close(ready)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def _keep_for_ever(folder: Path, dice: random.Random, told: int) -> None:
    store = ModelCache(folder, LIMIT_BYTES)
    store.open()
    os.write(told, b".")
    while True:
        name = dice.choice(NAMES)
        match dice.randrange(10):
            case 0:
                store.record_useless(key(name), {"prepacked": "slower"}, model_id=name, version=1)
            case 1:
                store.drop(key(name), "it killed its worker")
            case 2:
                store.clear(name)
            case _:
                keep(store, name, dice.randrange(1, 200_000), model_id=name, seed=str(dice.random()))


def _look(folder: Path, seen: Counter[str]) -> None:
    store = ModelCache(folder, LIMIT_BYTES)
    store.open()
    entries = store.entries()
    assert {path.name for path in folder.iterdir()} == {entry.key for entry in entries}
    assert sum(entry.bytes for entry in entries) <= LIMIT_BYTES
    for entry in entries:
        assert entry.key == key(entry.model_id)
        prepared = store.use(entry.key)
        assert (prepared is None) == (entry.form is None)
        if prepared is not None:
            assert prepared.sha256 == entry.sha256
            check_whole(prepared)
        seen["bare" if prepared is None else "forms"] += 1
