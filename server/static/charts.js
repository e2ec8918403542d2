// Charts of the server's time series: latencies, requests and memory, of the server or of the model whose page is open.
// Lines over time, drawn as SVG, with the values at the pointer or at the keyboard's cursor.

import { Latest, Unreachable } from "./api.js";
import { h, setAttribute, setText, svg } from "./dom.js";
import { bytes, clock, duration, local, serverNow, zone } from "./format.js";

const SAMPLE_MS = 10_000; // as often as the server samples
const RANGES = {
  "1h": { label: "1 h", text: "the last hour", ms: 3_600_000 },
  "24h": { label: "24 h", text: "the last 24 hours", ms: 86_400_000 },
};

const WIDE = 600, HIGH = 120;
const LEAST_MS = 120_000; // from edge to edge, where the server has not been up for long
const GAP = 2.5; // intervals without a sample: the line breaks

// Returns an element and a function that draws. `lines` are {kind, name, of}: the value of a point, or null.
export function chart(title, lines, write, { headline }) {
  const figure = h("p", { class: "figure" }), summary = h("p", { class: "summary" });
  const drawing = svg("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const paths = lines.map(({ kind }) => svg("path", { class: `line ${kind}`, "vector-effect": "non-scaling-stroke" }));
  const cursor = svg("line", { class: "reading", y1: 0, y2: HIGH, "vector-effect": "non-scaling-stroke" });
  drawing.append(...[0.5, HIGH / 2].map((y) => svg("line", { class: "grid", x1: 0, x2: WIDE, y1: y, y2: y, "vector-effect": "non-scaling-stroke" })), ...paths, cursor);
  const most = h("span", { class: "most" }), half = h("span", { class: "half" });
  const slider = h("input", { type: "range", class: "reader", "aria-label": `${title}: values over time`, min: 0, max: 0, value: 0 });
  const times = ["from", "middle", "to"].map((name) => h("span", { class: name }));
  const legend = h("ul", { class: "legend lines" }, ...lines.map(({ kind, name }) => h("li", {}, svgSwatch(kind), name)));
  const plot = h("div", { class: "plot" }, drawing, most, half, slider);
  const node = h("figure", { class: "chart" }, h("figcaption", {}, title), figure, summary, plot, h("div", { class: "times", "aria-hidden": "true" }, ...times), legend);

  let shown = null, at = null; // what is drawn, and which point is read
  const read = (index) => {
    at = index;
    const point = shown?.points[index];
    setAttribute(cursor, "class", point ? "reading" : "reading away");
    if (!shown) return;
    if (point) for (const name of ["x1", "x2"]) setAttribute(cursor, name, shown.x(point).toFixed(1));
    const values = point ? lines.map((line) => [line.of(point), line]).filter(([value]) => value != null) : [];
    const texts = values.map(([value, line]) => `${line.name} ${write(value)}`);
    const text = point ? `${clock(point.at)}: ${texts.join(", ") || "none"}` : shown.summary;
    setText(figure, point ? texts.join(" · ") || "none" : shown.headline);
    setText(summary, point ? `at ${clock(point.at)}` : shown.summary);
    setAttribute(slider, "aria-valuetext", point ? text : `${shown.headline}, ${shown.summary}`);
  };
  slider.addEventListener("pointermove", (event) => read(nearest(shown, event.offsetX / slider.clientWidth)));
  slider.addEventListener("pointerleave", () => read(null));
  slider.addEventListener("blur", () => read(null));
  slider.addEventListener("input", () => read(Number(slider.value)));

  const draw = (series) => {
    const now = serverNow(), points = series?.points ?? [];
    const first = points.length ? Date.parse(points[0].at) : now;
    const span = Math.min(RANGES[series?.range ?? "1h"].ms, Math.max(LEAST_MS, (now - first) * 1.02));
    const x = (point) => WIDE * (1 - (now - Date.parse(point.at)) / span);
    const inside = points.filter((point) => x(point) >= 0);
    const highest = niceCeiling(Math.max(0, ...inside.flatMap((point) => lines.map((line) => line.of(point) ?? 0))));
    const y = (value) => HIGH - 1.5 - (highest > 0 ? (value / highest) * (HIGH - 3) : 0);
    lines.forEach((line, number) => setAttribute(paths[number], "d", path(inside, line.of, x, y, (series?.interval_s ?? 10) * 1000 * GAP)));
    shown = series ? { points: inside, x, ...headline(series) } : { points: [], x, headline: "…", summary: "" };
    setAttribute(slider, "max", Math.max(0, inside.length - 1));
    if (document.activeElement !== slider) slider.value = Math.max(0, inside.length - 1);
    setText(most, highest > 0 ? write(highest) : "");
    setText(half, highest > 0 ? write(highest / 2) : "");
    [now - span, now - span / 2, now].forEach((time, number) => setText(times[number], `${axisTime(new Date(time))}${number === 2 ? ` ${zone(new Date(time))}` : ""}`));
    node.classList.toggle("empty", inside.length === 0);
    read(at !== null && at < inside.length ? at : null);
  };
  return { node, draw };
}

// To the minute, with the day unless that is today.
function axisTime(time) {
  const text = local(time).replace("T", " ");
  return time.toDateString() === new Date().toDateString() ? text.slice(11, 16) : text.slice(5, 16);
}

function svgSwatch(kind) {
  return svg("svg", { class: "stroke", viewBox: "0 0 24 6", "aria-hidden": "true" }, svg("path", { class: `line ${kind}`, d: "M1 3H23" }));
}

function nearest(shown, share) {
  if (!shown?.points.length) return null;
  const wanted = share * WIDE;
  let best = 0;
  shown.points.forEach((point, index) => {
    if (Math.abs(shown.x(point) - wanted) < Math.abs(shown.x(shown.points[best]) - wanted)) best = index;
  });
  return best;
}

// A line breaks where nothing is known: a gap is not a zero. What stands alone is a dot.
function path(points, of, x, y, gapMs) {
  let drawn = "", pen = "M", before = null;
  for (const point of points) {
    const value = of(point), time = Date.parse(point.at);
    if (value == null) {
      pen = "M";
      continue;
    }
    if (before !== null && time - before > gapMs) pen = "M";
    drawn += `${pen}${x(point).toFixed(1)} ${y(value).toFixed(1)}${pen === "M" ? "h1" : ""}`;
    [pen, before] = ["L", time];
  }
  return drawn;
}

// The next number above that is read at a glance, and whose half is, too.
function niceCeiling(value) {
  if (value <= 0) return 0;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 3, 4, 5, 6, 8, 10].find((step) => value <= step * power * 1.0001) * power;
}

