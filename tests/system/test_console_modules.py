"""What modules of the console do with what a server seldom says: each in a browser, and told by the test."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from aiohttp.test_utils import TestServer
from playwright.async_api import Browser
from support.browser import LIMIT_MS, Console, chromium, needs_browser
from support.smallapp import small_app, small_config

from server.pages import console_routes

pytestmark = [needs_browser, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """A browser for all tests of this file."""
    async with chromium() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """Where the page and its files are, and nothing else."""
    app = small_app(console_routes(), small_config(tmp_path_factory.mktemp("files") / "data"))
    async with TestServer(app) as server:
        yield str(server.make_url("/"))


async def told(browser: Browser, url: str, script: str) -> Any:
    """Return what a script says that runs in the page before anybody has signed in."""
    async with Console.opened(browser, url) as console:
        async with asyncio.timeout(LIMIT_MS / 1000):
            return await console.page.evaluate(script)


async def test_where_it_would_go_on_is_archived_it_looks_at_all_of_it_anew(
    browser: Browser, url: str
) -> None:
    [asked, mode, epoch] = await told(
        browser,
        url,
        """async () => {
          const { Live } = await import("/console/live.js"), { Store } = await import("/console/store.js");
          const { Refusal } = await import("/console/api.js");
          const asked = [], store = new Store();
          const answers = [
            () => new Response('{"position": 7}\\n'), // and the connection ends
            () => { throw new Refusal(410, { code: "archived" }); },
            () => new Response(new ReadableStream({ start: (body) =>
              body.enqueue(new TextEncoder().encode('{"stream": "live", "position": 9}\\n')) })),
          ];
          const api = { send: async (path) => answers[asked.push(path.split("=")[1]) - 1]() };
          const refresher = { everything: async () => asked.length ? 9 : 6, look: async () => {}, soon() {} };
          const live = new Live(api, store, refresher, { follows: true, onSignedOut() {} });
          live.run();
          await new Promise((live) => store.watch(() => store.connection.mode === "live" && live()));
          live.stop();
          return [asked, store.connection.mode, store.epoch];
        }""",
    )
    assert (asked, mode, epoch) == (["6", "7", "9"], "live", 2)


async def test_no_answer_has_it_wait_longer_than_a_minute_or_not_at_all(browser: Browser, url: str) -> None:
    waits = await told(
        browser,
        url,
        """async () => {
          const { Live } = await import("/console/live.js"), { Store } = await import("/console/store.js");
          const { Refusal } = await import("/console/api.js");
          const refused = async () => { throw new Refusal(429, {}, 1e10); }; // no timer goes as far
          const store = new Store();
          let times = 0;
          const refresher = { everything: () => (times += 1, refused()) };
          const live = new Live({}, store, refresher, { follows: true, onSignedOut() {} });
          live.run();
          await new Promise((soon) => setTimeout(soon, 200));
          live.stop();
          return [times, Math.round((store.connection.retryAt - Date.now()) / 10_000)];
        }""",
    )
    assert waits == [1, 6]


async def test_ages_are_told_by_the_server_s_clock_where_this_one_is_wrong(
    browser: Browser, url: str
) -> None:
    ages = await told(
        browser,
        url,
        """async () => {
          const { ago, learnClock } = await import("/console/format.js");
          const { problems } = await import("/console/problems.js");
          const hence = (seconds) => new Date(Date.now() + seconds * 1000);
          const job = { id: "j", kind: "unload", model_id: "m", status: "in_progress", finished_at: null };
          const store = { models: new Map(), samples: [], jobsNow: () => [job] };
          const ages = [];
          for (const seconds of [-3600, 3600, 1]) {
            learnClock(hence(seconds).toUTCString());
            job.started_at = hence(seconds - 2).toISOString();
            ages.push([ago(hence(seconds - 20.8).toISOString()).slice(0, 1), problems(store).length]);
          }
          learnClock(null);
          return ages;
        }""",
    )
    assert ages == [["2", 0], ["2", 0], ["1", 0]]  # what is nearly right is left as it is


async def test_the_past_has_all_models_those_first_that_were_loaded(browser: Browser, url: str) -> None:
    past = await told(
        browser,
        url,
        """async () => {
          const { Past } = await import("/console/past.js"), { Store } = await import("/console/store.js");
          const store = new Store(), asked = [];
          const model = (id, state) => ({ id, state, files: [] });
          const many = Array.from({ length: 600 }, (_, number) => model(`m${number}`, "unloaded"));
          const api = { get: async (path) => {
            asked.push(path);
            if (path.startsWith("/api/v1/events")) throw Object.assign(new Error(), { code: "archived" });
            return path.endsWith("cursor=") ? { models: many, next_cursor: "m599", as_of: 5 }
              : { models: [model("z", "loaded")], next_cursor: null, as_of: 5 };
          } };
          store.head = 5;
          new Past(api, store);
          const rows = document.getElementById("past-rows");
          while (!rows.firstChild) await new Promise((soon) => setTimeout(soon, 20));
          const said = ["past-none", "past-refusal"].map((id) => document.getElementById(id).textContent);
          return [rows.firstChild.textContent, ...said, asked[1].includes("at=5&cursor=m599")];
        }""",
    )
    assert past[0].startswith("zloaded")
    assert past[1:] == ["And 101 more.", "", True]


async def test_a_time_that_was_asked_for_is_shown_however_busy_the_ledger_is(
    browser: Browser, url: str
) -> None:
    shown = await told(
        browser,
        url,
        """async () => {
          const { Past } = await import("/console/past.js"), { Store } = await import("/console/store.js");
          const store = new Store(), soon = (ms) => new Promise((done) => setTimeout(done, ms));
          const events = { events: [{ type: "ServerStarted", actor: "system", data: {} }] };
          const api = { get: async (path, { signal }) => {
            await soon(300);
            signal.throwIfAborted();
            const at = new URLSearchParams(path.split("?")[1]).get("at") ?? "";
            return path.startsWith("/api/v1/events") ? events
              : { models: [], next_cursor: null, as_of: at.includes("T") ? 3 : Number(at) };
          } };
          store.head = 10;
          new Past(api, store);
          await soon(1000);
          const time = document.getElementById("past-time"), when = document.getElementById("past-when");
          time.value = "2020-02-02T02:02:02";
          time.dispatchEvent(new Event("change"));
          for (let look = 0; look < 8; look++) {
            store.saw(store.head + 1);
            store.changed();
            await soon(250);
          }
          return when.textContent;
        }""",
    )
    assert shown.startswith("position 3")


async def test_without_a_stream_the_ledger_is_asked_for_again_as_it_grows(browser: Browser, url: str) -> None:
    asked = await told(
        browser,
        url,
        """async () => {
          const { Ledger } = await import("/console/ledger.js");
          const { Store } = await import("/console/store.js");
          const store = new Store(), soon = (ms) => new Promise((done) => setTimeout(done, ms));
          let asked = 0;
          const page = () => ({ events: [], as_of: store.head, oldest: 1, next_cursor: null });
          const api = { get: async () => (asked++, page()) };
          const grow = async (mode) => {
            store.saw(store.head + 1);
            store.connect(mode);
            await soon(400);
            return asked;
          };
          new Ledger(api, store, () => {});
          const told = [await grow("live"), await grow("polled"), await grow("polled")];
          document.getElementById("ledger-follow").click();
          return [...told, await grow("polled")];
        }""",
    )
    assert asked == [0, 1, 2, 2]


async def test_older_events_can_be_asked_for_however_many_have_come(browser: Browser, url: str) -> None:
    seen = await told(
        browser,
        url,
        """async () => {
          const { Ledger } = await import("/console/ledger.js");
          const { Store } = await import("/console/store.js");
          const store = new Store(), soon = (ms) => new Promise((done) => setTimeout(done, ms));
          const event = (position) => ({ position, type: "ServerStarted", actor: "system", data: {} });
          const before = (path) => Number(new URLSearchParams(path.split("?")[1]).get("before"));
          const api = { get: async (path) => ({ as_of: 500, oldest: 1, next_cursor: before(path) - 50,
            events: Array.from({ length: 50 }, (_, back) => event(before(path) - 1 - back)) }) };
          new Ledger(api, store, () => {});
          for (let position = 1; position <= 500; position++) store.heard(event(position), "");
          const [list, older] = ["list", "older"].map((id) => document.getElementById(`ledger-${id}`));
          const look = async () => (await soon(300), [list.children.length, older.hidden]);
          const seen = [await look()];
          older.click();
          return [...seen, await look(), list.lastChild.dataset.position];
        }""",
    )
    assert seen == [[400, False], [450, False], "51"]
