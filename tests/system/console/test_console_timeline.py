"""The console's timeline, time travel, ledger, jobs and charts in a real browser on a real server."""

import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import BrowserContext, Locator, Route, expect
from support import models
from support.browser import PHONE, Console, needs_browser
from support.http import ONE
from support.servers import Server, serving

from server.config import Config

pytestmark = [needs_browser, pytest.mark.asyncio(loop_scope="module")]

KEPT, PAGE = 400, 50
"""Events on the page of the ledger: those that it keeps, and those that "Older" adds."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """A server; each test has models of its own."""
    root = tmp_path_factory.mktemp("timeline")
    repository = root / "repository"
    for version in (1, 2):
        for model_id in ("past", "drawn"):
            models.save(models.add(float(version)), repository, model_id, version)
    for model_id in ("followed", "listed", "unheard"):
        models.save(models.add(), repository, model_id)
    models.save_bytes(models.TEXT, repository, "broken")
    models.save_bytes(models.endless_load(), repository, "slow")
    async with serving(Config(repository=repository, data=root / "data")) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def polling(server: Server, browser: BrowserContext) -> AsyncIterator[Console]:
    """An admin's console that gets no stream, and asks every 3 s."""
    refusal = {"status": 503, "code": "too_many_streams", "title": "Too many streams"}
    async with Console.opened(browser, server.url) as console:
        await console.page.route("**/events/stream*", lambda route: route.fulfill(status=503, json=refusal))
        await console.sign_in(server.api.token("admin"), says="Every 3 s: no stream")
        yield console


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
    await expect(lane(admin, "drawn").locator(".seg-label").last).to_have_text("v2")
    await page.locator("#timeline-find").fill("DRAW")
    await expect(page.locator("#timeline-rows > .lane")).to_have_count(2)  # the server's and the model's
    await expect(page).to_have_url(re.compile(r"find=DRAW"))
    await page.locator("#timeline-text summary").click()
    first = table.locator("tr", has_text=f"{loaded['job_id']}").filter(has_text="drawn 1 loaded").first
    await expect(first).to_contain_text("by alice")
    await expect(first).to_contain_text(re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"))
    await first.get_by_role("link", name="As of this moment").click()
    version = past_row(admin, "drawn").locator("[data-label=Version]")
    await expect(version).to_have_text("1")
    await expect(page.locator("#past-event")).to_contain_text("ModelLoaded drawn 1")
    await expect(page).to_have_url(f"{admin.url}/#/at/{loaded['position']}?find=DRAW")
    await page.reload()  # as somebody does who got the address in a ticket
    await expect(version).to_have_text("1")
    await expect(page.locator("#timeline-cursor")).to_be_visible()
    await page.get_by_role("button", name="All history").click()
    await expect(page).to_have_url(re.compile(r"last=all"))
    await page.locator("#past").get_by_role("button", name="Now", exact=True).click()
    await expect(page).to_have_url(f"{admin.url}/#/timeline?find=DRAW&last=all")
    await expect(page.locator("#past-when")).to_contain_text("which is now")


async def test_bars_are_coloured_by_state_at_any_version(server: Server, admin: Console) -> None:
    for version in (1, 2):
        await server.api.load("drawn", version=version)
    await server.api.failed_load("broken")
    await admin.go("#/timeline?last=60")
    await expect(lane(admin, "broken").locator(".seg.failed")).to_be_visible()
    await expect(lane(admin, "broken").locator(".mark.failed text")).to_have_text("✕")
    fill = "bars => bars.map((bar) => getComputedStyle(bar).fill)"
    assert len(set(await lane(admin, "drawn").locator(".seg.loaded").evaluate_all(fill))) == 1


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
    await expect(bar.locator("title")).to_contain_text("listed 1 loaded")
    await bar.click()
    await expect(page.locator("#timeline-detail")).to_contain_text("listed 1 loaded")
    await expect(past_row(admin, "listed").locator(".pill")).to_have_text("loaded")


async def test_time_travel_shows_actor_and_hash(server: Server, admin: Console) -> None:
    page = admin.page
    await server.api.load("past", version=1)
    then = await server.api.model("past")
    await server.api.load("past", version=2)
    await admin.go("#/timeline")
    row, when = past_row(admin, "past"), page.locator("#past-when")
    await expect(when).to_contain_text("which is now")
    await page.get_by_label("Position", exact=True).fill(str(then["position"]))
    await page.keyboard.press("Enter")
    await expect(row.locator("code")).to_have_text(then["files"][0]["sha256"])
    await expect(row.locator("[data-label='Loaded by']")).to_contain_text("alice")
    await expect(page.locator("#past-event")).to_contain_text("ModelLoaded past 1")
    slider = page.get_by_label("Position of the ledger")
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


async def test_position_keeps_what_is_selected_in_it_while_the_ledger_grows(
    server: Server, admin: Console
) -> None:
    page = admin.page
    await admin.go("#/timeline")
    position, slider = page.get_by_label("Position", exact=True), page.get_by_label("Position of the ledger")
    await position.select_text()
    before = await slider.get_attribute("max")
    for version in (1, 2):  # one of them at most is loaded
        await server.api.load("past", version=version)
    await expect(slider).not_to_have_attribute("max", str(before))
    await page.keyboard.type("1")  # replaces what is selected
    await page.keyboard.press("Enter")
    await expect(page.locator("#past-when")).to_contain_text("position 1,")


async def test_slider_reaches_moment_that_the_page_had_not_heard_of(server: Server, polling: Console) -> None:
    page = polling.page
    await polling.go("#/timeline")
    await expect(page.locator("#past-when")).to_contain_text("which is now")
    await page.route(re.compile("/api/v1/(overview|resources)"), lambda _: None)  # nothing more is heard
    for version in (1, 2):  # one of them at most is loaded
        await server.api.load("past", version=version)
    then: int = (await server.api.model("past"))["position"]
    await page.get_by_label("Position", exact=True).fill(str(then))
    await page.keyboard.press("Enter")
    slider = page.get_by_label("Position of the ledger")
    await expect(slider).to_have_value(str(then))
    await slider.press("ArrowLeft")
    await expect(page.locator("#past-when")).to_contain_text(f"position {then - 1},")


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


async def test_open_event_shows_the_text_that_was_hashed(server: Server, admin: Console) -> None:
    page = admin.page
    await server.api.load("followed")
    await admin.go("#/ledger")
    unloaded = (await server.api.unload("followed"))["position"]
    event = page.locator(f'#ledger-list [data-position="{unloaded}"]')
    await expect(event).to_contain_text("ModelUnloaded")
    await event.locator("summary").click()
    line = (await server.api.get(f"/api/v1/events?after={unloaded - 1}&limit=1")).body.decode()
    await expect(event.locator("pre")).not_to_be_empty()
    assert f'{{"events":[{await event.locator("pre").inner_text()}],' in line
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
    await expect(page.locator("#past-event")).to_contain_text("LoadRequested followed 1 by alice")


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
    await page.wait_for_timeout(300)
    await expect(items.first).to_have_attribute("data-position", str(500 + KEPT))


async def test_ledger_without_a_stream_is_fetched_as_it_grows(server: Server, polling: Console) -> None:
    await polling.go("#/ledger?model=unheard")
    await expect(polling.page.get_by_text("No event matches.")).to_be_visible()
    await server.api.load("unheard")
    await expect(polling.page.locator("#ledger-list")).to_contain_text("ModelLoaded")


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


async def test_failed_job_has_its_reason_at_its_own_address(server: Server, admin: Console) -> None:
    failed = await server.api.failed_load("broken")
    await admin.page.goto(f"{admin.url}/#/jobs/{failed['id']}")
    await expect(admin.page.locator("#job .why")).to_contain_text("invalid_model: ")
    await admin.page.goto(f"{admin.url}/#/jobs/none")
    await expect(admin.page.locator("#job .refusal")).to_contain_text("none")


async def test_role_infer_sees_jobs_without_events(server: Server, browser: BrowserContext) -> None:
    job = await server.api.load("listed")
    async with Console.opened(browser, server.url) as console:
        await console.sign_in(server.api.token("infer"), says="Every 3 s")
        await console.go(f"#/jobs/{job['id']}")
        await expect(console.page.locator("#job")).to_contain_text("Load listed 1")
        await expect(console.page.locator("#ledger-list")).to_have_count(0)
        await expect(console.page.get_by_role("link", name="As of its last event")).to_have_count(0)


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


# Modules, called in the page.

CASES: dict[str, tuple[object, str]] = {
    "an axis names round times that are apart": (
        [["00:00:10", 7], ["14:30", 9], ["12 Jan", 8], ["1 Feb", 8], ["2026", 5], ["2030", 8]],
        """
        const { DAY, HOUR, MINUTE, Scale, ticks, YEAR } = await import("/console/lanes.js");
        const named = (from, span, index) => {
          const scale = new Scale(from, from + span, 900), found = ticks(scale);
          const places = found.map((tick) => scale.x(tick.time));
          const apart = places.slice(1).every((place, before) => place - places[before] >= 40);
          return [found[index].label, apart ? found.length : 0];
        };
        const at = (...parts) => new Date(2026, ...parts).getTime();
        return [named(at(0, 12), MINUTE, 1), named(at(0, 12, 14), 4 * HOUR, 1), named(at(0, 12), 7 * DAY, 0),
          named(at(0, 12), 60 * DAY, 2), named(at(0, 1), 5 * YEAR, 0), named(at(0, 1), 40 * YEAR, 0)];
        """,
    ),
    "a chart's lines break where samples are missing": (
        [[90, 80, 70, 20, 10], [1, 3, None, None, 2], [4]],
        """
        const { alone, columnsOf } = await import("/console/charts.js");
        const start = Date.UTC(2026, 0, 1), at = (seconds) => new Date(start - seconds * 1000).toISOString();
        const samples = [[90, 1], [80, 3], [20, null], [10, 2]];
        const points = samples.map(([ago, value]) => ({ at: at(ago), value }));
        const [times, values] = columnsOf({ interval_s: 10, points }, [{ of: (point) => point.value }]);
        return [times.map((time) => start / 1000 - time), values, alone(values)];
        """,
    ),
    "a node's address is a link only if a browser can open it": (
        [["http://a:8080/", None, None], ["http://a:8080", "javascript:alert(1)", "http://"]],
        """
        const { NodesPage } = await import("/console/nodes.js");
        const { nodes } = await import("/console/state.js");
        const { html, render } = await import("/console/ui.js");
        const addresses = ["http://a:8080", "javascript:alert(1)", "http://"];
        const place = document.createElement("div");
        const none = { phase: "joined", epoch: 1, models: [], jobs: [], attributes: [], release: "1" };
        const before = nodes.value;
        nodes.value = addresses.map((address, id) => ({ ...none, id: String(id), address }));
        render(html`<${NodesPage} />`, place);
        const cells = [...place.querySelectorAll("[data-label=Address]")];
        const found = [cells.map((cell) => cell.querySelector("a")?.href ?? null),
          cells.map((cell) => cell.firstChild.firstChild.data)];
        render(null, place);
        nodes.value = before;
        return found;
        """,
    ),
}


@pytest.mark.parametrize("case", CASES)
async def test_module(admin: Console, case: str) -> None:
    expected, script = CASES[case]
    found: Any = await admin.page.evaluate(f"async () => {{ {script} }}")
    assert found == expected


# Looks.


async def test_opened_parts_are_accessible_and_no_wider_than_a_phone(server: Server, admin: Console) -> None:
    page = admin.page
    await server.api.load("past", version=1)
    await page.set_viewport_size(PHONE)
    for address, part in (("#/timeline", "#timeline-text summary"), ("#/ledger", "#ledger-list summary")):
        await admin.go(address)
        await page.locator(part).first.click()
        await expect(page.locator("#timeline-table, #ledger-list pre")).not_to_be_empty()
        await page.emulate_media(color_scheme="light", reduced_motion="reduce")
        assert await admin.serious() == []
        await page.emulate_media(color_scheme="dark")
        assert await admin.serious(None, "color-contrast") == []
        await admin.fits()


async def test_page_ends_with_its_last_part(server: Server, admin: Console) -> None:
    for _ in range(3):
        await server.api.load("past")
        await server.api.unload("past")
    await admin.page.set_viewport_size(PHONE)  # on which the page is longer than the window
    await admin.go("#/timeline")
    await admin.page.locator("#timeline-text summary").click()
    await expect(admin.page.locator("#timeline-table > tr").nth(5)).to_be_attached()
    below = """document.documentElement.scrollHeight
        - Math.max(...[...document.querySelectorAll("main section")].map(
            (part) => part.getBoundingClientRect().bottom + scrollY))
        - parseFloat(getComputedStyle(document.querySelector("main")).paddingBottom)"""
    assert await admin.page.evaluate("document.documentElement.scrollHeight > innerHeight")
    assert await admin.page.evaluate(below) <= 1
