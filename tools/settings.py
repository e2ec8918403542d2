"""The table of settings in `docs/configuration.md`, from the fields of the configuration."""

from server.config import Setting, settings
from tools.markdown import table

BEGIN = "<!-- settings: written by `make generated` -->\n"
END = "<!-- end of settings -->\n"


def with_settings(page: str) -> str:
    """Return a page with the present table between its two marks.

    Raises:
        ValueError: it has no such marks.
    """
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    rows = table(("option", "variable", "default", "what"), map(_row, settings()))
    return f"{before}{BEGIN}\n{rows}\n{END}{after}"


def _row(setting: Setting) -> tuple[str, ...]:
    default = (
        "(required)" if setting.required else f"`{setting.default}`" if setting.default is not None else ""
    )
    return f"`{setting.flag}`", f"`{setting.variable}`", default, setting.help
