"""Texts of a server's, which are not trusted, as they can be told: in a line, and in bounds."""

from __future__ import annotations


def clean(text: str, most: int) -> str:
    """Return a text that can be printed: in one line, without control characters, not too long."""
    short = text if len(text) <= most else f"{text[: most - 1]}…"
    return "".join(letter if letter.isprintable() else " " for letter in short)
