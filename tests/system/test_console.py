"""The console as an operator uses it: a real browser on a real server, whose models are real."""

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Route, expect
from support import models
from support.browser import Console, chromium, needs_browser, tokens_in
from support.http import when
from support.process import Server, serving

from server.config import Config

pytestmark = [needs_browser, pytest.mark.asyncio(loop_scope="module")]

ONE = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}


def write_models(root: Path) -> None:
    """Put into the repository what each test has for itself."""
    for version in (1, 2):
        for model_id in ("digits", "past"):
            models.save(models.add(float(version)), root, model_id, version)
    models.save(models.slow_to_fold(900, 40), root, "slow")
    models.save(models.counting_loop(), root, "counter")
    models.save_bytes(models.TEXT, root, "broken")
    models.save(
        models.weights(36), root, "large"
    )  # it needs 98 MB, and gets them where nothing else is loaded
    for model_id in ("refused", "hostile"):
        models.save(models.add(), root, model_id)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """A server for all tests of this file."""
    root = tmp_path_factory.mktemp("console")
    write_models(root / "repository")
    config = Config(repository=root / "repository", data=root / "data")
    async with serving(config, "--memory-budget=100000000") as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """A browser for all tests of this file; each has a profile of its own."""
    async with chromium() as running:
        yield running


async def test_an_operator_loads_sees_it_become_ready_predicts_swaps_pins_and_unloads(
    server: Server, browser: Browser
) -> None:
    async with Console.opened(browser, server.url) as console:
        page = console.page
        await console.sign_in(server.api.token("admin"))
        await console.see("digits", "unloaded")
        await console.press("digits", "Load")
        await page.get_by_label("Version").select_option("1")
        await console.choose("Load")
        await console.see("digits", "loaded")
        await expect(page.locator("#notices")).to_contain_text("Load of digits completed")

        await console.press("digits", "Predict")
        await expect(page.locator("#predict-body")).to_have_value(
            re.compile(r'"shape": \[1\], "data": \[0\]')
        )
        await console.choose("Predict")
        await expect(page.locator("#predict-answer")).to_contain_text('"data":[1.0]')
        await expect(page.locator("#predict-told")).to_contain_text(
            "by digits/1, the ModelLoaded at position"
        )
        await console.choose("Close")

        await console.press("digits", "Swap")
        await expect(page.locator("#load-text")).to_contain_text("Version 1 is loaded")
        await page.get_by_label("Strategy").select_option("in_place")
        await console.choose("Swap")
        await expect(console.row("digits").locator("[data-label=Version]")).to_have_text("2")
        await console.see("digits", "loaded")
        assert (await server.api.jobs("?model=digits"))[-2]["parameters"]["strategy"] == "in_place"

        position = (await server.api.model("digits"))["position"]
        await console.press("digits", "Pin")
        await expect(console.row("digits").get_by_text("pinned")).to_be_visible()
        await console.press("digits", "Unpin")
        await expect(console.row("digits").get_by_text("pinned")).to_be_hidden()
        assert (await server.api.model("digits"))["files"]
        assert (await server.api.infer("digits", ONE)).headers["Loadledger-Model"].startswith("digits/2;")
        assert position

        await console.press("digits", "Unload")
        await console.choose("Unload")
        await console.see("digits", "unloaded")
        assert not tokens_in(console, server.api, "admin")


async def test_the_stages_of_a_load_are_seen_as_they_happen_and_the_ledger_grows_by_itself(
    server: Server, browser: Browser
) -> None:
    async with Console.opened(browser, server.url) as console:
        await console.sign_in(server.api.token("admin"))
        job = await server.api.accepted_load("slow")
        shown = console.page.locator(f'[data-job="{job["id"]}"]')
        await expect(shown.locator("[aria-current=step]")).to_have_text("loading")
        await console.see("slow", "loading")
        await shown.get_by_role("button", name="Cancel").click()
        await expect(shown.locator(".pill")).to_have_text("cancelled")
        ended = await server.api.ended(job["id"])
        event = console.page.locator(f'#ledger-list [data-position="{ended["position"]}"]')
        await expect(event).to_contain_text("JobCancelled")
        await event.locator("summary").click()
        line = (await server.api.get(f"/api/v1/events?after={ended['position'] - 1}&limit=1")).body.decode()
        await expect(event.locator("pre")).not_to_be_empty()
        text = await event.locator("pre").inner_text()
        assert f'{{"events":[{text}],' in line
        await console.page.get_by_label("Type").select_option("LoadRequested")
        await expect(event).to_be_hidden()
        await expect(console.page.locator("#ledger-list strong").first).to_have_text("LoadRequested")


