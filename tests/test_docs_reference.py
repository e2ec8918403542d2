"""What is generated is what the code says, and what they add to that is held to it."""

import json
import re
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from support.pages import BLOCK

from events.codec import to_body
from events.types import SYSTEM, TYPES, Cause, Event, ServerStopped
from runtime.errors import UnknownModel
from server.config import settings
from server.errors import ERRORS, problem_of, problem_response
from tools.errors import ADVICE
from tools.events import BY, CAUSES, MEMBERS
from tools.generate import pages
from tools.markdown import slug
from tools.settings import with_settings

ROOT = Path(__file__).parent.parent
HISTORIES = sorted((ROOT / "tests/histories").glob("*.jsonl"))
PAGES = pages()


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_what_the_code_generates(path: str) -> None:
    assert (ROOT / path).read_text(encoding="utf-8") == PAGES[path], "run `make generated`"


def test_a_page_of_settings_without_a_place_for_them_is_refused() -> None:
    with pytest.raises(ValueError, match="not enough values"):
        with_settings("# Configuration\n")


def test_the_table_of_settings_has_a_row_for_each() -> None:
    rows = [line for line in PAGES["docs/configuration.md"].splitlines() if line.startswith("| `--")]
    assert len(rows) == len(settings())
    for row, setting in zip(rows, settings(), strict=True):
        assert setting.flag in row
        assert setting.variable in row
        assert setting.help in row
        assert row.count("|") == 5


@pytest.mark.parametrize("name", ["errors", "events"])
def test_headings_that_are_linked_to_have_names_of_their_own(name: str) -> None:
    headings = re.findall(r"^#+ (.*)$", PAGES[f"docs/reference/{name}.md"], re.MULTILINE)
    assert {anchor for anchor, times in Counter(map(slug, headings)).items() if times > 1} == set()


def test_there_is_advice_for_every_error_and_for_nothing_else() -> None:
    assert set(ADVICE) == set(ERRORS)
    assert all(advice.endswith(".") for advice in ADVICE.values())


def test_the_options_that_the_advice_names_exist() -> None:
    flags = {setting.flag for setting in settings()}
    named = {flag for advice in ADVICE.values() for flag in re.findall(r"--[a-z-]+[a-z]", advice)}
    assert named - flags == {"--archive", "--limit"}  # of `loadledger replay`, and of all limits together


def test_the_error_that_the_page_shows_is_answered_so() -> None:
    problem = problem_of(UnknownModel("nothing"))
    body = problem_response(problem, "/api/v1/models/nothing").body
    assert isinstance(body, bytes)
    [(kind, shown)] = BLOCK.findall(PAGES["docs/reference/errors.md"])
    assert kind == "json"
    assert json.loads(shown) == json.loads(body)


def test_who_appends_is_said_of_every_type_and_every_cause_has_a_meaning() -> None:
    assert set(BY) == set(TYPES)
    assert set(CAUSES) == set(Cause)


def test_the_members_that_every_event_has_are_those_of_a_body() -> None:
    body = json.loads(to_body(Event(1, "id", ServerStopped(), SYSTEM, "2026-01-31T14:02:00.000000Z")))
    assert set(MEMBERS) == set(body)


@pytest.mark.parametrize("history", HISTORIES, ids=[path.stem for path in HISTORIES])
def test_the_actors_of_recorded_ledgers_are_those_that_the_page_says(history: Path) -> None:
    for line in history.read_bytes().splitlines():
        event = msgspec.json.decode(line)
        by, cause = BY[event["type"]], event["data"].get("cause")
        if cause is not None:
            assert (event["actor"] == SYSTEM) == (cause not in {"request", "demand"}), event
        else:
            assert (event["actor"] == SYSTEM) == (by == f"`{SYSTEM}`"), event
