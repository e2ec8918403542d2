"""The console's nodes in a real browser: what runs where, and draining one.

With `SCREENSHOTS=FOLDER` a picture is written there.
"""

import os
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import BrowserContext, Locator, expect
from support import models
from support.browser import DESKTOP, PHONE, Console, needs_browser
from support.http import LocalApi
from support.nodes import list_nodes, local_node
from support.postgres import Database, join_shared_server
from support.reachable import node_of
from support.replicas import make_ledger
from support.workers import until

from features.nodes.facts import NodeJoined

pytestmark = [needs_browser, pytest.mark.asyncio(loop_scope="session")]

USED_OF_BUDGET = re.compile(r"^[\d.]+ [kMG]?B of [\d.]+ [MG]B$")
PICTURES = os.environ.get("SCREENSHOTS")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def database() -> AsyncIterator[Database]:
    """A ledger for the module's nodes."""
    async with (await join_shared_server()).database(make_ledger) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def nodes(
    database: Database, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[dict[str, LocalApi]]:
    """Three nodes with six models."""
    folder = tmp_path_factory.mktemp("nodes")
    async with AsyncExitStack() as stack:
        started = {
            name: await stack.enter_async_context(
                local_node(database, folder, name, node_attributes=f"zone={zone}")
            )
            for name, zone in (("loadledger-0", "a"), ("loadledger-1", "b"), ("loadledger-2", "a"))
        }
        first = started["loadledger-0"]
        peers = node_of(first.app).membership
        await until(lambda: len(peers.peers) == 3 and all(each.position for each in peers.peers.values()))
        for number in range(6):  # of other bytes each: a node that has the files goes first
            first.save(models.add(float(number)), f"m{number}")
            await first.load(f"m{number}")
        yield started


def row(console: Console, node: str) -> Locator:
    return console.page.locator("#nodes-rows > tr", has=console.page.get_by_text(node, exact=True))


async def test_nodes_show_what_runs_where_and_are_drained(
    nodes: dict[str, LocalApi], browser: BrowserContext, tmp_path: Path
) -> None:
    api = nodes["loadledger-1"]
    [joined] = [event.position for event in await api.events() if isinstance(event.data, NodeJoined)][:1]
    async with Console.opened(browser, api.url) as console:
        page = console.page
        await console.sign_in(api.token("admin"))
        await console.go("#/nodes")
        await expect(page.locator(".page-head .count")).to_have_text("3 joined")
        listed = await list_nodes(api)
        for name, node in listed.items():
            await expect(row(console, name).locator(".at-node li")).to_have_count(len(node["models"]))
            await expect(row(console, name).locator("[data-label=Lease]")).to_contain_text("renewed")
            await expect(row(console, name).locator("[data-label=Memory]")).to_have_text(USED_OF_BUDGET)
        await expect(row(console, "loadledger-1").get_by_text("this node")).to_be_visible()
        await expect(row(console, "loadledger-0").get_by_text("places loads")).to_be_visible()
        await expect(row(console, "loadledger-2").locator("[data-label=Address] a")).to_have_attribute(
            "href", "http://loadledger-2/"
        )
        await page.screenshot(path=Path(PICTURES or tmp_path) / "nodes.png", full_page=True)

        await row(console, "loadledger-2").get_by_role("button", name="Drain… loadledger-2").click()
        has = len(listed["loadledger-2"]["models"])
        told = rf"^It has {has} models?\. Each is loaded at another node \(loadledger-0, loadledger-1\)"
        await expect(page.locator("#drain-text")).to_have_text(re.compile(told))
        assert await console.serious("dialog[open]") == []
        await page.set_viewport_size(PHONE)
        await console.fits()
        await console.choose("Drain")
        await expect(row(console, "loadledger-2").locator(".pill")).to_have_text("draining")
        await expect(row(console, "loadledger-2").locator(".at-node li")).to_have_count(0)
        await expect(row(console, "loadledger-2").get_by_role("button")).to_have_count(0)
        await expect(page.locator("#notices")).to_contain_text("loadledger-2 drains")
        await expect(page.locator(".page-head .count")).to_have_text("2 joined of 3")
        await page.screenshot(path=Path(PICTURES or tmp_path) / "nodes-phone.png", full_page=True)
        await console.fits()
        assert await console.serious() == []
        await page.set_viewport_size(DESKTOP)
        await console.fits()

        await console.go("#/timeline")
        await expect(page.locator("#timeline-rows .lane-name.server")).to_have_text(
            ["loadledger-0", "loadledger-1", "loadledger-2"]
        )
        await expect(page.locator("#timeline-rows .seg.draining")).to_have_count(1)
        await page.get_by_role("button", name="Before").click()
        await expect(page.locator("#past-nodes")).to_have_text(
            re.compile(r"^Nodes: loadledger-0, loadledger-1, loadledger-2 draining since [\d:]+$")
        )
        await page.screenshot(path=Path(PICTURES or tmp_path) / "nodes-past.png", full_page=True)
        await page.locator("#past-position").fill(str(joined))
        await page.locator("#past-position").press("Enter")
        await expect(page.locator("#past-nodes")).to_have_text("Nodes: loadledger-0")

        await console.go("#/")
        home = (await api.model("m0"))["node"]
        await expect(console.row("m0").locator("[data-label=Node]")).to_have_text(home)
        await console.go("#/nodes")
        await row(console, "loadledger-0").locator(".at-node a").first.click()
        facts = page.locator(".facts > div", has=page.get_by_text("Node", exact=True))
        await expect(facts).to_contain_text("loadledger-0")
