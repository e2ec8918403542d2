"""Which subjects a token may have; older ledgers with others are read as before."""

import re
from itertools import chain
from pathlib import Path

import pytest
from support.history import MODEL, opened

from events.commands import RequestLoad
from events.sqlite.listing import open_reader
from server.auth.subjects import _IGNORABLE, subject_refusal

VALID = (
    "a", "x" * 128, "alice@example.org", "J\u00fcrgen M\u00fcller", "\u90e8\u7f72", "\U0001f43b",
    "system-test", "system:serviceaccount:models:ci", "my system", "systems", "s\u00fdstem",
    "\u0442\u0435\u0441\u0442",
)  # fmt: skip
UNPRINTABLE = ("a\nb", "a\0", "\ud800", "a\u2028b", "\ue000")
INVISIBLE = (
    "system\u200b", "al\u00adice", "\u202ealice", "alice\ufeff", "bear\ufe0f", "\u3164", "a\u115fb",
    "a\uffa0", "a\u034fb", "a\u2060b", "a\U000e0061b", "a\U000e0100", "a\u180eb", "\u061ca", "a\u17b5",
)  # fmt: skip
READ_AS_SYSTEM = (
    "system", "System", "SYSTEM", " system ", "\uff53ystem", "\U0001d42cystem", "\u017fystem",
    "\u24e2\u24e8\u24e2\u24e3\u24d4\u24dc", "s\u0443stem", "\u0405YSTEM", "SYS\u0422\u0415\u041c",
    "S\u03a5S\u03a4\u0395\u039c", "\ua731\u028f\ua731\u1d1b\u1d07\u1d0d", "system\u2800",
)  # fmt: skip
BLANK_AROUND = (" ", "\u2800", "alice ", " alice", "alice\u2800")


def test_valid_subjects_are_accepted() -> None:
    assert [subject for subject in VALID if subject_refusal(subject) is not None] == []


@pytest.mark.parametrize(
    ("subjects", "reason"),
    [
        (("", "x" * 129), "must have 1 to 128 characters"),
        (UNPRINTABLE, "must be printable"),
        (INVISIBLE, r"must not have U\+[0-9A-F]{4,6}: it is invisible"),
        (READ_AS_SYSTEM, "is the server's own, however it is written"),
        (BLANK_AROUND, "must not begin or end with a blank"),
    ],
    ids=["length", "unprintable", "invisible", "system", "blank"],
)
def test_invalid_subjects_are_refused_with_the_reason(subjects: tuple[str, ...], reason: str) -> None:
    assert [subject for subject in subjects if not re.search(reason, subject_refusal(subject) or "")] == []


def test_table_of_invisible_characters_is_unicodes() -> None:
    characters = "".join(map(chr, chain(range(0xD800), range(0xE000, 0x110000))))
    assert len(_IGNORABLE.findall(characters)) == 4174  # as DerivedCoreProperties.txt counts


async def test_ledger_with_a_subject_refused_today_is_folded_and_shown(tmp_path: Path) -> None:
    actor, path = "syst\ufe0fem", tmp_path / "ledger.db"
    async with opened(path) as log:
        await log.submit(RequestLoad(MODEL, 1, None, actor))
    async with opened(path) as log:
        (job,) = log.state.queues[MODEL]
        assert job.requested_by == actor
    async with open_reader(path) as reader:
        assert actor in [event.actor for event in await reader.events(0)]
