"""Generated pages match the code, and what the generators add matches it too."""

import json
import re
from collections import Counter
from itertools import chain
from pathlib import Path

import msgspec
import pytest
from support.pages import BLOCK

from events.codec import encode_event
from events.types import SYSTEM, TYPES, Cause, Event, ServerStopped
from features.grpc.errors import STATUSES
from runtime.errors import UnknownModel
from server.config import SECTIONS, settings
from server.errors import ERRORS, problem_of, problem_response
from tools.errors import ADVICE
from tools.events import BY, CAUSES, MEMBERS
from tools.generate import pages
from tools.markdown import slug
from tools.protocol import DESCRIPTORS, descriptors

ROOT = Path(__file__).parent.parent
HISTORIES = sorted((ROOT / "tests/histories").glob("*.jsonl"))
PAGES = pages()


def test_committed_descriptors_are_generated() -> None:
    assert (ROOT / DESCRIPTORS).read_bytes() == descriptors(ROOT), "run `make generated`"


@pytest.mark.parametrize("path", PAGES)
def test_committed_page_is_generated(path: str) -> None:
    assert (ROOT / path).read_text(encoding="utf-8") == PAGES[path], "run `make generated`"


def test_each_setting_has_a_row() -> None:
    rows = [line for line in PAGES["docs/configuration.md"].splitlines() if line.startswith("| `--")]
    assert len(rows) == len(settings())
    by_name = {setting.name: setting for setting in settings()}
    for row, name in zip(rows, chain.from_iterable(SECTIONS.values()), strict=True):
        setting = by_name[name]
        assert setting.flag in row
        assert setting.variable in row
        assert setting.help in row
        assert row.count("|") == 5


@pytest.mark.parametrize("name", ["errors", "events"])
def test_headings_are_unique(name: str) -> None:
    headings = re.findall(r"^#+ (.*)$", PAGES[f"docs/reference/{name}.md"], re.MULTILINE)
    assert {anchor for anchor, times in Counter(map(slug, headings)).items() if times > 1} == set()


def test_every_error_has_advice_with_options_that_exist() -> None:
    assert set(ADVICE) == set(ERRORS)
    assert all(advice.endswith(".") for advice in ADVICE.values())
    flags = {setting.flag for setting in settings()}
    named = {flag for advice in ADVICE.values() for flag in re.findall(r"--[a-z-]+[a-z]", advice)}
    assert named - flags == {"--limit"}  # of all limits together


def test_example_error_is_the_servers_response() -> None:
    problem = problem_of(UnknownModel("nothing"))
    body = problem_response(problem, "/api/v1/models/nothing").body
    assert isinstance(body, bytes)
    [(kind, shown)] = BLOCK.findall(PAGES["docs/reference/errors.md"])
    assert kind == "json"
    assert json.loads(shown) == json.loads(body)


def test_grpc_page_has_the_status_of_each_http_status() -> None:
    page = (ROOT / "docs/how-to/use-grpc.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d, ]+) \| `(\w+)` \|$", page, re.MULTILINE)
    assert {int(code): status for codes, status in rows for code in codes.split(", ")} == STATUSES


def test_every_type_cause_and_member_is_described() -> None:
    assert set(BY) == set(TYPES)
    assert set(CAUSES) == set(Cause)
    body = json.loads(encode_event(Event(1, "id", ServerStopped(), SYSTEM, "2026-01-31T14:02:00.000000Z")))
    assert set(MEMBERS) == set(body)


@pytest.mark.parametrize("history", HISTORIES, ids=[path.stem for path in HISTORIES])
def test_actors_of_recorded_histories_match_the_page(history: Path) -> None:
    for line in history.read_bytes().splitlines():
        event = msgspec.json.decode(line)
        by, cause = BY[event["type"]], event["data"].get("cause")
        if cause is not None:
            assert (event["actor"] == SYSTEM) == (cause not in {"request", "demand"}), event
        else:
            assert (event["actor"] == SYSTEM) == (by == f"`{SYSTEM}`"), event
