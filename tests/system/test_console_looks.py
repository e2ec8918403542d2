"""How the console looks, to eyes and to screen readers, and what its modules work out.

With `SCREENSHOTS=docs/images` the pictures of the README are written there.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Route, expect
from support import models
from support.browser import PHONE, Console, chromium, needs_browser
from support.process import Server, serving

from server.config import Config

pytestmark = [needs_browser, pytest.mark.asyncio(loop_scope="module")]

PICTURES = os.environ.get("SCREENSHOTS")
"""Where the README's pictures are to be written, if they are."""
MAX_BYTES = 200_000
"""Of a picture: the page that shows it is to be quick."""
SHOWN_S = 45
"""How long the models of a picture are asked, so that its charts have something to show."""
QUESTION = {"name": "x", "datatype": "FP32", "shape": [4], "data": [0.5, 1, 2, 3]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """A server on a bad night: one model failed, and a load waits for memory."""
    root = tmp_path_factory.mktemp("looks")
    repository = root / "repository"
    for version in (1, 2, 3):
        models.save(models.add(float(version)), repository, "fraud-check", version)
    models.save(models.weights(24, seed=1), repository, "ranker", 1)
    models.save(models.weights(14, seed=2), repository, "embedder", 4)
    models.save(models.weights(44, seed=3), repository, "captioner", 1)
    models.save(models.add(), repository, "spam", 7)
    models.save_bytes(models.CORRUPT, repository, "churn", 2)
    config = Config(repository=repository, data=root / "data")
    async with serving(config, "--memory-budget=130000000") as running:
        api = running.api
        await api.load("fraud-check", version=2)
        await api.load("ranker")
        await api.load("embedder", pinned=True)
        await api.failed_load("churn")
        await api.accepted_load("captioner")
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """A browser for all tests of this file; each has a profile of its own."""
    async with chromium() as running:
        yield running


async def test_nothing_serious_keeps_anybody_from_using_it(server: Server, browser: Browser) -> None:
    async with Console.opened(browser, server.url) as console:
        await serious_in_no_scheme(console)  # signing in
        await console.sign_in(server.api.token("admin"))
        await expect(console.attention).to_have_count(3)
        await console.page.locator("#ledger-list summary").first.click()
        await expect(console.page.locator("#ledger-list pre").first).not_to_be_empty()
        await serious_in_no_scheme(console)
        for button, close in (("Swap", "Keep as it is"), ("Unload", "Keep it"), ("Predict", "Close")):
            await console.press("fraud-check", button)
            if button == "Predict":
                await console.choose("Predict")
                await expect(console.page.locator("#predict-answer")).to_be_visible()
            await serious_in_no_scheme(console, "dialog[open]")
            await console.choose(close)
        await console.page.set_viewport_size({"width": PHONE["width"], "height": PHONE["height"]})
        await serious_in_no_scheme(console)
        await console.page.route("**/api/**", lambda route: route.abort())
        await expect(console.page.locator("#lost")).to_be_visible()
        await serious_in_no_scheme(console)


async def serious_in_no_scheme(console: Console, part: str | None = None) -> None:
    await console.page.emulate_media(color_scheme="light", reduced_motion="reduce")
    assert await console.serious(part) == []
    await console.page.emulate_media(color_scheme="dark")
    assert await console.serious(part, "color-contrast") == []  # the rest is the same in each scheme


async def test_nothing_is_wider_than_a_phone(server: Server, browser: Browser) -> None:
    wide = "(each) => each.getBoundingClientRect().right > innerWidth"
    async with Console.opened(browser, server.url, PHONE) as console:
        await console.sign_in(server.api.token("admin"))
        assert await console.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        for button, close in (("Swap", "Keep as it is"), ("Unload", "Keep it"), ("Predict", "Close")):
            await console.press("fraud-check", button)
            parts = console.page.locator("dialog[open] *")
            assert await parts.evaluate_all(f"parts => parts.filter({wide}).length") == 0
            await console.choose(close)


async def test_it_can_be_used_without_a_mouse(server: Server, browser: Browser) -> None:
    async with Console.opened(browser, server.url) as console:
        page = console.page
        await page.keyboard.type(server.api.token("admin"))  # the field has the focus
        await page.keyboard.press("Enter")
        await console.see("fraud-check", "loaded")
        swap = console.row("fraud-check").get_by_role("button", name="Swap… fraud-check")
        await swap.focus()
        await page.keyboard.press("Enter")
        await expect(page.get_by_label("Version")).to_be_focused()
        await page.keyboard.press("Escape")
        await expect(page.locator("dialog[open]")).to_have_count(0)
        await expect(swap).to_be_focused()
        await page.get_by_label("Find").focus()
        await page.keyboard.type("RANK")
        await expect(page.locator("#models-rows > tr")).to_have_count(1)


async def test_a_dialog_is_about_the_model_that_it_was_opened_for(server: Server, browser: Browser) -> None:
    late = asyncio.Event()

    async def answered_late(route: Route) -> None:
        await late.wait()
        await route.continue_()

    async with Console.opened(browser, server.url) as console:
        page = console.page
        await console.sign_in(server.api.token("admin"))
        for path in ("api/v1/models/ranker", "v2/models/ranker", "v2/models/fraud-check/infer"):
            await page.route(f"**/{path}", answered_late)
        await console.press("ranker", "Swap")
        await page.get_by_label("Strategy").select_option("in_place")
        await page.get_by_label("Priority").select_option("high")
        await page.keyboard.press("Escape")
        await console.press("fraud-check", "Swap")
        for choice in ("Strategy", "Priority"):
            await expect(page.get_by_label(choice)).to_have_value("")
        await page.keyboard.press("Escape")
        await console.press("fraud-check", "Predict")
        await expect(page.locator("#predict-body")).not_to_have_value("")
        await console.choose("Predict")
        await page.keyboard.press("Escape")
        await console.press("embedder", "Predict")
        await expect(page.locator("#predict-body")).not_to_have_value("")
        asked = page.expect_response("**/api/v1/models/ranker")
        async with asked:
            late.set()
        await expect(page.locator("#predict-title")).to_have_text("Predict with embedder")
        await expect(page.locator("#predict-told")).to_have_text("")
        await expect(page.locator("#load-title")).to_have_text("Swap fraud-check")


async def test_what_is_refused_when_its_dialog_is_closed_is_said_all_the_same(
    server: Server, browser: Browser
) -> None:
    late = asyncio.Event()

    async def refused_late(route: Route) -> None:
        await late.wait()
        problem = {"title": "Not now", "detail": "later \u202eperhaps", "code": "x"}
        await route.fulfill(status=503, json=problem)

    async with Console.opened(browser, server.url) as console:
        await console.sign_in(server.api.token("admin"))
        await console.page.route("**/ranker/unload", refused_late)
        await console.press("ranker", "Unload")
        await expect(console.page.get_by_role("button", name="Keep it")).to_be_focused()
        await console.choose("Unload")
        await console.choose("Keep it")
        await console.press("embedder", "Unload")
        late.set()
        notices = console.page.locator("#notices")
        await expect(notices).to_contain_text("Not now: later \ufffdperhaps")
        await expect(console.page.locator("#unload-dialog .refusal")).to_be_hidden()
        await expect(console.page.locator("#unload-title")).to_have_text("Unload embedder")
        await expect(console.page.locator("#unload-dialog")).to_be_visible()


async def test_what_has_the_focus_keeps_it_when_rows_move(server: Server, browser: Browser) -> None:
    async with Console.opened(browser, server.url) as console:
        kept = await console.page.evaluate("""async () => {
          const { el, keyed } = await import("/console/dom.js");
          const list = document.body.appendChild(el("ul"));
          const make = (key) => el("li", {}, el("button", {}, key));
          const show = (...keys) => keyed(list, keys, (key) => key, make, () => {});
          show("a", "b", "c");
          list.children[1].firstChild.focus();
          show("c", "b", "d", "a");
          show("b", "d");
          return [document.activeElement.textContent, list.textContent];
        }""")
    assert kept == ["b", "bd"]


async def test_the_charts_count_what_happened_between_two_looks(server: Server, browser: Browser) -> None:
    async with Console.opened(browser, server.url) as console:
        looks = await console.page.evaluate("""async () => {
          const { sample } = await import("/console/samples.js");
          const stats = (requests, failures, ns) => [{ name: "m", version: "1", inference_stats: {
            success: { count: requests, ns }, fail: { count: failures, ns: 0 } } }];
          const use = (in_flight) => ({ used_bytes: 5, reserved_bytes: 1, models: [
            { job_id: "j", model_id: "m", version: 1, in_flight, phase: "serving" }] });
          let looks = sample([], use(0), stats(100, 0, 1e9), 0);
          looks = sample(looks, use(0), stats(110, 2, 1e9 + 40e6), 2000);
          looks = sample(looks, use(1), stats(110, 2, 1e9 + 40e6), 4000);
          looks = sample(looks, use(1), stats(110, 2, 1e9 + 40e6), 6000);
          looks = sample(looks, use(0), stats(3, 0, 9e6), 8000); // loaded again
          const told = looks.map((look) =>
            [look.perSecond, look.failedPerSecond, look.latencyMs, [...look.stuck.values()]]);
          for (let at = 10_000; at < 1_000_000; at += 2000) looks = sample(looks, use(0), [], at);
          return [looks.length, told];
        }""")
    assert looks == [
        150,
        [[None, None, None, []], [5, 1, 4, []], [0, 0, None, [4000]], [0, 0, None, [4000]], [1.5, 0, 3, []]],
    ]


async def test_a_model_that_answers_nothing_is_told_of(server: Server, browser: Browser) -> None:
    async with Console.opened(browser, server.url) as console:
        told = await console.page.evaluate("""async () => {
          const { problems } = await import("/console/problems.js");
          const use = { job_id: "j", model_id: "m", in_flight: 2 };
          const resources = { models: [use], waiting: [], budget_bytes: 100, free_bytes: 50 };
          const models = new Map([["m", { id: "m", state: "loaded", error: null }]]);
          const samples = [{ stuck: new Map([["j", 1000]]) }];
          const store = { models, samples, resources, jobs: [], jobsNow: () => [] };
          const told = (each) => [each.level, each.title, each.why, each.offers[0]?.do];
          const at = (now) => problems(store, now).map(told);
          const before = at(10_000), after = at(14_000);
          resources.free_bytes = -7;
          return [before, after, at(9000)];
        }""")
    assert told == [
        [],
        [["critical", "m does not answer", "2 requests in flight, none answered for 13 s.", "unload"]],
        [["critical", "Memory is over budget", "By 7 B of 100 B: models have grown.", None]],
    ]


async def test_what_others_wrote_cannot_hide_or_turn_text_around(server: Server, browser: Browser) -> None:
    async with Console.opened(browser, server.url) as console:
        told = await console.page.evaluate("""async () => {
          const { plain, oneLine, bytes, duration } = await import("/console/format.js");
          return [plain("a\\u202eb\\u0000c\\nd"), oneLine(" a\\n\\tb "), plain("x".repeat(9000)).length,
            bytes(0), bytes(999_499), bytes(1_234_000_000), bytes(-54_000_000),
            duration(0.0851), duration(7200)];
        }""")
    texts = ["a\ufffdb\ufffdc\nd", "a b", 4097]
    assert told == [*texts, "0 B", "999 kB", "1.2 GB", "\u221254 MB", "85 ms", "2 h"]


async def test_a_request_begins_with_zeros_of_the_right_shape(server: Server, browser: Browser) -> None:
    async with Console.opened(browser, server.url) as console:
        [small, large, refused, exact] = await console.page.evaluate("""async () => {
          const { request, sent } = await import("/console/zeros.js");
          const ask = (...inputs) => JSON.parse(sent(request(inputs)));
          const image = { name: "i", datatype: "FP32", shape: [-1, 3, 224, 224] };
          const flags = { name: "a", datatype: "BOOL", shape: [2] };
          const small = ask(flags, { name: "b", datatype: "BYTES", shape: [-1] });
          let refused = "";
          try { sent('{"inputs": [{"name": "i", "shape": [1e9], "data": "zeros"}]}'); }
          catch (error) { refused = error.message; }
          const exact = sent('{"inputs": [{"data": [9007199254740993]}]}');
          const large = [request([image]).length < 200, ask(image).inputs[0].data.length];
          return [small, large, refused, exact];
        }""")
    assert small["inputs"] == [
        {"name": "a", "datatype": "BOOL", "shape": [2], "data": [False, False]},
        {"name": "b", "datatype": "BYTES", "shape": [1], "data": [""]},
    ]
    assert large == [True, 3 * 224 * 224]
    assert "too large" in refused
    assert "9007199254740993" in exact  # one more than a number there can tell


async def test_the_pictures_of_the_readme(server: Server, browser: Browser, tmp_path: Path) -> None:
    folder = Path(PICTURES) if PICTURES else tmp_path
    async with Console.opened(browser, server.url, {"width": 1180, "height": 800}) as console:
        page = console.page
        await console.sign_in(server.api.token("admin"))
        for turn in range(SHOWN_S * 4 if PICTURES else 1):
            for _ in range(10 + 8 * (turn // 16 % 4)):
                await server.api.infer("fraud-check", QUESTION)
            await page.wait_for_timeout(250)
        await page.emulate_media(color_scheme="light")
        await page.screenshot(path=folder / "console-light.png")
        await page.emulate_media(color_scheme="dark")
        await page.get_by_label("Position", exact=True).fill("12")
        await page.keyboard.press("Enter")
        await expect(page.locator("#past-when")).to_contain_text("position 12")
        await page.locator("#past-when").click()  # the focus leaves the field
        await page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
        await page.screenshot(path=folder / "console-dark.png")
        await page.set_viewport_size({"width": PHONE["width"], "height": PHONE["height"]})
        await page.evaluate("scrollTo(0, 0)")
        await page.screenshot(path=folder / "console-phone.png")
    for picture in folder.glob("console-*.png"):
        assert picture.stat().st_size < MAX_BYTES, picture