async def test_a_worker_that_is_stopped_is_ended_by_force(server: Server, browser: Browser) -> None:
    async with Console.opened(browser, server.url) as console:
        await console.sign_in(server.api.token("admin"))
        await server.api.load("counter")
        await console.see("counter", "loaded")
        os.kill(server.worker(), signal.SIGSTOP)
        trips = {"name": "trips", "datatype": "INT64", "shape": [], "data": [1]}
        asking = asyncio.create_task(server.api.infer("counter", trips))
        await expect(console.row("counter").locator("[data-label='In flight']")).to_have_text("1")
        await console.press("counter", "Unload")
        await expect(console.page.locator("#unload-text")).to_contain_text("1 request in flight")
        await console.choose("Force unload")
        await console.see("counter", "unloaded")
        assert (await asking).status == 503


async def test_what_failed_and_what_waits_comes_first_with_its_reason_and_what_to_do(
    server: Server, browser: Browser
) -> None:
    async with Console.opened(browser, server.url) as console:
        await console.sign_in(server.api.token("admin"))
        await server.api.failed_load("broken")
        failed = console.attention.filter(has_text="broken failed")
        await expect(failed).to_contain_text("invalid_model: ")
        await expect(failed).to_contain_text("Put a right one there")
        await expect(failed.get_by_role("button")).to_have_text(re.compile("^Load…"))
        assert "⚠" in await console.page.title()
        first = console.page.locator("#models-rows > tr").first
        await expect(first.locator(".pill")).to_have_text("failed")
        await server.api.load("hostile")
        waiting = await server.api.accepted_load("large")
        await server.api.job_when(waiting["id"], status="pending")
        waits = console.attention.filter(has_text="Load of large")
        await expect(waits).to_contain_text("Asked for by alice")
        await expect(console.attention.filter(has_text="Memory is tight")).to_be_visible()
        await waits.get_by_role("button", name="Cancel").click()
        await expect(waits).to_have_count(0)


OFFERED: dict[str, tuple[str, set[str], bool]] = {
    "admin": ("Live", {"Predict…", "Swap…", "Pin", "Unload…"}, True),
    "audit": ("Live", set(), True),
    "predict": ("Every 3 s", {"Predict…"}, False),
}
"""By role: how the page is kept alive, what a loaded model offers, and whether ledger and past are shown."""


@pytest.mark.parametrize("role", OFFERED)
async def test_what_a_role_may_not_do_is_not_offered(server: Server, browser: Browser, role: str) -> None:
    says, offers, shown = OFFERED[role]
    await server.api.load("hostile")
    async with Console.opened(browser, server.url) as console:
        await console.sign_in(server.api.token(role), says=says)
        await console.see("hostile", "loaded")
        buttons = await console.row("hostile").get_by_role("button").all_inner_texts()
        assert {text.split()[0] for text in buttons} == offers
        for part in ("#ledger", "#past"):
            assert await console.page.locator(part).is_visible() == shown
        assert not tokens_in(console, server.api, role)


async def test_a_refusal_of_the_server_is_said_where_it_was_asked_for(
    server: Server, browser: Browser
) -> None:
    async def as_somebody_else(route: Route) -> None:
        authorization = f"Bearer {server.api.token('predict')}"
        await route.continue_(headers={**route.request.headers, "authorization": authorization})

    async with Console.opened(browser, server.url) as console:
        await console.sign_in(server.api.token("admin"))
        await console.page.route("**/refused/load", as_somebody_else)
        await console.press("refused", "Load")
        await console.choose("Load")
        await expect(console.page.locator("dialog[open] .refusal")).to_contain_text("Not allowed: ")
        await expect(console.page.locator("dialog[open] .refusal")).to_contain_text("admin")
        await console.choose("Keep as it is")


