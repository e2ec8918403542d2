"""The console's modules in a browser: a script returns what is compared."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import yaml
from aiohttp.test_utils import TestServer
from playwright.async_api import BrowserContext
from support.browser import LIMIT_MS, Console, needs_browser
from support.http import small_app, small_config

from server.api import pages

pytestmark = [needs_browser, pytest.mark.asyncio(loop_scope="session")]

PRELUDE = """
const state = await import("/console/state.js");
const { api, Refusal } = await import("/console/api.js");
const { run, stop } = await import("/console/live.js");
const { problems } = await import("/console/problems.js");
const { html, render } = await import("/console/ui.js");
const soon = (ms) => new Promise((done) => setTimeout(done, ms));
const confinement = { not_prevented: [] };
const RESOURCES = { models: [], waiting: [], confinement, devices: [], device_problems: [] };
const NOTHING = { models: [], jobs: [], failed_jobs: [], nodes: [], server_started: null,
  resources: RESOURCES, next_cursor: null, as_of: 0 };
const follow = () => {
  location.hash = "#/jobs"; // which asks for nothing itself
  state.session.value = { audits: true, roles: [] };
  run();
};
"""
FUNCTIONS: dict[str, tuple[object, str]] = {
    "a bar that goes on is found where it is drawn, long after it was asked for": (
        ["s2026-01-31T14:00:00Z", None, "s2026-01-31T14:00:00Z"],
        """
        const { itemAt, lanesOf } = await import("/console/lanes.js");
        const time = (minute) => `2026-01-31T14:${minute}:00Z`, at = (minute) => Date.parse(time(minute));
        const lane = (model_id, from, to) => ({
          model_id, segments: [{ from: time(from), to: time(to), state: "loaded" }], marks: [],
        });
        const page = { to: time("10"), server: [], lanes: [lane("a", "00", "10"), lane("b", "00", "05")] };
        const [, goesOn, ended] = lanesOf(page);
        const found = [itemAt(goesOn, at("30"), 0), itemAt(ended, at("30"), 0), itemAt(ended, at("04"), 0)];
        return found.map((item) => item && item.key);
        """,
    ),
    "copies have a lane for each node below their model's": (
        [
            ["m", "m", None],
            ["m:a", "m/2 loaded at a", "A"],
            ["m:b", "m unloaded at b", None],
            ["n", "n/1 loaded", "N"],
        ],
        """
        const { describe, lanesOf } = await import("/console/lanes.js");
        const from = "2026-01-31T14:00:00Z", to = "2026-01-31T14:10:00Z";
        const part = (state, version, load_job_id) => ({ from, to, state, version, load_job_id });
        const lane = (model_id, segments, more) => ({ model_id, segments, marks: [], ...more });
        const copy = (node_id, segment) => ({ node_id, segments: [segment] });
        const copies = [copy("a", part("loaded", 2, "A")), copy("b", part("unloaded", null, null))];
        const lanes = [lane("m", [], { copies }), lane("n", [part("loaded", 1, "N")])];
        const page = { to, server: [], lanes };
        return lanesOf(page).slice(1).map((each) => {
          const [item] = each.items, lines = item ? describe(each, item) : ["m"];
          return [each.id, lines[0], item?.segment.load_job_id ?? null];
        });
        """,
    ),
    "requests without an answer are found": (
        [[], [4000], [4000], [], [10_000]],
        """
        const { findUnanswered } = await import("/console/live.js");
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
    "programs send zeros in binary, keep what JSON has not, and refuse what is too large": (
        [
            ["it's", 4000, 4000, True],
            [True, {"binary_data_output": True}],
            ["# x has 4.0 TB; a server takes 67 MB, or its --max-request-size\n"] * 3,
        ],
        """
        const { snippets } = await import("/console/snippets.js");
        const shown = (input, output) => snippets("http://h", "m", [input], [output]).map(({ text }) => text);
        const input = { name: "it's", datatype: "FP32", shape: [-1, 1000] };
        const [long] = shown(input, input), one = { ...input, shape: [1] };
        const [, head, zeros] = /printf %s '([^']*)'; head -c ([0-9]+) /.exec(long);
        const { name, parameters } = JSON.parse(head).inputs[0];
        const [kept] = shown({ ...one, name: "x" }, { ...one, datatype: "BF16" });
        const large = { ...one, name: "x", shape: [1, 1000000, 1000000] };
        return [
          [name, parameters.binary_data_size, Number(zeros), long.includes(`Length: ${head.length}"`)],
          [kept.includes("--output answer.bin"), JSON.parse(/-d '([^']*)'/.exec(kept)[1]).parameters],
          shown(large, large),
        ];
        """,
    ),
    "sizes have names, and are guesses where the model refused them": (
        [
            "[batch, 3, height, -1]",
            "[-1]",
            "",
            " (sizes are guesses: batch, height, dimension 4 of i; dimension 1 of s): no",
            ": no",
        ],
        """
        const { guessText, shapeText } = await import("/console/tensors.js");
        const shape = [-1, 3, -1, -1], dimensions = ["batch", "", "height", ""];
        const input = (refusal) => ({ name: "i", shape, dimensions, example: { refusal } });
        const bare = { name: "s", shape: [-1] }, refused = { ...bare, example: { refusal: "no" } };
        const said = (...inputs) => guessText(inputs).replace("The answer may be a refusal", "");
        const fixed = { ...input("no"), shape: [1, 3, 8, 8] };
        return [shapeText(input(null)), shapeText(bare), said(input(null), bare),
          said(input("no"), refused), said(fixed)];
        """,
    ),
    "NaN and the infinities are numbers": (
        [
            ["1.5, NaN, -Infinity", "largest: Infinity at 9, 8 at 8, 7 at 7, 6 at 6, 5 at 5"],
            "10 values from 1 to Infinity",
            ['Inf "NaN"', True],
            '{"name": "x", "data": [NaN,-Infinity]}',
            '{"inputs":[{"name":"x","data":[NaN,-Infinity]},',
        ],
        """
        const { encodeRequest, overview, parseTensors, requestText } = await import("/console/tensors.js");
        const many = "[NaN,1,2,3,4,5,6,7,8,Infinity]";
        const outputs = (data, shape) => `{"outputs":[{"name":"y","shape":${shape},"data":${data}}]}`;
        const said = (...answer) => overview(parseTensors(outputs(...answer)).outputs)[0].values;
        const inputs = '[{"name": "x", "data": [NaN, -Inf]}, {"data": "zeros", "shape": []}]';
        const text = `{"name": "Inf \\\\"NaN\\\\"", "inputs": ${inputs}}`;
        const read = parseTensors(text);
        const { body, headers } = encodeRequest(text.replace(/"name": "Inf.*?, /, ""));
        const length = Number(headers["Inference-Header-Content-Length"]);
        const sent = (await body.slice(0, length).text()).split('{"shape"')[0];
        return [[said("[1.5,NaN,-Infinity]", "[3]"), said(many, "[10]")], said(many, "[2,5]"),
          [read.name, Number.isNaN(read.inputs[0].data[0]) && read.inputs[0].data[1] === -Infinity],
          requestText(read.inputs.slice(0, 1)).split("\\n")[1].trim(), sent];
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
        const { encodeRequest, exampleTensors, requestText } = await import("/console/tensors.js");
        const text = (...inputs) => requestText(exampleTensors(inputs));
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
}
CASES: dict[str, tuple[object, str]] = {
    "stream continues anew where its position is another log's": (
        [["6", "7", "9"], "live", 2],
        """
        const asked = [];
        const answers = [
          () => new Response('{"position": 7}\\n'), // and the connection ends
          () => { throw new Refusal(400, { code: "beyond_head" }); },
          () => new Response(new ReadableStream({ start: (body) =>
            body.enqueue(new TextEncoder().encode('{"stream": "live", "position": 9}\\n')) })),
        ];
        api.send = async (path) => answers[asked.push(path.split("=")[1]) - 1]();
        api.get = async () => ({ ...NOTHING, as_of: asked.length ? 9 : 6 });
        follow();
        while (state.connection.value.mode !== "live") await soon(20);
        stop();
        return [asked, state.connection.value.mode, state.epoch.value];
        """,
    ),
    "a long Retry-After waits at most a minute": (
        [1, 6],
        """
        let times = 0;
        api.get = async () => { times += 1; throw new Refusal(429, {}, 1e10); }; // no timer goes as far
        follow();
        await soon(100);
        stop();
        return [times, Math.round((state.connection.value.retryAt - Date.now()) / 10_000)];
        """,
    ),
    "a burst of events is one look, and ten renderings a second at most": (
        [1, 500, 500],
        """
        const line = (position) => JSON.stringify({ position, model_id: "m" }) + "\\n";
        const lines = Array.from({ length: 500 }, (_, at) => line(at + 1)).join("");
        let looks = 0, told = 0, calls = 0;
        api.get = async () => (looks++, NOTHING);
        api.send = async () => new Response(new ReadableStream({ start: (body) =>
          body.enqueue(new TextEncoder().encode(lines)) }));
        state.subscribe((events) => (calls++, told += events.length));
        follow();
        await soon(900);
        stop();
        return [looks - 1, told, calls <= 2 ? state.head.value : calls];
        """,
    ),
    "lost and late nodes, and vain drains, need somebody": (
        [
            ["Node b is late", None],
            ["Node a is lost", "1"],
            ["Node c drains, and its models stay there", None],
        ],
        """
        const none = { epoch: 1, models: [], jobs: [], renewed_at: null, late: false };
        const model = { id: "m", version: 1, state: "loaded" };
        state.nodes.value = [
          { ...none, id: "a", phase: "lost" },
          { ...none, id: "b", phase: "draining", late: true },
          { ...none, id: "c", phase: "draining", models: [model] },
          { ...none, id: "d", phase: "left" },
        ];
        const found = problems.value.map(({ title, occurrence }) => [title, occurrence]);
        state.nodes.value = [...state.nodes.value, { ...none, id: "e", phase: "joined" }];
        return problems.value.length === 2 ? found : problems.value;
        """,
    ),
    "the next stage of a job is looked at": (
        ["starting", "loading"],
        """
        const job = { id: "j", kind: "load", model_id: "m", status: "in_progress", stage: "starting",
          requested_by: "alice", cause: "request", finished_at: null };
        let body;
        api.get = async () => ({ ...NOTHING, jobs: [{ ...job }] });
        api.send = async () => new Response(new ReadableStream({ start: (opened) => { body = opened; } }));
        follow();
        while (!body) await soon(20);
        const before = state.jobs.value[0].stage;
        job.stage = "loading";
        const line = JSON.stringify({ stream: "stage", job_id: "j", stage: "loading" }) + "\\n";
        body.enqueue(new TextEncoder().encode(line));
        // The page asks again by itself, too, but later.
        for (let times = 0; times < 500 && state.jobs.value[0].stage === before; times++) await soon(20);
        stop();
        return [before, state.jobs.value[0].stage];
        """,
    ),
    "ages follow the server's clock": (
        [["2", 0], ["2", 0], ["1", 0]],
        """
        const { ago, learnClock, serverNow } = await import("/console/format.js");
        const hence = (seconds) => new Date(Date.now() + seconds * 1000);
        const job = { id: "j", kind: "unload", model_id: "m", status: "in_progress", finished_at: null };
        const ages = [];
        for (const seconds of [-3600, 3600, 1]) {
          learnClock(hence(seconds).toUTCString());
          state.now.value = serverNow();
          state.jobs.value = [{ ...job, started_at: hence(seconds - 2).toISOString() }];
          ages.push([ago(hence(seconds - 20.8).toISOString()).slice(0, 1), problems.value.length]);
        }
        learnClock(null);
        return ages;
        """,
    ),
    "the copies of a model are on its page and in the list": (
        [
            "Copies2 of 3 copies ready: waits for room",
            ["a", "b"],
            ["2", "1"],
            "2 of 3 copies ready",
            "a, b (version 1)",
            9,
            ["Copies0 of 3 copies ready", "None is loaded."],
        ],
        """
        const { ModelPage } = await import("/console/modelpage.js");
        const { ModelsList } = await import("/console/models.js");
        const { Boundary } = await import("/console/ui.js");
        const copy = (node, version) => ({ node, version, position: 1, job_id: node, workers: 1,
          loaded_at: "2026-01-31T14:00:00Z", memory_bytes: 5e6 });
        const model = { id: "m", state: "loaded", version: 2, versions: [1, 2], node: "a", job_id: "a",
          files: [], error: null, copies: 3, copies_ready: 2, copies_waiting_for: "waits for room",
          copies_at: [copy("a", 2), copy("b", 1)] };
        api.get = () => new Promise(() => {});
        location.hash = "#/models/m";
        state.session.value = { roles: [] };
        state.nodes.value = [{ id: "a", phase: "joined", models: [], jobs: [], attributes: [] }];
        state.models.value = new Map([["m", model]]);
        const use = { model_id: "m", job_id: "b", in_flight: 9, memory_bytes: 1, reserved_bytes: 0 };
        state.resources.value = { ...RESOURCES, models: [use] };
        await soon(50);
        const node = document.body.appendChild(document.createElement("div"));
        render(html`<${Boundary}><${ModelsList} /><${ModelPage} /><//>`, node);
        await soon(50);
        const all = (selector) => [...node.querySelectorAll(selector)];
        const texts = (selector) => all(selector).map((each) => each.textContent.trim());
        const fact = texts(".facts > div").find((text) => text.startsWith("Copies"));
        const cell = node.querySelector("#models-rows [data-label=Node]");
        const found = [fact, texts(".its-copies tbody th"),
          texts(".its-copies [data-label=Version]"), cell.textContent.trim(), cell.title,
          state.useOf(model).serving.in_flight];
        const lost = { ...model, state: "lost", version: null, copies_ready: 0, copies_waiting_for: null,
          copies_at: [] };
        state.models.value = new Map([["m", lost]]);
        await soon(50);
        const none = texts(".its-copies").map((text) => text.slice(-15));
        return [...found, [texts(".facts > div").find((text) => text.startsWith("Copies")), ...none]];
        """,
    ),
    "addresses are read as they were written": (
        [
            ["#/models/a%20b%2F%3F", "models", "a b/?"],
            ["#/at/2026-01-31T14%3A02%3A00Z?last=60", "timeline", "2026-01-31T14:02:00Z"],
            ["#/", "", None],
            ["", "", "models/", "other/1", "at/%E0"],
            ["timeline", {"from": "1", "find": "x y"}],
            ["ledger", {"model": "m"}],
            ["models m", "jobs j", "jobs j", "#/jobs/j?last=all"],
        ],
        """
        const { address, href, parse, replace } = await import("/console/router.js");
        const { effect } = await import("/console/ui.js");
        const time = "2026-01-31T14:02:00Z";
        const written = [href("models", "a b/?"), href("timeline", time, { last: 60, from: null }), href()];
        const told = written.map((text) => [text, parse(text).page, parse(text).id]);
        const none = ["", "#", "#/models/", "#/other/1", "#/at/%E0"]
          .filter((text) => parse(text).page === "");
        const range = parse("#/timeline?from=1&find=x+y"), events = parse("#/ledger?model=m"), seen = [];
        replace(); // an earlier case has left the page elsewhere
        const changed = () => new Promise((done) =>
          addEventListener("hashchange", () => setTimeout(done), { once: true }));
        effect(() => address.value.page && seen.push(`${address.value.page} ${address.value.id}`));
        location.hash = href("models", "m");
        await changed();
        replace("jobs", "j");
        replace("jobs", "j", { last: "all" });
        const shown = location.hash;
        history.back();
        await changed();
        return [...told, none.map((text) => text.slice(2)), [range.page, range.query],
          [events.page, events.query], [...seen.slice(0, 3), shown]];
        """,
    ),
    "focus stays when rows move": (
        ["b", "bd"],
        """
        const { useKeptFocus } = await import("/console/ui.js");
        const list = document.body.appendChild(document.createElement("ul"));
        const List = ({ keys }) => (useKeptFocus(), keys.map((key) =>
          html`<li key=${key}><button>${key}</button></li>`));
        const show = (...keys) => render(html`<${List} keys=${keys} />`, list);
        show("a", "b", "c");
        list.children[1].firstChild.focus();
        show("c", "b", "d", "a");
        show("b", "d");
        return [document.activeElement.textContent, list.textContent];
        """,
    ),
    "a part that fails leaves the others": (
        "This part of the page failed: no. Reload the page.rest",
        """
        const { Boundary } = await import("/console/ui.js");
        const node = document.body.appendChild(document.createElement("div"));
        const Broken = () => { throw new Error("no"); };
        console.error = () => {};
        render(html`<${Boundary}><${Broken} /><//><p>rest</p>`, node);
        await soon(50);
        return node.textContent;
        """,
    ),
    "problems: unanswered, over budget, unclean, grouped by cause": (
        [
            [],
            [["critical", "m does not answer", "2 requests in flight, none answered for 13 s.", "unload"]],
            [["critical", "Memory is over budget", "By 7 B of 100 B: models have grown.", None]],
            [["warning", "The server ended unexpectedly", "The last event was recorded", None]],
            ["critical", "3 models failed: invalid_model", "Asked for by alice, bob. no", "j1,j2,j3", 3],
        ],
        """
        const use = { job_id: "j", model_id: "m", in_flight: 2 };
        const resources = { models: [use], waiting: [], budget_bytes: 100, free_bytes: 50 };
        const failed = (id) => ({ id, state: "failed", error: { code: "invalid_model", message: "no" } });
        const told = (each) => [each.level, each.title, each.why, each.actions[0]?.do];
        const at = (now) => (state.now.value = now, problems.value.map(told));
        state.models.value = new Map([["m", { id: "m", state: "loaded", error: null }]]);
        state.unanswered.value = { since: new Map([["j", 1000]]) };
        state.resources.value = resources;
        const found = [at(10_000), at(14_000)];
        state.resources.value = { ...resources, free_bytes: -7 };
        found.push(at(9000));
        state.resources.value = resources;
        const seen = { unclean: true, last_event_at: "2026-01-01T00:00:00Z", last_seen_at: null };
        state.started.value = { position: 9, recorded_at: "2026-01-01T00:01:00Z", data: seen };
        found.push(at(9000).map(([level, title, why]) => [level, title, why.slice(0, 27), null]));
        state.started.value = null;
        const jobs = [[1, "bob"], [2, "alice"], [3, "bob"]].map(([number, requested_by]) =>
          ({ id: `j${number}`, model_id: `broken${number}`, requested_by, finished_at: null }));
        state.models.value = new Map(jobs.map((job) => [job.model_id, failed(job.model_id)]));
        state.failures.value = new Map(jobs.map((job) => [job.model_id, job]));
        const [{ level, title, why, occurrence, members }] = problems.value;
        return [...found, [level, title, why, occurrence, members.length]];
        """,
    ),
    "problems: models do not fit, from six reloads and a tenth of the time": (
        [
            0,
            0,
            [
                "warning",
                "6 reloads in the last hour after evictions",
                "inferences spent 10 % of their time waiting for loads.",
                "Raise --max-loaded (8), pin the models that must answer fast, or add a node.",
                "1970-01-01 max_loaded",
            ],
            "Raise --memory-budget (100 B) and --max-loaded (8), pin",
            "Raise --memory-budget (100 B) or --max-loaded (8), pin",
        ],
        """
        const shown = (last_hour, share, limits = ["max_loaded"]) => {
          state.resources.value = { ...RESOURCES, budget_bytes: 100, free_bytes: 50, max_loaded: 8,
            reloads: { last_hour, waited_s: 1, share, limits } };
          return problems.value;
        };
        state.now.value = 9000;
        const [few, rare] = [shown(5, 0.9).length, shown(600, 0.09).length];
        const [{ level, why, todo, occurrence }] = shown(6, 0.1);
        const [both, unknown] = [["memory", "max_loaded"], []].map((limits) => shown(6, 0.1, limits)[0].todo);
        return [few, rare, [level, ...why.split(": "), todo, occurrence],
          ...[both, unknown].map((text) => text.split(" the")[0])];
        """,
    ),
    "problems: the server's own words": (
        [
            ["critical", "Not recorded", "The disk is full.", "Free space.", None],
            ["note", "m: not joined", "Op1.", "Nothing.", "Nothing."],
            ["Not recorded"],
        ],
        """
        const { alarmingProblems } = await import("/console/problems.js");
        const notices = [
          { title: "m: not joined", why: "Op1.", todo: "Nothing.", level: "note" },
          { title: "Not recorded", why: "The disk is full.", todo: "Free space." },
        ];
        state.resources.value = { ...RESOURCES, notices };
        const words = ({ level, title, why, todo, occurrence }) => [level, title, why, todo, occurrence];
        return [...problems.value.map(words), alarmingProblems.value.map(({ title }) => title)];
        """,
    ),
    "problems: the parts of the memory are more than there is": (
        [0, ["warning", "The container may run out of memory", "295 MB too much"]],
        """
        const shown = (excess_bytes) => {
          state.resources.value = { ...RESOURCES, memory: { excess_bytes, summary: "295 MB too much" } };
          return problems.value;
        };
        const fits = shown(0).length, [{ level, title, why }] = shown(295);
        return [fits, [level, title, why]];
        """,
    ),
    "problems: approvals that others may give, bypasses, exchanged keys": (
        [
            ["m/2 waits for approval", "n/1 waits for approval"],
            ["n/1", "m/2"],
            [["n/1"], ["m/2"], ["m/2"], []],
            [
                ["r failed", "detail says what is missing"],
                ["r/3 waits for approval", "Approve it."],
                ["r failed", "It has its approvals now: load it again"],
            ],
            [
                ["warning", "m was loaded without approval", "The role emergency let it pass", "j"],
                ["warning", "m serves with a signature that today's rules refuse", "Its signer is s", "j p"],
            ],
        ],
        """
        const unapproved = (version, digest, added_by, position) => [
          { version, digest, added_by, position, is_refused: false }];
        const given = { version: 1, digest: "d", by: "erin" };
        const idle = { state: "unloaded", error: null };
        state.models.value = new Map([
          ["m", { ...idle, id: "m", unapproved: unapproved(2, "d", "alice", 7), approvals: [given] }],
          ["n", { ...idle, id: "n", unapproved: unapproved(1, "d", "bob", 9), approvals: [given] }],
        ]);
        const listed = (subject, approves) => {
          state.session.value = { subject, approves, roles: [] };
          return state.unapproved.value.map(({ model, version }) => `${model.id}/${version}`);
        };
        const newest = listed("carol", true), titles = problems.value.map(({ title }) => title);
        const people = [["alice", true], ["bob", true], ["erin", true], ["dora", false]];
        const told = people.map((who) => listed(...who));
        const refused = { version: 3, digest: null, added_by: null, position: null, is_refused: true };
        const failed = { id: "r", state: "failed", error: { code: "not_approved", message: "no" } };
        const steps = [[false, [refused]], [true, [refused]], [true, []]].map(([approves, waiting]) => {
          state.session.value = { subject: "carol", approves, roles: [] };
          state.models.value = new Map([["r", { ...failed, unapproved: waiting }]]);
          return problems.value.flatMap(({ title, todo }) => [title, todo.split(",")[0]]);
        });
        const signature = { signer: "s", was_verified: true, policy: "p" };
        state.models.value = new Map([["m", { id: "m", state: "loaded", error: null, job_id: "j", signature,
          approval: { result: "bypassed", by: ["dora"] } }]]);
        return [titles, newest, told, steps, problems.value.map(({ level, title, why, occurrence }) =>
          [level, title, why.split(/[,.] ?/)[0], occurrence])];
        """,
    ),
    "a job names the limit that ends it first": (
        [
            "It fails by itself 300 s after its request, waiting included (timeout_s): in 4 min.",
            "Without progress for 120 s it fails by itself (progress_timeout_s), at the latest in 4 min.",
            "Without progress for 120 s it fails by itself (progress_timeout_s), at the latest in 40 s.",
            "It fails by itself 300 s after its request, waiting included (timeout_s): in 4 min.",
            "It fails by itself 100 s after its request, waiting included (timeout_s): in 40 s.",
            "It fails by itself 300 s after its request, waiting included (timeout_s): in 0 s.",
            "It fails by itself 300 s after its request, waiting included (timeout_s): in 4 min.",
            "Its requests have 30 s (--drain-timeout-s), and end with its worker in 20 s.",
            "Its worker is killed if it does not exit within seconds.",
        ],
        """
        const { limitText } = await import("/console/problems.js");
        const time = (seconds) => new Date(Date.UTC(2026) + seconds * 1000).toISOString();
        const load = (started, limits) => ({ kind: "load", created_at: time(0),
          started_at: started && time(started), parameters: { timeout_s: 300, ...limits } });
        const told = (job, at) => limitText(job, Date.UTC(2026) + at * 1000);
        state.resources.value = { ...RESOURCES, drain_timeout_s: 30 };
        const unload = { kind: "unload", stage: "draining", started_at: time(50), parameters: {} };
        const limit = { progress_timeout_s: 120 };
        return [
          told(load(null, limit), 60), // it waits: progress does not count yet
          told(load(1, limit), 60), // it may hang since its start
          told(load(1, limit), 260), // it has made progress since
          told(load(190, limit), 60), // not even from its start on would progress end it sooner
          told(load(1, { timeout_s: 100, ...limit }), 60),
          told(load(290, limit), 301), // it is late
          told(load(1, { progress_timeout_s: null }), 60), // of an earlier release
          told(unload, 60), told({ ...unload, stage: "stopping" }, 60),
        ];
        """,
    ),
    "a model waits, loads, or has failed, in the list, its page and the filter": (
        [
            ["f failed", "l lost", "w waiting", "x waiting"],
            ["g loading", "s loaded", "t loaded", "u unloaded"],
            [
                "bad_file: no such operator",
                "waits since 00:00:00 (60 s) for room",
                "since 00:00:00 (60 s) for room",
                "since 00:00:00 (60 s) for its turn",
                "warming up, for 30 s",
                "next version waits since 00:00:00 (60 s) for room on which another job is loading",
                "next version is under way, for 30 s",
                "",
            ],
            ["w", "x"],
            ["u"],
            "waiting since 00:00:00 (60 s) for room",
            ["Cancel", "Load…"],
        ],
        """
        const { ModelPage } = await import("/console/modelpage.js");
        const { ModelsList } = await import("/console/models.js");
        const { clock } = await import("/console/format.js");
        const began = Date.now(), time = (seconds) => new Date(began - 60_000 + seconds * 1000).toISOString();
        const load = { id: "j", kind: "load", model_id: "m", created_at: time(0), finished_at: null };
        const pending = (waiting_for) => ({ ...load, status: "pending", waiting_for, started_at: null });
        const begun = (stage) => ({ ...load, status: "in_progress", stage, started_at: time(30) });
        const other = "room on which job 01890000-0000-7000-8000-00000000000a is loading";
        const error = { code: "bad_file", message: "no such operator\\nat line 7" };
        const models = [["u", "unloaded"], ["w", "unloaded", pending("room")],
          ["x", "failed", pending(null), error], ["g", "loading", begun("warming_up")],
          ["s", "loaded", pending(other)], ["t", "loaded", begun(null)],
          ["l", "lost", pending("room")], ["f", "failed", undefined, error]];
        api.get = () => new Promise(() => {});
        state.session.value = { roles: [], manages: true };
        state.resources.value = RESOURCES;
        state.now.value = Date.now();
        state.models.value = new Map(models.map(([id, of, open_load, error = null]) => [id,
          { id, state: of, open_load, error, versions: [1], version: null, files: [] }]));
        location.hash = "#/models/w";
        const node = document.body.appendChild(document.createElement("div"));
        await soon(50);
        render(html`<${ModelsList} /><${ModelPage} />`, node);
        await soon(50);
        const select = node.querySelector("#models-state");
        const all = (selector) => [...node.querySelectorAll(selector)];
        const texts = (selector) => all(selector).map((each) => each.textContent.trim());
        const rows = () => texts("#models-rows .name");
        const plain = (text) => text.replaceAll(clock(time(0)), "00:00:00") // a second or two may have passed
          .replace(/\\((59|6\\d) s\\)/, "(60 s)").replace(/for (29|3\\d) s/, "for 30 s");
        const pills = texts("#models-rows .pill"), listed = rows().map((id, at) => `${id} ${pills[at]}`);
        const details = texts("#models-rows [data-label=State]").map((cell, at) =>
          plain(cell).slice(pills[at].length).trim());
        const found = [listed.slice(0, 4), listed.slice(4), details];
        for (const value of ["waiting", "unloaded"]) {
          select.value = value;
          select.dispatchEvent(new Event("change"));
          await soon(50);
          found.push(rows());
        }
        const buttons = all(".model-head .do button");
        return [...found, plain(texts(".titles")[0].slice(1).replace(/ +/g, " ")),
          buttons.map((each) => each.firstChild.data.trim())];
        """,
    ),
    "charts that show nothing come last": (
        [
            [["Latency", "Requests", "Memory"], False],
            [["Memory", "Latency", "Requests"], False],
            [["Requests", "Latency", "Memory"], False],
            [["Latency", "Requests", "Memory"], True],
        ],
        """
        const { ModelPage } = await import("/console/modelpage.js");
        const none = { at: new Date().toISOString(), requests: 0, failures: 0, p50_s: null, p95_s: null,
          p99_s: null, memory_bytes: null };
        const whole = { requests: 0, failures: 0, p50_s: null };
        const asked = { requests: 3, p50_s: 1, p95_s: 1, p99_s: 1 };
        state.session.value = { roles: [] };
        state.resources.value = RESOURCES;
        const model = { id: "m", state: "unloaded", version: null, versions: [1], files: [], error: null };
        state.models.value = new Map([["m", model]]);
        location.hash = "#/models/m";
        await soon(50);
        const found = [];
        for (const more of [{ ...asked, memory_bytes: 5 }, { memory_bytes: 5 }, { requests: 3 }, {}]) {
          const series = { range: "1h", interval_s: 10, points: [{ ...none, ...more }], whole };
          api.get = async (path) => (path.includes("/samples") ? series : new Promise(() => {}));
          const node = document.body.appendChild(document.createElement("div"));
          render(html`<${ModelPage} />`, node);
          await soon(100);
          const titles = [...node.querySelectorAll(".chart figcaption")].map((each) => each.textContent);
          found.push([titles, node.lastElementChild.classList.contains("traffic")]);
          render(null, node);
        }
        return found;
        """,
    ),
    "a server that is not ready, or not there, is said first": (
        [
            ["Live", [], "Nothing: 0 models loaded"],
            ["Not ready", ["The ledger cannot be written: full", "Fork server is down"], None],
            ["Not connected", [], None],
            ["Not connected", ["No connection to the server: all this is as of TIME"], None],
        ],
        """
        const { OverviewPage } = await import("/console/overview.js");
        api.get = () => new Promise(() => {});
        const error = { code: "c", message: "m" };
        const failed = { id: "a", state: "failed", versions: [], files: [], error };
        const full = "the ledger cannot be written: full";
        const not_ready = [{ check: "log", cause: full, cure: "free some space" },
          { check: "fork_server", cause: "fork server is down", cure: "wait." }];
        state.session.value = { roles: [], audits: true, manages: true };
        const place = document.body.appendChild(document.createElement("div")), found = [];
        for (let id = setInterval(() => {}, 1000); id; id--) clearInterval(id); // the clock stands still
        const look = async (resources, mode, ms, models) => {
          state.resources.value = { ...RESOURCES, ...resources };
          state.models.value = new Map(models.map((model) => [model.id, model]));
          state.connect(mode, mode === "lost" ? "no answer." : "");
          state.now.value = state.connection.value.since + ms;
          await soon(50);
          render(html`<${OverviewPage} />`, place);
          await soon(50);
          const entries = problems.value.filter((each) => each.key.startsWith("not ready"));
          const first = problems.value.slice(0, entries.length);
          const titles = first.every((each) => entries.includes(each) && each.level === "critical")
            ? entries.map(({ title }) => title.replace(/[\\d:]+$/, "TIME")) : "not first";
          return [document.querySelector("#connection").textContent, titles,
            place.querySelector(".well")?.textContent.slice(0, 24) ?? null];
        };
        const none = { ...failed, id: "n", state: "unloaded", error: null };
        found.push(await look({}, "live", 0, [none]));
        found.push(await look({ not_ready }, "live", 0, [failed]));
        found.push(await look({ not_ready }, "lost", 1000, [failed])); // it may only restart
        found.push(await look({}, "lost", 2000, [failed]));
        return found;
        """,
    ),
    "a node's address is a link only if a browser can open it, and admins alone drain": (
        [["http://a:8080/", None, None], ["http://a:8080", "javascript:alert(1)", "http://"], [0, 3]],
        """
        const { NodesPage } = await import("/console/nodes.js");
        const addresses = ["http://a:8080", "javascript:alert(1)", "http://"];
        const none = { phase: "joined", epoch: 1, models: [], jobs: [], attributes: [], release: "1" };
        state.nodes.value = addresses.map((address, id) => ({ ...none, id: String(id), address }));
        const place = document.createElement("div");
        const buttons = [false, true].map((manages) => {
          state.session.value = { manages, roles: [] };
          render(html`<${NodesPage} key=${manages} />`, place);
          return place.querySelectorAll("button").length;
        });
        const cells = [...place.querySelectorAll("[data-label=Address]")];
        return [cells.map((cell) => cell.querySelector("a")?.href ?? null),
          cells.map((cell) => cell.firstChild.firstChild.data), buttons];
        """,
    ),
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def console(
    browser: BrowserContext, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Console]:
    """The console's files, and nothing else."""
    app = small_app(pages.routes, small_config(tmp_path_factory.mktemp("files") / "data"))
    async with (
        TestServer(app) as server,
        Console.opened(browser, str(server.make_url("/"))) as console,
    ):
        yield console


async def returned(console: Console, script: str) -> object:
    """Return what a script returns in the page."""
    console.mistakes.clear()  # of a case that failed
    async with asyncio.timeout(LIMIT_MS / 1000):
        found: object = await console.page.evaluate(f"async () => {{ {script} }}")
    assert not console.mistakes
    return found


@pytest.mark.parametrize("case", FUNCTIONS)
async def test_function(console: Console, case: str) -> None:
    expected, script = FUNCTIONS[case]
    assert await returned(console, script) == expected


@pytest.mark.parametrize("case", CASES)
async def test_module(console: Console, case: str) -> None:
    expected, script = CASES[case]
    await console.page.reload()  # the state is that of a new page
    assert await returned(console, PRELUDE + script) == expected


# All values of the API's enumerations that the pages show.

OPENAPI = Path(__file__).parents[3] / "openapi.yaml"
DISPLAYED = (
    *("JobInfo", "LoadApprovalInfo", "LoadUsage", "Mark", "ModelInfo", "NodeInfo", "NodeJob", "NodeModel"),
    *("NodePresence", "NodeSegment", "Segment", "ServerPresence", "ServerSegment"),
)
"""Structs of openapi.yaml whose enumerations pages show."""
EVERYTHING = """
const { OverviewPage } = await import("/console/overview.js");
const { JobItem } = await import("/console/jobs.js");
const { ModelPage } = await import("/console/modelpage.js");
const { NodesPage } = await import("/console/nodes.js");
const { AsOf } = await import("/console/timetravel.js");
const { EventList } = await import("/console/ledger.js");
const { Detail, LaneTable, lanesOf } = await import("/console/lanes.js");
const at = "2026-01-31T14:00:00Z", to = "2026-01-31T14:10:00Z";
let number = 0;
const uuid = () => `01890000-0000-7000-8000-${String(number++).padStart(12, "0")}`;
const each = (schema, base) => Object.entries(ENUMS[schema]).flatMap(([name, values]) =>
  values.map((value) => ({ ...base(), [name]: value })));
const its = (more) => ({ model_id: "heavy-5", version: 1, job_id: uuid(), ...more });

const waiting = () => ({ ...its(), id: uuid(), kind: "load", status: "in_progress", stage: "loading",
  created_at: at, started_at: at, finished_at: null, requested_by: "alice", cause: "request", error: null,
  parameters: { timeout_s: 300 }, waiting_for: `room on which job ${uuid()} is loading` });
const running = () => ({ ...waiting(), waiting_for: null });
const superseded = { ...running(), status: "cancelled", finished_at: to, superseded_by: uuid() };
const jobs = [...each("JobInfo", waiting), ...each("JobInfo", running),
  ...each("JobInfo", () => ({ ...running(), kind: "unload" })), superseded];

const copy = { ...its(), node: "b", workers: 1, memory_bytes: 1, loaded_at: at };
const model = () => ({ ...its(), id: "heavy-5", state: "loaded", next_version: 2, versions: [1, 2, 3],
  files: [], error: { code: "invalid", message: "no" }, loaded_at: at, loaded_by: "alice", node: "a",
  copies: 2, copies_ready: 1, copies_at: [copy],
  unapproved: [{ version: 3, digest: "d", added_by: "bob", position: 1 }] });
const approvals = each("LoadApprovalInfo", () => ({ by: ["bob"] }));
const models = [...each("ModelInfo", model), ...jobs.map((open_load) => ({ ...model(), open_load })),
  ...approvals.map((approval) => ({ ...model(), approval }))];
models.forEach((of, index) => index && (of.id = `heavy-5-${index}`));
const node = () => ({ id: "a", phase: "joined", attributes: [], address: "a", budget_bytes: 9, free_bytes: 4,
  models: each("NodeModel", () => ({ id: "heavy-5", version: 1, state: "loaded" })),
  jobs: each("NodeJob", () => ({ ...its(), id: uuid(), kind: "load" })) });
const use = () => its({ phase: "serving", memory_bytes: 9, reserved_bytes: 9, in_flight: 1 });

const segment = () => ({ from: at, to, state: "loaded", version: 1, load_job_id: uuid(), by: "alice",
  cause: "request" });
const causes = ENUMS.JobInfo.cause.map((cause) => ({ ...segment(), cause }));
const next = { ...segment(), next_version: 2 };
const lane = { model_id: "heavy-5",
  segments: [...each("Segment", segment), ...causes, next, { ...next, waiting: true }],
  marks: each("Mark", () => ({ ...its(), kind: "failed", at, position: 1, by: "alice" })) };
const timeline = { to, lanes: [lane], server: each("ServerSegment", segment) };
const nodeLane = { node_id: "a", segments: each("NodeSegment", segment) };
const lanes = [...lanesOf(timeline), ...lanesOf({ ...timeline, nodes: [nodeLane] })];
const facts = { JobCancelled: { superseded_by: uuid() }, ModelLoaded: { files: [], durations: {},
  approval: { result: "not_needed" } } };
const events = Object.entries(facts).map(([type, data], position) =>
  ({ ...its(), position, type, data, actor: "alice", recorded_at: at }));
const servers = each("ServerPresence", () => ({ since: at }));
const pages = servers.map((server) => ({ as_of: 1, as_of_time: at, server,
  models: each("ModelInfo", model), nodes: each("NodePresence", () => ({ id: "a" })) }));

api.get = () => new Promise(() => {});
location.hash = "#/models/heavy-5";
state.session.value = { roles: [], manages: true, approves: true, audits: true, infers: true, subject: "c" };
state.jobs.value = jobs;
state.models.value = new Map(models.map((of) => [of.id, of]));
state.nodes.value = each("NodeInfo", node);
state.nodes.value.forEach((of, index) => (of.id = `node ${index}`));
state.resources.value = { ...RESOURCES, budget_bytes: 100, free_bytes: 5, used_bytes: 9, drain_timeout_s: 30,
  models: each("LoadUsage", use) };
await soon(50);
const place = document.body.appendChild(document.createElement("main"));
const items = lanes.flatMap((of) => of.items.map((item) => ({ lane: of, item })));
render(html`<${OverviewPage} /><${ModelPage} /><${NodesPage} /><${EventList} events=${events} />
  ${problems.value.map(({ title, why, todo }) => html`<p>${title}</p><p>${why}</p><p>${todo}</p>`)}
  <${LaneTable} lanes=${lanes} />${items.map((selected) => html`<${Detail} selected=${selected} />`)}
  ${jobs.map((of) => html`<${JobItem} key=${of.id} job=${of} />`)}
  ${pages.map((page) => html`<${AsOf} id="1" past=${{ answer: { page, event: events[0] } }} />`)}`, place);
await soon(200);
for (const part of place.querySelectorAll("code, pre")) part.remove();
const walker = document.createTreeWalker(place, NodeFilter.SHOW_TEXT), texts = [];
while (walker.nextNode()) texts.push(walker.currentNode.data);
return texts;
"""
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
OTHER_NAMES = re.compile(r"heavy-5[-0-9]*,? (version )?v?\d|[Vv]ersion \d+ of|\bv\d")
"""A model and its version, written otherwise than NAME/VERSION."""


def read_enumerations() -> dict[str, dict[str, list[str]]]:
    """Return the values of each member of each struct that pages show."""
    schemas = yaml.safe_load(OPENAPI.read_text())["components"]["schemas"]
    return {
        name: {
            member: [value for value in of["enum"] if value is not None]
            for member, of in schemas[name]["properties"].items()
            if "enum" in of
        }
        for name in DISPLAYED
    }


async def test_pages_show_words_and_names_instead_of_values_and_ids(console: Console) -> None:
    enumerations = read_enumerations()
    values = {value for of in enumerations.values() for each in of.values() for value in each}
    await console.page.reload()
    texts = await returned(console, f"const ENUMS = {json.dumps(enumerations)};{PRELUDE}{EVERYTHING}")
    assert isinstance(texts, list)
    raw = {value for value in values if "_" in value}
    assert {"warming_up", "in_progress"} <= raw
    assert [text for text in texts if any(value in text for value in raw)] == []
    assert {value.replace("_", " ") for value in raw} <= set(map(str.strip, texts))
    assert [text for text in texts if UUID.search(text)] == []
    assert "heavy-5/1" in " ".join(texts)
    assert [text for text in texts if OTHER_NAMES.search(text)] == []