const milliseconds = (value) => (value == null ? "–" : value < 0.01 ? `${Number((value * 1000).toPrecision(2))} ms` : duration(value));
const perSecond = (value) => `${value == null ? "–" : Number(value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0)).toLocaleString("en")}/s`;

// `memory` are the lines of the memory chart: of the server and of a model they are others. `now` tells what the first
// of them is at the moment, which is newer than the last sample.
export function trafficCharts(memory, now) {
  let interval = 10, failed = false;
  const latency = chart("Latency", [
    { kind: "p50", name: "p50", of: (point) => point.p50_s },
    { kind: "p95", name: "p95", of: (point) => point.p95_s },
    { kind: "p99", name: "p99", of: (point) => point.p99_s },
  ], milliseconds, { headline: latencyHeadline });
  const requests = chart("Requests", [
    { kind: "plain", name: "answered", of: (point) => point.requests / interval },
    { kind: "bad", name: "failed", of: (point) => (failed ? point.failures / interval : null) },
  ], perSecond, { headline: requestsHeadline });
  const used = chart("Memory", memory, bytes, { headline: (series) => memoryHeadline(series, memory[0], now()) });
  const charts = [latency, requests, used];
  return {
    nodes: charts.map((each) => each.node),
    draw: (series) => {
      interval = series?.interval_s ?? interval;
      failed = series?.whole.failures > 0; // a line of zeros says less than none
      for (const each of charts) each.draw(series);
    },
  };
}

const when = (series) => `in ${RANGES[series.range].text}`;

function latencyHeadline(series) {
  const { requests, p50_s: p50, p95_s: p95, p99_s: p99 } = series.whole;
  if (!requests) return { headline: "–", summary: `no request ${when(series)}` };
  return { headline: `p50 ${milliseconds(p50)} · p95 ${milliseconds(p95)} · p99 ${milliseconds(p99)}`, summary: `${when(series)}, estimated from a histogram` };
}

function requestsHeadline(series) {
  const { requests, failures } = series.whole, last = series.points.at(-1);
  const rate = last ? last.requests / series.interval_s : 0;
  const failed = failures ? `, ${failures.toLocaleString("en")} failed` : "";
  return { headline: perSecond(rate), summary: `${requests.toLocaleString("en")} answered${failed} ${when(series)}` };
}

function memoryHeadline(series, line, now) {
  if (now == null) return { headline: "–", summary: "no process now" };
  const most = Math.max(now, ...series.points.map((point) => line.of(point) ?? 0));
  return { headline: bytes(now), summary: `now, at most ${bytes(most)}` };
}

// Buttons for the range of the charts, which are those of the server or of a model.
export function rangeSwitch(series, of) {
  const draw = () => Object.keys(RANGES).forEach((range, number) => setAttribute(buttons[number], "aria-pressed", String(range === series.range)));
  const buttons = Object.entries(RANGES).map(([range, { label, text }]) =>
    h("button", { type: "button", "aria-label": `Show ${text}`, onclick: () => (series.choose({ range }), draw()) }, label));
  const node = h("div", { class: "segmented", role: "group", "aria-label": of === "server" ? "Range of the charts" : "Range of the model's charts" }, ...buttons);
  return { node, draw };
}

// Fetches the series, which the server keeps: they are there after a reload, too.
export class TimeSeries {
  #latest = new Latest();
  #due = null;

  constructor(api, store) {
    this.api = api;
    this.store = store;
    this.range = "1h";
    this.modelId = null;
    this.server = null;
    this.model = null; // of `modelId`
    document.addEventListener("visibilitychange", () => document.hidden || this.fetch());
    this.fetch();
  }

  // Shows another range, or the series of a model; null is none.
  choose({ range = this.range, modelId = this.modelId }) {
    if (range === this.range && modelId === this.modelId) return;
    this.model = null;
    if (range !== this.range) this.server = null;
    [this.range, this.modelId] = [range, modelId];
    this.fetch();
  }

  // Asks now, and then again and again.
  fetch() {
    clearTimeout(this.#due);
    this.#due = setTimeout(() => this.fetch(), SAMPLE_MS);
    if (document.hidden) return;
    const { range, modelId } = this;
    const path = modelId === null ? "/api/v1/resources/history" : `/api/v1/models/${encodeURIComponent(modelId)}/history`;
    this.#latest.request((signal) => this.api.get(`${path}?range=${range}`, { signal }), (found) => {
      this[modelId === null ? "server" : "model"] = found;
      this.store.notify();
    }, (error) => {
      if (!(error instanceof Unreachable) && error.status === undefined) throw error;
      // The page says itself when the server is away; the charts keep what they have.
    });
  }
}
