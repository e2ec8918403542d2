"""Searches of records: pages and cursors, filters, and files that change between two pages."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.candidates import make_candidate
from support.history import FEWER
from support.http import LocalApi
from support.ledgers import FAST_FOLDER

from events.clock import uuid7
from features.records.files import CLOSED, FOLDER, OPEN, list_files
from features.records.lines import encode_inference
from features.records.reading import PAGE_BYTES, SCAN_BYTES, RecordQuery, read_page

START_NS = 1_767_225_600 * 10**9
"""2026-01-01T00:00:00Z"""
TORN = b'{"type":"loadledger.inference","id":"torn","time":"2026-01-01T00:00:00'


def make_line(number: int, model_id: str, request: str | None = None) -> bytes:
    """Return the line of an inference in the second `number`, with the id `r-NUMBER`."""
    ended = make_candidate(request_id=f"r-{number}", model_id=model_id, at_ns=START_NS + number * 10**9)
    assert ended.question is not None
    ended.question = type(ended.question)(request, None, ())
    line = encode_inference(ended, "")
    assert line is not None
    return line


def name_of(number: int, suffix: str = CLOSED) -> str:
    return f"{number:08}-0000-7000-8000-000000000000{suffix}"


def write_files(folder: Path, counts: list[tuple[str, int]]) -> list[str]:
    """Write a file of so many lines for each entry, of its model; returns all ids in the order of reading."""
    found, number = list[tuple[str, int, int]](), 0
    for file_number, (model_id, count) in enumerate(counts):
        (folder / model_id).mkdir(exist_ok=True)
        numbers = range(number, number + count)
        number += count
        text = b"".join(make_line(each, model_id) for each in numbers)
        is_open = file_number % 2
        path = folder / model_id / name_of(file_number, OPEN if is_open else CLOSED)
        path.write_bytes(text + TORN * is_open)
        found += [(model_id, file_number, each) for each in numbers]
    return [f"r-{each}" for _, _, each in sorted(found)]


def ids_of(lines: list[bytes]) -> list[str]:
    return [json.loads(line)["id"] for line in lines]


def read_all(
    folder: Path, query: RecordQuery, between: Callable[[int], object] = lambda _: None
) -> list[str]:
    """Return the ids of all pages; `between` is called before each further page."""
    found, pages = list[str](), 0
    while True:
        page = read_page(list_files(folder), query)
        assert len(page.lines) <= query.limit
        found += ids_of(page.lines)
        if page.next_cursor is None:
            return found
        pages += 1
        between(pages)
        members: dict[str, Any] = {name: getattr(query, name) for name in query.__struct_fields__}
        query = RecordQuery(**members | {"cursor": page.next_cursor})


MODELS = st.sampled_from(["a", "a-b", "a.c", "b"])
FILES = st.lists(st.tuples(MODELS, st.integers(0, 6)), max_size=8)


@FEWER
@given(FILES, st.integers(1, 50))
def test_pages_have_each_line_once_in_order(counts: list[tuple[str, int]], limit: int) -> None:
    with TemporaryDirectory(dir=FAST_FOLDER) as temporary:
        folder = Path(temporary)
        ids = write_files(folder, counts)
        assert read_all(folder, RecordQuery(limit=limit)) == ids
        of_model = [each for each in counts if each[0] == "a"]
        assert len(read_all(folder, RecordQuery("a", limit=limit))) == sum(count for _, count in of_model)
        for request_id in ids[:3]:
            assert read_all(folder, RecordQuery(request_id=request_id, limit=limit)) == [request_id]


@FEWER
@given(FILES, st.integers(1, 5), st.data())
def test_cursor_survives_renamed_and_erased_files(
    counts: list[tuple[str, int]], limit: int, data: st.DataObject
) -> None:
    with TemporaryDirectory(dir=FAST_FOLDER) as temporary:
        folder = Path(temporary)
        ids, lost = write_files(folder, counts), set[str]()

        def change(_: int) -> None:
            """Close all open files as a server does, and erase one."""
            stored = list_files(folder)
            for each in stored:
                whole = each.path.read_bytes().rpartition(b"\n")
                each.path.write_bytes(whole[0] + whole[1])
                each.path.rename(each.path.with_suffix(CLOSED))
            erased = data.draw(st.sampled_from([*list_files(folder), None]))
            if erased is not None:
                lost.update(ids_of(erased.path.read_bytes().splitlines()))
                erased.path.unlink()

        found = read_all(folder, RecordQuery(limit=limit), change)
        assert set(ids) - lost <= set(found)
        assert found == [each for each in ids if each in set(found)]


def test_filters_narrow_a_search_together(tmp_path: Path) -> None:
    write_files(tmp_path, [("a", 4), ("b", 4)])
    (tmp_path / "b" / name_of(900)).write_bytes(
        b"".join([make_line(9, "b", 'mine "\u00e9'), make_line(10, "b", "other"), b"{changed\n", b"[]\n"])
        + b'{"type":"loadledger.dropped","id":"lost","time":"2026-01-01T00:00:11.000000Z","dropped":1}\n'
    )
    for query, expected in (
        (RecordQuery(request_id='mine "\u00e9'), ["r-9"]),
        (RecordQuery(request_id="r-9"), ["r-9"]),
        (RecordQuery(request_id="r-"), []),
        (RecordQuery("a", "r-9"), []),
        (RecordQuery("b", since="2026-01-01T00:00:07.000000Z"), ["r-7", "r-9", "r-10", "lost"]),
        (RecordQuery("a", since="2026-01-01T00:00:03.000000Z"), ["r-3"]),
        (RecordQuery("b", "r-9", "2026-01-01T00:00:09.000001Z"), []),
        (RecordQuery(since="2100-01-01T00:00:00.000000Z"), []),
        (RecordQuery("c"), []),
    ):
        assert read_all(tmp_path, query) == expected


def test_file_longer_than_a_page_is_searched_to_its_end(tmp_path: Path) -> None:
    folder, piece = tmp_path / "a", 8 * 2**20
    folder.mkdir()
    with (folder / name_of(0)).open("wb") as file:
        for _ in range(SCAN_BYTES // piece + 1):
            file.seek(piece, 1)  # a hole, which takes no room on the disk
            file.write(b"\n")
        file.write(make_line(1, "a"))
    first = read_page(list_files(tmp_path), RecordQuery(request_id="r-1"))
    assert (first.lines, first.next_cursor is None) == ([], False)
    assert read_all(tmp_path, RecordQuery(request_id="r-1")) == ["r-1"]


def test_page_of_long_lines_has_at_least_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    lines = [make_line(number, "a", "m" * (PAGE_BYTES * 3 // 5)) for number in range(4)]
    (tmp_path / "a" / name_of(0)).write_bytes(b"".join(lines))
    sizes = list[int]()
    query: RecordQuery | None = RecordQuery()
    while query is not None:
        page = read_page(list_files(tmp_path), query)
        sizes.append(len(page.lines))
        query = RecordQuery(cursor=page.next_cursor) if page.next_cursor is not None else None
    assert sizes == [2, 2]


@pytest.mark.parametrize("limit", [1, 2, 3])
async def test_pages_of_files_have_each_file_once(api: LocalApi, limit: int) -> None:
    names = list[tuple[str, str]]()
    for model_id in ("digits", "digits-2", "digits.v2", "e"):
        folder = api.config.data / FOLDER / model_id
        folder.mkdir(parents=True)
        for name in (uuid7(), uuid7()):
            (folder / f"{name}{CLOSED}").write_bytes(make_line(1, model_id))
            names.append((model_id, name))
    found, cursor = list[tuple[str, str]](), None
    while True:
        query = {"limit": limit} if cursor is None else {"limit": limit, "cursor": cursor}
        page = (await api.get("/api/v1/records/files", params=query)).json
        found += [(each["model_id"], each["file"]) for each in page["files"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert found == sorted(names)
