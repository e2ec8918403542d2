"""The table of `events.eventtext` as a module of the console."""

import json

from events.eventtext import EVENT_TEXTS, HASH_DIGITS


def event_table() -> str:
    """Return the script."""
    rows = (
        f"  {kind}: {json.dumps({'parts': text.parts, 'tone': text.tone, 'badIf': text.bad_if})},"
        for kind, text in EVENT_TEXTS.items()
    )
    return (
        "// Generated from events/eventtext.py, which says what a part is; a test holds this file to it.\n\n"
        f"export const HASH_DIGITS = {HASH_DIGITS};\n\nexport const EVENT_TEXTS = {{\n"
        + "\n".join(rows)
        + "\n};\n"
    )
