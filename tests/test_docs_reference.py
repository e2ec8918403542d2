"""The reference pages are what the code says, and what they add to that is held to it."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from support.pages import BLOCK

from events.bodies import to_body
from events.types import SYSTEM, TYPES, Cause, Event, ServerStopped
from runtime.errors import UnknownModel
from server.config import settings
from server.docs.errorreference import ADVICE
from server.docs.eventreference import BY, CAUSES, MEMBERS
from server.docs.markdown import slug
from server.docs.reference import reference_pages
from server.errors import ERRORS, problem_of, problem_response

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs/reference"
HISTORIES = sorted((ROOT / "tests/histories").glob("*.jsonl"))
COMMAND = "python -m server.docs.reference docs/reference"


@pytest.mark.parametrize("name", ["events.md", "errors.md"])
def test_a_page_is_what_the_code_generates(name: str) -> None:
    assert (REFERENCE / name).read_text(encoding="utf-8") == reference_pages()[name], f"run `{COMMAND}`"


def test_the_command_writes_the_pages(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "server.docs.reference", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == reference_pages()


@pytest.mark.parametrize("name", ["events.md", "errors.md"])
def test_headings_that_are_linked_to_have_names_of_their_own(name: str) -> None:
    headings = re.findall(r"^#+ (.*)$", reference_pages()[name], re.MULTILINE)
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
    [(kind, shown)] = BLOCK.findall((REFERENCE / "errors.md").read_text(encoding="utf-8"))
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
