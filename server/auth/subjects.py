"""The subjects of tokens: printable names, except those of the server and of its machine's users.

`system` is the server, and `local:NAME` is a user of the server's machine (`server.auth.control`). Events
have the subject as their actor.
"""

import pwd
import unicodedata

from events.types import SYSTEM

LOCAL = "local:"
"""Beginning of the actor of a user of this machine, followed by the user's name, or number without one."""

MAX_SUBJECT_CHARACTERS = 128
"""Every event has its actor: longer ones would make the ledger grow."""


def subject_refusal(subject: str, *, is_own: bool = False) -> str | None:
    """Return why a text cannot be a subject, or None.

    With `is_own`, the subject is that of a token of the server, which users of its machine get as
    `local:NAME`.
    """
    if not 1 <= len(subject) <= MAX_SUBJECT_CHARACTERS:
        return f"the subject must have 1 to {MAX_SUBJECT_CHARACTERS} characters"
    if not subject.isprintable():
        return "the subject must be printable"
    if subject.strip() != subject:
        return "the subject must not begin or end with a blank: it would read as another"
    plain = unicodedata.normalize("NFKC", subject).casefold()
    if plain == SYSTEM:
        return f"the subject {SYSTEM} is the server's own, however it is written"
    if plain.startswith(LOCAL) and not (is_own and subject.startswith(LOCAL) and subject.isascii()):
        return f"subjects that begin with {LOCAL} are of the users of the server's machine"
    return None


def local_actor(user: int) -> str:
    """Return the actor of a user of this machine: the name, or the number if the name cannot be an actor."""
    try:
        named = f"{LOCAL}{pwd.getpwuid(user).pw_name}"
    except KeyError:
        return f"{LOCAL}{user}"
    return named if subject_refusal(named, is_own=True) is None else f"{LOCAL}{user}"
