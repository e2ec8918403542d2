"""Write the generated files that are committed: `python -m tools.generate`, or `make generated`."""

from collections.abc import Mapping
from pathlib import Path

from server.app import all_routes
from server.openapi.document import openapi_yaml
from tools.commands import command_page
from tools.consoletables import console_tables
from tools.errors import error_page
from tools.events import event_page
from tools.pictures import pictures
from tools.protocol import DESCRIPTORS, descriptors
from tools.settings import with_settings

ROOT = Path(__file__).parent.parent


def pages() -> Mapping[str, str]:
    """Return each generated file's text by its path in the tree; the same code gives the same text."""
    configuration = "docs/configuration.md"  # only a part of it is generated
    return {
        "docs/cli.md": command_page(),
        configuration: with_settings((ROOT / configuration).read_text(encoding="utf-8")),
        "docs/reference/errors.md": error_page(),
        "docs/reference/events.md": event_page(),
        "openapi.yaml": openapi_yaml(all_routes()),
        "server/static/tables.js": console_tables(),
        **pictures(),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        (ROOT / path).write_text(text, encoding="utf-8")
    (ROOT / DESCRIPTORS).write_bytes(descriptors(ROOT))