async def test_a_token_that_is_none_or_not_taken_is_told_so_and_sign_out_forgets_it(
    server: Server, browser: Browser
) -> None:
    async with Console.opened(browser, server.url) as console:
        page, why = console.page, console.page.locator("#sign-in-why")
        await page.get_by_label("Token").fill("nonsense")
        await page.keyboard.press("Enter")
        await expect(why).to_contain_text("This is no token")
        head, payload, _ = server.api.token("admin").split(".")
        await page.get_by_label("Token").fill(f"{head}.{payload}.{'A' * 86}")
        await page.keyboard.press("Enter")
        await expect(why).to_contain_text("The server does not take this token")
        await console.sign_in(f"Bearer {server.api.token('admin')}")
        await page.reload()
        await expect(console.connection).to_have_text("Live")
        await page.get_by_role("button", name="Sign out").click()
        await expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        assert not await page.evaluate("sessionStorage.getItem('loadledger.token')")
        assert await page.evaluate("localStorage.length + document.cookie.length") == 0


async def test_a_double_click_signs_in_once(server: Server, browser: Browser) -> None:
    async with Console.opened(browser, server.url) as console:
        await console.page.get_by_label("Token").fill(server.api.token("admin"))
        await console.page.get_by_role("button", name="Sign in").dblclick()
        await expect(console.connection).to_have_text("Live")
        await expect(console.page.locator("#charts > *")).to_have_count(3)
        assert sum("/events/stream" in url for url in console.urls) == 1


async def test_time_travel_shows_who_had_loaded_which_bytes(server: Server, browser: Browser) -> None:
    await server.api.load("past", version=1)
    then = await server.api.model("past")
    await server.api.load("past", version=2)
    async with Console.opened(browser, server.url) as console:
        await console.sign_in(server.api.token("audit"))
        row = console.page.locator("#past-rows > tr", has=console.page.get_by_text("past", exact=True))
        now = (await server.api.model("past"))["files"][0]["sha256"]
        await expect(row.locator("code")).to_have_text(now)
        await console.page.get_by_label("Position", exact=True).fill(str(then["position"]))
        await console.page.keyboard.press("Enter")
        await expect(row.locator("code")).to_have_text(then["files"][0]["sha256"])
        await expect(row.locator("[data-label='Loaded by']")).to_contain_text("alice")
        await expect(console.page.locator("#past-event")).to_contain_text("ModelLoaded past 1")
        slider = console.page.get_by_label("Position of the ledger")
        await slider.press("ArrowLeft")
        await expect(row.locator(".pill")).to_have_text("loading")
        await slider.press("Home")
        await expect(console.page.locator("#past-when")).to_have_text("before everything")


async def test_what_others_wrote_is_text_and_nothing_else(server: Server, browser: Browser) -> None:
    name = "<img src=/x onerror=alert(1)>"
    await server.api.unload("hostile") if (await server.api.model("hostile"))["state"] == "loaded" else None
    asked = await server.api.post("/api/v1/models/hostile/load", subject=name, wait=60)
    assert asked.json["status"] == "completed"
    async with Console.opened(browser, server.url) as console:
        await console.sign_in(server.api.token("admin"))
        await expect(console.row("hostile")).to_contain_text(name)
        await expect(console.page.locator("#ledger-list")).to_contain_text(name)
        assert await console.page.locator("main img").count() == 0


async def test_a_server_that_goes_is_told_loudly_and_found_again_when_it_is_back(
    browser: Browser, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    models.save(models.add(), repository, "m")
    config = Config(repository=repository, data=tmp_path / "data")
    async with serving(config) as first:
        port = first.url.rpartition(":")[2]
        async with Console.opened(browser, first.url) as console:
            await console.sign_in(first.api.token("admin"))
            await first.api.load("m")
            await console.see("m", "loaded")
            await first.stop()
            await expect(console.page.locator("#lost")).to_contain_text("Not connected for")
            await expect(console.connection).to_have_text("Not connected")
            async with serving(replace(config, port=int(port)), f"--port={port}") as second:
                await expect(console.connection).to_have_text("Live")
                await expect(console.page.locator("#lost")).to_be_hidden()
                started = console.page.locator("#ledger-list strong", has_text="ServerStarted")
                await expect(started).to_have_count(2)
                await when(lambda: second.api.model("m"), lambda model: model["state"] == "loaded")
                await console.see("m", "loaded")
