"""The console's modules, each in a page of its own: a script in the browser returns what is compared."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from aiohttp.test_utils import TestServer
from support.browser import LIMIT_MS, Console, chromium, needs_browser
from support.http import small_app, small_config

from server.api import pages

pytestmark = [needs_browser, pytest.mark.asyncio(loop_scope="module")]

PRELUDE = """
const { Store } = await import("/console/store.js");
const soon = (ms) => new Promise((done) => setTimeout(done, ms));
const { Router } = await import("/console/router.js");
"""
CASES: dict[str, tuple[object, str]] = {
    "stream continues anew where its position was archived": (
        [["6", "7", "9"], "live", 2],
        """
        const { LiveUpdates } = await import("/console/liveupdates.js");
        const { Refusal } = await import("/console/api.js");
        const asked = [], store = new Store();
        const answers = [
          () => new Response('{"position": 7}\\n'), // and the connection ends
          () => { throw new Refusal(410, { code: "archived" }); },
          () => new Response(new ReadableStream({ start: (body) =>
            body.enqueue(new TextEncoder().encode('{"stream": "live", "position": 9}\\n')) })),
        ];
        const api = { send: async (path) => answers[asked.push(path.split("=")[1]) - 1]() };
        const fetchAll = async () => (asked.length ? 9 : 6);
        const refresher = { fetchAll, fetchStatus: async () => {}, schedule() {} };
        const live = new LiveUpdates(api, store, refresher, { follows: true, onSignedOut() {} });
        live.run();
        await new Promise((live) => store.watch(() => store.connection.mode === "live" && live()));
        live.stop();
        return [asked, store.connection.mode, store.epoch];
        """,
    ),
    "a long Retry-After waits at most a minute": (
        [1, 6],
        """
        const { LiveUpdates } = await import("/console/liveupdates.js");
        const { Refusal } = await import("/console/api.js");
        const refused = async () => { throw new Refusal(429, {}, 1e10); }; // no timer goes as far
        const store = new Store();
        let times = 0;
        const refresher = { fetchAll: () => (times += 1, refused()) };
        const live = new LiveUpdates({}, store, refresher, { follows: true, onSignedOut() {} });
        live.run();
        await soon(200);
        live.stop();
        return [times, Math.round((store.connection.retryAt - Date.now()) / 10_000)];
        """,
    ),
    "lost and late nodes, and vain drains, need somebody": (
        [
            ["Node b is late", None],
            ["Node a is lost", "1"],
            ["Node c drains, and its models stay there", None],
        ],
        """
        const { problems } = await import("/console/problems.js");
        const store = new Store(), none = { epoch: 1, models: [], jobs: [], renewed_at: null, late: false };
        const model = { id: "m", version: 1, state: "loaded" };
        store.nodes = [
          { ...none, id: "a", phase: "lost" },
          { ...none, id: "b", phase: "draining", late: true },
          { ...none, id: "c", phase: "draining", models: [model] },
          { ...none, id: "d", phase: "left" },
        ];
        const found = problems(store).map(({ title, occurrence }) => [title, occurrence]);
        store.nodes.push({ ...none, id: "e", phase: "joined" });
        return problems(store).length === 2 ? found : problems(store);
        """,
    ),
    "a node's address is a link only if a browser can open it": (
        [["http://a:8080/", None, None], ["http://a:8080", "javascript:alert(1)", "http://"]],
        """
        const { nodesView } = await import("/console/nodes.js");
        const store = new Store(), addresses = ["http://a:8080", "javascript:alert(1)", "http://"];
        const none = { phase: "joined", epoch: 1, models: [], jobs: [], labels: [], release: "1" };
        store.nodes = addresses.map((address, id) => ({ ...none, id: String(id), address }));
        nodesView(store, {});
        const cells = [...document.querySelectorAll("#nodes-rows [data-label=Address]")];
        const links = cells.map((cell) => cell.querySelector("a")?.href ?? null);
        return [links, cells.map((cell) => cell.firstChild.firstChild.firstChild.data)];
        """,
    ),
    "ages follow the server's clock": (
        [["2", 0], ["2", 0], ["1", 0]],
        """
        const { ago, learnClock } = await import("/console/format.js");
        const { problems } = await import("/console/problems.js");
        const hence = (seconds) => new Date(Date.now() + seconds * 1000);
        const job = { id: "j", kind: "unload", model_id: "m", status: "in_progress", finished_at: null };
        const store = { models: new Map(), nodes: [], failures: new Map(), jobsNow: () => [job] };
        const ages = [];
        for (const seconds of [-3600, 3600, 1]) {
          learnClock(hence(seconds).toUTCString());
          job.started_at = hence(seconds - 2).toISOString();
          ages.push([ago(hence(seconds - 20.8).toISOString()).slice(0, 1), problems(store).length]);
        }
        learnClock(null);
        return ages;
        """,
    ),
    "addresses are read as they were written": (
        [
            ["#/models/a%20b%2F%3F", "models", "a b/?"],
            ["#/at/2026-01-31T14%3A02%3A00Z?last=60", "at", "2026-01-31T14:02:00Z"],
            ["#/", "", None],
            ["", "", "models/", "other/1", "ledger/1", "at/%E0"],
            {"from": "1", "find": "x y"},
            ["models m", "jobs j", "jobs j", "#/jobs/j?last=all&find=x"],
        ],
        """
        const { href, parse } = await import("/console/router.js");
        const time = "2026-01-31T14:02:00Z";
        const written = [href("models", "a b/?"), href("at", time, { last: 60, from: null }), href()];
        const told = written.map((address) => [address, parse(address).view, parse(address).id]);
        const none = ["", "#", "#/models/", "#/other/1", "#/ledger/1", "#/at/%E0"]
          .filter((address) => parse(address).view === "");
        const router = new Router(), seen = [];
        const changed = () => new Promise((done) =>
          addEventListener("hashchange", () => setTimeout(done), { once: true }));
        router.watch(({ view, id }) => view && seen.push(`${view} ${id}`));
        location.hash = router.href("models", "m", { last: "all" });
        await changed();
        router.replace("jobs", "j");
        router.replace("jobs", "j", { find: "x" });
        const address = location.hash;
        history.back();
        await changed();
        return [...told, none.map((address) => address.slice(2)), parse("#/ledger?from=1&find=x+y").query,
          [...seen.slice(0, 3), address]];
        """,
    ),
    "an axis names round times that are apart": (
        [["00:00:10", 7], ["14:30", 9], ["12 Jan", 8], ["1 Feb", 8], ["2026", 5]],
        """
        const { Scale, ticks, YEAR, DAY, HOUR, MINUTE } = await import("/console/timescale.js");
        const named = (from, span, index) => {
          const scale = new Scale(from, from + span, 900), found = ticks(scale);
          const places = found.map((tick) => scale.x(tick.time));
          const apart = places.slice(1).every((place, before) => place - places[before] >= 40);
          return [found[index].label, apart ? found.length : 0];
        };
        const at = (...parts) => new Date(2026, ...parts).getTime();
        return [named(at(0, 12), MINUTE, 1), named(at(0, 12, 14), 4 * HOUR, 1), named(at(0, 12), 7 * DAY, 0),
          named(at(0, 12), 60 * DAY, 2), named(at(0, 1), 5 * YEAR, 0)];
        """,
    ),
    "time travel lists loaded models first": (
        [True, "And 101 more.", "", True],
        """
        const { TimeTravel } = await import("/console/timetravel.js");
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
        new TimeTravel(api, store, new Router(), () => {});
        const rows = document.getElementById("past-rows");
        while (!rows.firstChild) await soon(20);
        const said = ["past-none", "past-refusal"].map((id) => document.getElementById(id).textContent);
        return [rows.firstChild.textContent.startsWith("zloaded"), ...said,
          asked[1].includes("at=5&cursor=m599")];
        """,
    ),
    "time travel shows a time while the ledger grows": (
        True,
        """
        const { TimeTravel } = await import("/console/timetravel.js");
        const store = new Store();
        const events = { events: [{ type: "ServerStarted", actor: "system", data: {} }] };
        const api = { get: async (path, { signal }) => {
          await soon(300);
          signal.throwIfAborted();
          const at = new URLSearchParams(path.split("?")[1]).get("at") ?? "";
          return path.startsWith("/api/v1/events") ? events
            : { models: [], next_cursor: null, as_of: at.includes("T") ? 3 : Number(at) };
        } };
        store.head = 10;
        new TimeTravel(api, store, new Router(), () => {});
        await soon(1000);
        const time = document.getElementById("past-time"), when = document.getElementById("past-when");
        time.value = "2020-02-02T02:02:02";
        time.dispatchEvent(new Event("change"));
        for (let look = 0; look < 8; look++) {
          store.advance(store.head + 1);
          store.notify();
          await soon(250);
        }
        return when.textContent.startsWith("position 3");
        """,
    ),
    "the polled ledger is fetched as it grows": (
        [0, 1, 2, 2],
        """
        const { Ledger } = await import("/console/ledger.js");
        const store = new Store();
        let asked = 0;
        const page = () => ({ events: [], as_of: store.head, oldest: 1, next_cursor: null });
        const api = { get: async () => (asked++, page()) };
        const grow = async (mode) => {
          store.advance(store.head + 1);
          store.connect(mode);
          await soon(400);
          return asked;
        };
        new Ledger(api, store, () => {});
        const told = [await grow("live"), await grow("polled"), await grow("polled")];
        document.getElementById("ledger-follow").click();
        return [...told, await grow("polled")];
        """,
    ),
    "older events can be fetched": (
        [[400, False], [450, False], "51"],
        """
        const { Ledger } = await import("/console/ledger.js");
        const store = new Store();
        const event = (position) => ({ position, type: "ServerStarted", actor: "system", data: {} });
        const before = (path) => Number(new URLSearchParams(path.split("?")[1]).get("before"));
        const api = { get: async (path) => ({ as_of: 500, oldest: 1, next_cursor: before(path) - 50,
          events: Array.from({ length: 50 }, (_, back) => event(before(path) - 1 - back)) }) };
        new Ledger(api, store, () => {});
        for (let position = 1; position <= 500; position++) store.onEvent(event(position));
        const [list, older] = ["list", "older"].map((id) => document.getElementById(`ledger-${id}`));
        const look = async () => (await soon(300), [list.children.length, older.hidden]);
        const seen = [await look()];
        older.click();
        return [...seen, await look(), list.lastChild.dataset.position];
        """,
    ),
    "focus stays when rows move": (
        ["b", "bd"],
        """
        const { h, reconcile } = await import("/console/dom.js");
        const list = document.body.appendChild(h("ul"));
        const make = (key) => h("li", {}, h("button", {}, key));
        const show = (...keys) => reconcile(list, keys, make, (key) => key);
        show("a", "b", "c");
        list.children[1].firstChild.focus();
        show("c", "b", "d", "a");
        show("b", "d");
        return [document.activeElement.textContent, list.textContent];
        """,
    ),
    "requests without an answer are found": (
        [[], [4000], [4000], [], [10_000]],
        """
        const { findUnanswered } = await import("/console/refresher.js");
        const stats = (requests, failures) => [{ name: "m", version: "1", inference_stats: {
          success: { count: requests }, fail: { count: failures } } }];
        const use = (in_flight) => ({ models: [
          { job_id: "j", model_id: "m", version: 1, in_flight, phase: "serving" }] });
        const told = [];
        let last = null;
        for (const [at, flying, ...counts] of [[2000, 0], [4000, 1, 7, 0], [6000, 1, 7, 0], [8000, 1, 7, 1],
          [10_000, 1, 7, 1]]) {
          last = findUnanswered(last, use(flying), counts.length ? stats(...counts) : [], at);
          told.push([...last.since.values()]);
        }
        return told;
        """,
    ),
    "problems: unanswered, over budget, unclean, grouped by cause": (
        [
            [],
            [["critical", "m does not answer", "2 requests in flight, none answered for 13 s.", "unload"]],
            [["critical", "Memory is over budget", "By 7 B of 100 B: models have grown.", None]],
            [["warning", "The server ended unexpectedly", "The last event was recorded", None]],
            ["critical", "3 models failed: invalid_model", "Asked for by alice, bob.", "j1,j2,j3", 3],
        ],
        """
        const { problems } = await import("/console/problems.js");
        const use = { job_id: "j", model_id: "m", in_flight: 2 };
        const resources = { models: [use], waiting: [], budget_bytes: 100, free_bytes: 50 };
        const models = new Map([["m", { id: "m", state: "loaded", error: null }]]);
        const unanswered = { since: new Map([["j", 1000]]) };
        const failures = new Map(), nodes = [];
        const store = { models, nodes, unanswered, resources, started: null, failures, jobsNow: () => [] };
        const told = (each) => [each.level, each.title, each.why, each.actions[0]?.do];
        const at = (now) => problems(store, now).map(told);
        const found = [at(10_000), at(14_000)];
        resources.free_bytes = -7;
        found.push(at(9000));
        resources.free_bytes = 50;
        const seen = { unclean: true, last_event_at: "2026-01-01T00:00:00Z", last_seen_at: null };
        store.started = { position: 9, recorded_at: "2026-01-01T00:01:00Z", data: seen };
        found.push(at(9000).map(([level, title, why]) => [level, title, why.slice(0, 27), null]));
        store.started = null;
        for (const [number, by] of [[1, "bob"], [2, "alice"], [3, "bob"]]) {
          const id = `broken${number}`;
          models.set(id, { id, state: "failed", error: { code: "invalid_model", message: "no" } });
          store.failures.set(id, { id: `j${number}`, requested_by: by, finished_at: null });
        }
        const [group] = problems(store, 9000);
        const { level, title, why, occurrence, members } = group;
        return [...found, [level, title, why, occurrence, members.length]];
        """,
    ),
    "a chart draws samples, breaks at gaps and is read by keyboard": (
        ["p50 2 ms", 2, ["0", "3"], "p50 2 ms", True],
        """
        const { chart } = await import("/console/charts.js");
        const ago = (seconds) => new Date(Date.now() - seconds * 1000).toISOString();
        const points = [[90, 0.001], [80, 0.003], [20, null], [10, 0.002]]
          .map(([seconds, p50_s]) => ({ at: ago(seconds), p50_s }));
        const of = { kind: "p50", name: "p50", of: (point) => point.p50_s };
        const headline = () => ({ headline: "p50 2 ms", summary: "in the last hour" });
        const { node, draw } = chart("Latency", [of], (value) => `${value * 1000} ms`, { headline });
        document.body.append(node);
        draw({ range: "1h", interval_s: 10, points });
        const slider = node.querySelector("input"), figure = node.querySelector(".figure");
        const said = [figure.textContent, node.querySelector("path").getAttribute("d").split("M").length - 1];
        said.push([slider.min, slider.max]);
        slider.value = 3;
        slider.dispatchEvent(new Event("input"));
        said.push(figure.textContent, / p50 2 ms$/.test(slider.getAttribute("aria-valuetext")));
        node.remove();
        return said;
        """,
    ),
    "files become tensors": (
        [
            ["FP32", [2], [1.5, -2]],
            "its type >f4 cannot be sent: save numbers or booleans, little-endian",
            [[255, 0, 0, 0, 0, 255], [255, 0, 0, 0, 0, 255]],
            [True, [1, 3, 1, 2], [0.5, 0.5, 0, 0, 0, 0]],
        ],
        """
        const { laidOut, npy, readTensor } = await import("/console/tensors.js");
        const saved = (descr) => {
          const head = `{'descr': '${descr}', 'fortran_order': False, 'shape': (2,), }`.padEnd(118);
          const bytes = new Uint8Array(10 + head.length + 8);
          bytes.set([0x93, ...new TextEncoder().encode("NUMPY"), 1, 0, head.length, 0]);
          bytes.set(new TextEncoder().encode(head), 10);
          bytes.set(new Uint8Array(Float32Array.of(1.5, -2).buffer), 10 + head.length);
          return bytes.buffer;
        };
        const { datatype, shape, data } = npy(saved("<f4"));
        let refused = "";
        try { npy(saved(">f4")); } catch (error) { refused = error.message; }
        const pixels = Uint8ClampedArray.of(255, 0, 0, 255, 0, 0, 255, 255);
        const lay = (first) => [...laidOut(pixels, { channels: 3, first }, "byte", Uint8Array)];
        const canvas = Object.assign(document.createElement("canvas"), { width: 4, height: 2 });
        canvas.getContext("2d").fillStyle = "rgb(128 0 0)";
        canvas.getContext("2d").fillRect(0, 0, 4, 2);
        const blob = await new Promise((done) => canvas.toBlob(done));
        const input = { name: "x", datatype: "FP32", shape: [-1, 3, 1, 2] };
        const image = await readTensor(new File([blob], "cat.png", { type: "image/png" }), input, "unit");
        const values = [...new Float32Array(image.data.buffer)].map((value) => Math.round(value * 100) / 100);
        return [[datatype, shape, [...new Float32Array(data.slice().buffer)]], refused,
          [lay(true), lay(false)],
          [image.said.endsWith("RGB, 0 to 1"), image.shape, values]];
        """,
    ),
    "control characters are replaced, figures have units": (
        ["a\ufffdb\ufffdc\nd", "a b", 4097, "0 B", "999 kB", "1.2 GB", "\u221254 MB", "85 ms", "2 h"],
        """
        const { plain, oneLine, bytes, duration } = await import("/console/format.js");
        return [plain("a\\u202eb\\u0000c\\nd"), oneLine(" a\\n\\tb "), plain("x".repeat(9000)).length,
          bytes(0), bytes(999_499), bytes(1_234_000_000), bytes(-54_000_000),
          duration(0.0851), duration(7200)];
        """,
    ),
    "curl sends a long request as zeros in binary": (
        ["it's", 4000, 4000, True],
        """
        const { snippets } = await import("/console/snippets.js");
        const [{ text }] = snippets("http://h", "m", [{ name: "it's", datatype: "FP32", shape: [-1, 1000] }]);
        const [, head, zeros] = /printf %s '([^']*)'; head -c ([0-9]+) /.exec(text);
        const { name, parameters } = JSON.parse(head).inputs[0];
        return [name, parameters.binary_data_size, Number(zeros), text.includes(`Length: ${head.length}"`)];
        """,
    ),
    "a request is prefilled with zeros": (
        [
            [
                {"name": "a", "datatype": "BOOL", "shape": [2], "data": [False, False]},
                {"name": "b", "datatype": "BYTES", "shape": [1], "data": [""]},
            ],
            [True, 3 * 224 * 224 * 4, 0],
            {"name": "h", "datatype": "FP16", "shape": [1], "parameters": {"binary_data_size": 2}},
            True,
            True,  # more than a JavaScript number holds
        ],
        """
        const { encodeRequest, requestText, zeroTensors } = await import("/console/tensors.js");
        const text = (...inputs) => requestText(zeroTensors(inputs));
        const ask = (...inputs) => JSON.parse(encodeRequest(text(...inputs)).body);
        const askBinary = async (...inputs) => {
          const { body, headers } = encodeRequest(text(...inputs));
          const length = Number(headers["Inference-Header-Content-Length"]);
          const data = new Uint8Array(await body.slice(length).arrayBuffer());
          return [JSON.parse(await body.slice(0, length).text()).inputs[0], data];
        };
        const image = { name: "i", datatype: "FP32", shape: [-1, 3, 224, 224] };
        const flags = { name: "a", datatype: "BOOL", shape: [2] };
        const small = ask(flags, { name: "b", datatype: "BYTES", shape: [-1] });
        let refused = "";
        try { encodeRequest('{"inputs": [{"name": "i", "shape": [1e9], "data": "zeros"}]}'); }
        catch (error) { refused = error.message; }
        const exact = encodeRequest('{"inputs": [{"data": [9007199254740993]}]}').body;
        const [, zeros] = await askBinary(image);
        const large = [text(image).length < 200, zeros.length, Math.max(...zeros.slice(-1000))];
        const [half] = await askBinary({ name: "h", datatype: "FP16", shape: [1] });
        return [small.inputs, large, half, refused.includes("too large"), exact.includes("9007199254740993")];
        """,
    ),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def console(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Console]:
    """The console's files, and nothing else."""
    app = small_app(pages.routes, small_config(tmp_path_factory.mktemp("files") / "data"))
    async with (
        TestServer(app) as server,
        chromium() as browser,
        Console.opened(browser, str(server.make_url("/"))) as console,
    ):
        yield console


@pytest.mark.parametrize("case", CASES)
async def test_module(console: Console, case: str) -> None:
    expected, script = CASES[case]
    console.mistakes.clear()  # of a case that failed
    await console.page.reload()
    async with asyncio.timeout(LIMIT_MS / 1000):
        assert await console.page.evaluate(f"async () => {{ {PRELUDE} {script} }}") == expected
    assert not console.mistakes
