"""The table of settings in `docs/configuration.md`, from the fields of the configuration."""

from server.config import SECTIONS, Setting, settings
from tools.markdown import table

BEGIN = "<!-- settings: written by `make generated` -->\n"
HEAD = ("option", "variable", "default", "what")
END = "<!-- end of settings -->\n"


def with_settings(page: str) -> str:
    """Return a page with the present table between its two marks.

    Raises:
        ValueError: it has no such marks.
    """
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    known = {setting.name: setting for setting in settings()}
    parts = (
        f"### {title}\n\n{table(HEAD, (_row(known[name]) for name in names))}\n"
        for title, names in SECTIONS.items()
    )
    return f"{before}{BEGIN}\n{''.join(parts)}{END}{after}"


def _row(setting: Setting) -> tuple[str, ...]:
    default = f"`{setting.default}`" if setting.default is not None else ""
    return f"`{setting.flag}`", f"`{setting.variable}`", default, setting.help
