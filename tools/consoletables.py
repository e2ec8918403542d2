"""The tables of event texts and of advice for failed loads, as a module of the console."""

import json
from collections.abc import Mapping

from events.eventtext import EVENT_TEXTS, HASH_DIGITS
from events.jobs import CONSEQUENCES
from tools.errors import ADVICE


def console_tables() -> str:
    """Return the script."""
    texts = {
        kind: {"parts": text.parts, "tone": text.tone, "badIf": text.bad_if}
        for kind, text in EVENT_TEXTS.items()
    }
    advice = {code: ADVICE[code].replace("`", "") for code in CONSEQUENCES}
    return (
        "// Generated from events/eventtext.py, which says what a part is, and tools/errors.py.\n\n"
        f"export const HASH_DIGITS = {HASH_DIGITS};\n\n"
        f"export const EVENT_TEXTS = {{\n{_rows(texts)}}};\n\n"
        f"// By the code of a failed load.\nexport const ADVICE = {{\n{_rows(advice)}}};\n"
    )


def _rows(table: Mapping[str, object]) -> str:
    return "".join(f"  {name}: {json.dumps(value, ensure_ascii=False)},\n" for name, value in table.items())
