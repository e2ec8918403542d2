"""Which subjects a token may have."""

import re

import pytest

from server.auth.subjects import subject_refusal

VALID = (
    "a", "x" * 128, "alice@example.org", "J\u00fcrgen M\u00fcller", "\u90e8\u7f72", "\U0001f43b",
    "system-test", "system:serviceaccount:models:ci", "my system", "systems", "local",
    "\u0442\u0435\u0441\u0442",
)  # fmt: skip
UNPRINTABLE = (
    "a\nb", "a\0", "\ud800", "a\u2028b", "\ue000", "system\u200b", "al\u00adice", "\u202ealice",
    "alice\ufeff",
)  # fmt: skip
SYSTEMS = ("system", "System", "SYSTEM", "\uff53ystem", "\U0001d42cystem", "\u017fystem")
BLANK_AROUND = (" ", "alice ", " alice", " system ")
LOCALS = ("local:alice", "LOCAL:0", "\uff4cocal:alice", "local\uff1aalice")


def test_valid_subjects_are_accepted() -> None:
    assert [subject for subject in VALID if subject_refusal(subject) is not None] == []


@pytest.mark.parametrize(
    ("subjects", "reason"),
    [
        (("", "x" * 129), "must have 1 to 128 characters"),
        (UNPRINTABLE, "must be printable"),
        (SYSTEMS, "is the server's own, however it is written"),
        (BLANK_AROUND, "must not begin or end with a blank"),
        (LOCALS, "are of the users of the server's machine"),
    ],
    ids=["length", "unprintable", "system", "blank", "local"],
)
def test_invalid_subjects_are_refused_with_the_reason(subjects: tuple[str, ...], reason: str) -> None:
    assert [subject for subject in subjects if not re.search(reason, subject_refusal(subject) or "")] == []


def test_local_subject_is_accepted_as_written_by_the_server() -> None:
    accepted = [name for name in (*LOCALS, "local:J\u00fcrgen") if subject_refusal(name, is_own=True) is None]
    assert accepted == ["local:alice"]
