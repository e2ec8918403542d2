"""The subjects of tokens: printable, without invisible characters, and not to be mistaken for others.

`system` is the server's own, and `local:NAME` is a user of the server's machine (`server.auth.control`).

Events have the subject as their actor, and people read it there: what it looks like is what counts.
"""

import pwd
import re
import unicodedata

from events.types import SYSTEM

LOCAL = "local:"
"""How the actor of a user of this machine begins: the rest is the user's name, or number without one."""

MAX_SUBJECT_CHARACTERS = 128
"""Every event has its actor: longer ones would make the ledger grow."""

_IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""The 4,174 characters that are shown as nothing: zero-width ones, fillers, variation selectors, tags.

Property Default_Ignorable_Code_Point of Unicode 17.0 (DerivedCoreProperties.txt), which the standard library
does not have. Reserved characters are in it already, so new versions of Unicode rarely change it.
"""

_LOOKALIKES = str.maketrans(
    {
        letter: latin
        for latin, letters in {
            "s": "\u0455\ua731",
            "y": "\u0443\u04af\u03b3\u03c5\u028f",
            "t": "\u0442\u03c4\u1d1b",
            "e": "\u0435\u03b5\u1d07",
            "m": "\u043c\u03bc\u1d0d",
            "l": "i1\u04cf\u029f\u0131",
            "o": "0\u043e\u03bf\u1d0f",
            "c": "\u0441\u03f2\u1d04",
            "a": "\u0430\u03b1\u1d00",
            ":": "\u02d0\u0589\u05c3\u2236\ua789",
        }.items()
        for letter in letters
    }
)
"""Cyrillic and Greek letters, and small capitals, that look like those of `system` or `local:`.

The source is confusables.txt of UTS #39, for the alphabets of common keyboards.
"""

_BLANKS = " \u2800"
"""Of what is printable: the space, and the Braille pattern without dots."""


def subject_refusal(subject: str, *, is_own: bool = False) -> str | None:
    """Return why this cannot be a subject; None if it can. Events have it as their actor.

    With `is_own` it is that of a token that the server signed: users of its machine get some as `local:NAME`.
    """
    if not 1 <= len(subject) <= MAX_SUBJECT_CHARACTERS:
        return f"the subject must have 1 to {MAX_SUBJECT_CHARACTERS} characters"
    if (ignorable := _IGNORABLE.search(subject)) is not None:
        return f"the subject must not have U+{ord(ignorable[0]):04X}: it is invisible"
    if not subject.isprintable():
        return "the subject must be printable"
    if _reads_as(subject) == SYSTEM:
        return f"the subject {SYSTEM} is the server's own, however it is written"
    if _reads_as(subject).startswith(LOCAL) and not (is_own and subject.startswith(LOCAL)):
        return f"subjects that begin with {LOCAL} are of the users of the server's machine"
    if subject.strip(_BLANKS) != subject:
        return "the subject must not begin or end with a blank: it would read as another, or as nothing"
    return None


def local_actor(user: int) -> str:
    """Return the actor of a user of this machine: by name, or by number if no actor can have the name."""
    try:
        named = f"{LOCAL}{pwd.getpwuid(user).pw_name}"
    except KeyError:
        return f"{LOCAL}{user}"
    return named if subject_refusal(named, is_own=True) is None else f"{LOCAL}{user}"


def _reads_as(subject: str) -> str:
    """Return what a person reads: one form of each letter, in lower case, without blanks around."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", subject).casefold())
    return folded.translate(_LOOKALIKES).strip(_BLANKS)
