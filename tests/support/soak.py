"""Soak tests: a short form always runs, the long one with `SOAK=all`, as `make soak` has it."""

import os
import random
from typing import TypeVar

import pytest

T = TypeVar("T")

SOAK = os.environ.get("SOAK") == "all"
"""Whether the long forms run."""
soak_only = pytest.mark.skipif(not SOAK, reason="takes long, and `make soak` runs it")
"""For a test that has no short form."""


def of_both(*, short: T, long: T) -> T:
    """Return what the form that runs has."""
    return long if SOAK else short


def new_dice() -> random.Random:
    """Return the source of a test's random decisions, and print the seed that repeats them.

    The short form always has the same, the long one a new one each time; `SOAK_SEED` goes before both.
    """
    seed = int(os.environ.get("SOAK_SEED") or of_both(short=20261120, long=random.randrange(2**32)))
    tell(f"SOAK_SEED={seed} repeats the random decisions of this test")
    return random.Random(seed)


def tell(text: str) -> None:
    """Print what happened: `make soak` shows it, otherwise it stands beside a failure."""
    print(text)  # noqa: T201 - see above
