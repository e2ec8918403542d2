"""The console's timeline, time travel, ledger, jobs and charts in a real browser on a real server."""

import json
import re
from collections.abc import AsyncIterator
from hashlib import sha256

import pytest
import pytest_asyncio
from playwright.async_api import BrowserContext, Locator, Route, expect
from support import models
from support.browser import PHONE, Console, needs_browser
from support.http import ONE
from support.servers import Server, serving

from server.config import Config

pytestmark = [needs_browser, pytest.mark.asyncio(loop_scope="session")]

KEPT, PAGE = 400, 50
"""Events on the page of the ledger: those that it keeps, and those that "Older" adds."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """A server; each test has models of its own."""
    root = tmp_path_factory.mktemp("timeline")
    repository = root / "repository"
    for version in (1, 2):
        for model_id in ("past", "drawn"):
            models.save(models.add(float(version)), repository, model_id, version)
    for model_id in ("followed", "listed", "unheard"):
        folder = models.save(models.add(), repository, model_id)
        (folder / HIDING).write_bytes(b"")
    models.save_bytes(models.TEXT, repository, "broken")
    models.save_bytes(models.endless_load(), repository, "slow")
    async with serving(Config(repository=repository, data=root / "data")) as running:
        yield running


def past_row(console: Console, model_id: str) -> Locator:
    return console.page.locator("#past-rows > tr", has=console.page.get_by_text(model_id, exact=True))


def lane(console: Console, model_id: str) -> Locator:
    return console.page.locator(f'.lane[data-model="{model_id}"]')


# The timeline and time travel.


async def test_timeline_leads_to_the_moment_and_its_address(server: Server, admin: Console) -> None:
    page, table = admin.page, admin.page.locator("#timeline-table")
    await server.api.load("drawn", version=1)
    loaded = await server.api.model("drawn")
    await admin.go("#/timeline")
    await expect(lane(admin, "drawn").locator(".seg.loaded").last).to_be_visible()
    await server.api.load("drawn", version=2)
    await expect(lane(admin, "drawn").locator(".seg-label").last).to_have_text("2")
    await page.locator("#timeline-find").fill("DRAW")
    await expect(page.locator("#timeline-rows > .lane")).to_have_count(2)  # the server's and the model's
    fill = "bars => bars.map((bar) => getComputedStyle(bar).fill)"  # which says the state, of either version
    assert len(set(await lane(admin, "drawn").locator(".seg.loaded").evaluate_all(fill))) == 1
    await expect(page).to_have_url(re.compile(r"find=DRAW"))
    await page.locator("#timeline-text summary").click()
    of_load = page.locator(f'a[href="#/jobs/{loaded["job_id"]}"]')
    first = table.locator("tr", has=of_load).filter(has_text="drawn/1 loaded").first
    await expect(first).to_contain_text("by alice")
    await expect(first).to_contain_text(re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"))
    await first.get_by_role("link", name="As of this moment").click()
    version = past_row(admin, "drawn").locator("[data-label=Version]")
    await expect(version).to_have_text("1")
    await expect(page.locator("#past-event")).to_contain_text("ModelLoaded drawn/1")
    await expect(page).to_have_url(f"{admin.url}/#/at/{loaded['position']}?find=DRAW")
    await page.reload()  # as somebody does who got the address in a ticket
    await expect(version).to_have_text("1")
    await expect(page.locator("#timeline-cursor")).to_be_visible()
    await page.get_by_role("button", name="All history").click()
    await expect(page).to_have_url(re.compile(r"last=all"))
    await page.locator("#past").get_by_role("button", name="Now", exact=True).click()
    await expect(page).to_have_url(f"{admin.url}/#/timeline?find=DRAW&last=all")
    await expect(page.locator("#past-when")).to_contain_text("which is now")


async def test_range_with_too_many_changes_is_zoomed(admin: Console) -> None:
    page = admin.page

    async def answer(route: Route) -> None:
        found = await (await route.fetch()).json()
        is_wide = "from=" not in route.request.url  # the whole history
        busy = {"rows": 2 * found["max_rows"], "lanes": [], "server": []}
        await route.fulfill(json=found | (busy if is_wide else {}))

    await page.route("**/api/v1/timeline?*", answer)
    await admin.go("#/timeline?last=all")
    hint = page.locator(".timeline .hint")
    await expect(hint).to_contain_text(
        "There are 5,000 changes in this range, and no more than 2,500 are drawn"
    )
    await expect(page.locator(".seg")).to_have_count(await page.locator(".legend .seg").count())
    await hint.get_by_role("button").click()
    await expect(page).to_have_url(re.compile(r"last=\d+"))
    await expect(hint).to_have_count(0)
    await expect(page.locator("#timeline-rows .seg").first).to_be_attached()


async def test_timeline_zooms_moves_and_is_chosen_from(server: Server, admin: Console) -> None:
    page = admin.page
    await server.api.load("listed")
    await admin.go("#/timeline?last=3600")
    shown = page.locator("#timeline-range")
    await expect(shown).to_contain_text(", live")
    await expect(lane(admin, "listed").locator(".seg.loaded")).to_be_visible()
    await page.get_by_role("button", name="Zoom in").click()
    await expect(page).to_have_url(re.compile("last=1800"))
    await page.get_by_role("button", name="Zoom out").click()
    await expect(page).to_have_url(re.compile("last=3600"))
    await page.get_by_role("button", name="Minute", exact=True).click()
    await expect(page.get_by_role("button", name="Minute", exact=True)).to_have_attribute(
        "aria-pressed", "true"
    )
    await expect(page.get_by_role("button", name="Zoom in")).to_be_disabled()
    await page.get_by_role("button", name="Earlier").click()
    await expect(shown).not_to_contain_text("live")
    await expect(page).to_have_url(re.compile("from=.*to="))
    await page.get_by_role("button", name="Now", exact=True).first.click()
    await expect(shown).to_contain_text(", live")
    await expect(page).to_have_url(re.compile("last=60"))
    bar = lane(admin, "listed").locator(".seg.loaded").last
    await expect(bar.locator("title")).to_contain_text("listed/1 loaded")
    await bar.click()
    await expect(page.locator("#timeline-detail")).to_contain_text("listed/1 loaded")
    await expect(past_row(admin, "listed").locator(".pill")).to_have_text("loaded")


async def test_time_travel_shows_actor_and_hash(server: Server, admin: Console) -> None:
    page = admin.page
    await server.api.load("past", version=1)
    then = await server.api.model("past")
    await admin.go("#/timeline")
    row, when = past_row(admin, "past"), page.locator("#past-when")
    slider = page.get_by_label("Position of the ledger")
    await expect(when).to_contain_text("which is now")
    await page.get_by_label("Position", exact=True).select_text()
    head = await slider.get_attribute("max")
    await server.api.load("past", version=2)  # the ledger grows, and what is selected stays so
    await expect(slider).not_to_have_attribute("max", str(head))
    await page.keyboard.type(str(then["position"]))
    await page.keyboard.press("Enter")
    await expect(when).to_contain_text(f"position {then['position']},")
    await expect(row.locator("code")).to_have_text(then["files"][0]["sha256"])
    await expect(row.locator("[data-label='Loaded by']")).to_contain_text("alice")
    await expect(page.locator("#past-event")).to_contain_text("ModelLoaded past/1")
    await slider.press("ArrowLeft")
    await expect(row.locator(".pill")).to_have_text("loading")
    await page.get_by_label("or time").fill("2026-01-01T00:00:00")
    await page.get_by_label("or time").press("Tab")
    await expect(when).to_have_text("before everything")
    await expect(page).to_have_url(re.compile(r"#/at/2026-01-01T"))
    head = await slider.get_attribute("max")
    await server.api.load("past", version=1)  # the ledger grows, and the moment stays
    await expect(slider).not_to_have_attribute("max", str(head))
    await expect(when).to_have_text("before everything")
    await slider.press("End")
    await expect(when).to_contain_text("which is now")


async def test_time_travel_lists_loaded_models_of_all_pages_first(admin: Console) -> None:
    def model(model_id: str, state: str) -> dict[str, object]:
        return {"id": model_id, "state": state, "files": []}

    asked: list[str] = []
    first = {"models": [model(f"m{number}", "unloaded") for number in range(600)], "next_cursor": "m599"}
    last = {"models": [model("z", "loaded")], "next_cursor": None}

    async def answer(route: Route) -> None:
        asked.append(route.request.url)
        page = last if "cursor=m599" in route.request.url else first
        await route.fulfill(json={**page, "as_of": 1})

    await admin.page.route("**/api/v1/models?*at=*", answer)
    await admin.page.evaluate("location.hash = '#/at/1'")
    await expect(admin.page.locator("#past-rows > tr").first).to_have_text(re.compile("^zloaded"))
    await expect(admin.page.locator("#past-rows > tr")).to_have_count(500)
    await expect(admin.page.locator("#past .hint")).to_have_text("And 101 more.")
    await expect(admin.page.locator("#past .refusal")).to_have_count(0)
    assert "at=1" in asked[1], "the second page is as of the first one's position"


# The ledger.


UNREADABLE = 'é "hash":"0"}],"as_of":1 \\u0041 \n \U0001f600 1e400 9007199254740993'
"""A reason that a page may change: if it is read and written again, or cut at the wrong place."""
HIDING = "w\u202e\u2028\u2066\x7f\ufeff\x01"
"""The name of a file that a page makes harmless elsewhere."""


async def test_open_event_shows_the_text_that_was_hashed(server: Server, admin: Console) -> None:
    page = admin.page
    before = (await server.api.get("/api/v1/events/head")).json["position"]
    await server.api.load("followed", reason=UNREADABLE)  # and `ModelLoaded` has mtime_ns, beyond 2**53
    await admin.go("#/ledger")
    unloaded = (await server.api.unload("followed"))["position"]
    event = page.locator(f'#ledger-list [data-position="{unloaded}"]')
    await expect(event).to_contain_text("ModelUnloaded")
    bodies = ""
    for each in (await server.api.get(f"/api/v1/events?after={before}")).json["events"]:
        opened = page.locator(f'#ledger-list [data-position="{each["position"]}"]')
        await opened.locator("summary").click()
        body = await opened.locator("pre").text_content() or ""
        previous, told = await opened.locator(".hint code").all_text_contents()
        assert told == each["hash"] == sha256(bytes.fromhex(previous) + body.encode()).hexdigest()
        await opened.locator("summary").click()
        bodies += body
    assert HIDING[:-1] in bodies
    assert json.dumps(UNREADABLE, ensure_ascii=False) in bodies
    await page.get_by_label("Type").select_option("LoadRequested")
    await expect(event).to_be_hidden()
    await expect(page.locator("#ledger-list strong").first).to_have_text("LoadRequested")
    await expect(page).to_have_url(f"{admin.url}/#/ledger?type=LoadRequested")
    await page.get_by_label("Follow").uncheck()
    await page.get_by_label("Model").fill("followed")
    await page.get_by_role("button", name="Show").click()
    await expect(page.locator("#ledger-list > li")).to_have_count(1)
    await page.get_by_role("button", name="Clear").click()
    await expect(page.get_by_label("Model")).to_have_value("")
    await expect(event).to_be_visible()
    await (
        page.locator("#ledger-list > li", has_text=re.compile(r"\bLoadRequested followed"))
        .locator("summary")
        .click()
    )
    await page.get_by_role("link", name="Look at this moment").click()
    await expect(page.locator("#past-event")).to_contain_text("LoadRequested followed/1 by alice")


HEAR = """async (positions) => {
  const { hear } = await import("/console/state.js");
  for (const position of positions) hear({ position, type: "ServerStopped", actor: "system", data: {} });
}"""
"""Has the page hear of events at these positions, as it does when the stream brings them."""


async def test_ledger_keeps_its_newest_events_and_fetches_older(admin: Console) -> None:
    page, items = admin.page, admin.page.locator("#ledger-list > li")

    def event(position: int) -> dict[str, object]:
        return {"position": position, "type": "ServerStopped", "actor": "system", "data": {}}

    async def answer(route: Route) -> None:
        end = min(501, int(re.findall(r"before=(\d+)", route.request.url)[0]))
        events = [event(position) for position in range(end - 1, end - PAGE - 1, -1)]
        await route.fulfill(json={"events": events, "as_of": 500, "oldest": 1, "next_cursor": end - PAGE})

    await page.route("**/api/v1/events?*before=*", answer)
    await admin.go("#/ledger")
    await expect(items).to_have_count(PAGE)
    await page.evaluate(HEAR, [*range(501, 501 + KEPT)])
    await expect(items).to_have_count(KEPT)
    await page.get_by_role("button", name="Older").click()
    await expect(items).to_have_count(KEPT + PAGE)
    await expect(items.last).to_have_attribute("data-position", str(501 - PAGE))
    await page.get_by_label("Follow").uncheck()
    await page.evaluate(HEAR, [1000])
    await expect(page.locator(".page-head .count")).to_have_text("1,000 events")
    await expect(items.first).to_have_attribute("data-position", str(500 + KEPT))
    await page.reload()  # which forgets what never happened


async def test_console_without_a_stream_asks_for_what_is_new(server: Server, browser: BrowserContext) -> None:
    refusal = {"status": 503, "code": "too_many_streams", "title": "Too many streams"}
    async with Console.opened(browser, server.url) as console:
        page = console.page
        await page.route("**/events/stream*", lambda route: route.fulfill(status=503, json=refusal))
        await console.sign_in(server.api.token("admin"), says="Every 3 s: no stream")
        await console.go("#/ledger?model=unheard")
        await expect(page.get_by_text("No event matches.")).to_be_visible()
        await server.api.load("unheard")
        await expect(page.locator("#ledger-list")).to_contain_text("ModelLoaded")
        await console.go("#/timeline")
        await expect(page.locator("#past-when")).to_contain_text("which is now")
        await page.route(re.compile("/api/v1/(overview|resources)"), lambda _: None)  # nothing more is heard
        then = (await server.api.unload("unheard"))["position"]
        await page.get_by_label("Position", exact=True).fill(str(then))
        await page.keyboard.press("Enter")
        slider = page.get_by_label("Position of the ledger")
        await expect(slider).to_have_value(str(then))
        await slider.press("ArrowLeft")
        await expect(page.locator("#past-when")).to_contain_text(f"position {then - 1},")


# Jobs.


async def test_job_shows_its_stages_and_is_cancelled(server: Server, admin: Console) -> None:
    page = admin.page
    await admin.go("#/jobs")
    job = await server.api.accepted_load("slow")
    shown = page.locator(f'.panel.jobs [data-job="{job["id"]}"]')
    await expect(shown.locator("[aria-current=step]")).to_have_text("loading")
    await shown.get_by_role("button", name="Cancel").click()
    ended = page.locator(f'.ended-jobs [data-job="{job["id"]}"]')
    await expect(ended.locator(".pill")).to_have_text("cancelled")
    await expect(shown).to_have_count(0)
    await ended.get_by_role("link", name="Load slow").click()
    await expect(page).to_have_url(f"{admin.url}/#/jobs/{job['id']}")
    await expect(page.locator("#job")).to_contain_text("Requested by alice")
    await expect(page.locator("#ledger-list")).to_contain_text("JobCancelled")
    await expect(page.locator("#ledger-list strong").last).to_have_text("LoadRequested")
    await page.get_by_role("link", name="As of its last event").click()
    await expect(page.locator("#past-event")).to_contain_text("JobCancelled slow")


async def test_failed_job_is_marked_and_has_its_reason(server: Server, admin: Console) -> None:
    failed = await server.api.failed_load("broken")
    await admin.go("#/timeline?last=60")
    await expect(lane(admin, "broken").locator(".seg.failed")).to_be_visible()
    await expect(lane(admin, "broken").locator(".mark.failed text")).to_have_text("✕")
    await admin.go(f"#/jobs/{failed['id']}")
    await expect(admin.page.locator("#job .why")).to_contain_text("invalid_model: ")
    await admin.page.goto(f"{admin.url}/#/jobs/none")
    await expect(admin.page.locator("#job .refusal")).to_contain_text("none")


# Charts.


async def test_charts_are_read_by_keyboard_and_in_either_range(server: Server, admin: Console) -> None:
    page = admin.page
    await server.api.load("listed")
    await server.api.infer("listed", ONE)
    chart = page.locator(".chart", has_text="Memory")
    reader = chart.get_by_label("Memory: values over time")
    await expect(chart.locator("canvas")).to_be_visible()
    await expect(chart.locator(".summary")).to_contain_text("now, at most")
    await expect(reader).not_to_have_attribute("max", "0")
    await reader.press("ArrowLeft")
    await expect(reader).to_have_attribute(
        "aria-valuetext", re.compile(r"\d\d:\d\d:\d\d: models .*B, server .*B")
    )
    await expect(chart.locator(".summary")).to_have_text(re.compile(r"^at \d\d:\d\d:\d\d"))
    await reader.blur()
    await expect(chart.locator(".summary")).to_contain_text("now, at most")
    await page.get_by_role("button", name="Show the last 24 hours").click()
    await expect(page.locator(".chart .summary").nth(1)).to_contain_text("answered in the last 24 hours")


# Looks.


BELOW = """document.documentElement.scrollHeight
    - Math.max(...[...document.querySelectorAll("main section")].map(
        (part) => part.getBoundingClientRect().bottom + scrollY))
    - parseFloat(getComputedStyle(document.querySelector("main")).paddingBottom)"""
"""Pixels between the last part of a page and its end."""


async def test_opened_parts_are_accessible_and_no_wider_than_a_phone(server: Server, admin: Console) -> None:
    page = admin.page
    for _ in range(3):
        await server.api.load("past")
        await server.api.unload("past")
    await page.set_viewport_size(PHONE)
    for address, part in (("#/ledger", "#ledger-list"), ("#/at/3?find=past", "#timeline-text")):
        await admin.go(address)
        await page.locator(f"{part} summary").first.click()
        await expect(page.locator("#timeline-table, #ledger-list pre")).not_to_be_empty()
        await admin.check_accessibility()
        await admin.fits()
    await expect(page.locator("#timeline-table > tr").nth(5)).to_be_attached()
    assert await page.evaluate("document.documentElement.scrollHeight > innerHeight")
    assert await page.evaluate(BELOW) <= 1
