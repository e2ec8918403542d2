// Charts of what the server has sampled: latencies, requests and memory, of the server or of a model. uPlot draws the
// lines; a slider over each chart reads its values by keyboard and says them.

import { api } from "./api.js";
import { bytes, clock, duration, serverNow, zone } from "./format.js";
import { HOUR, tickLabel } from "./lanes.js";
import { resources, useOf } from "./state.js";
import { html, signal, useEffect, useLayoutEffect, useMemo, useRef, useRequest, useState } from "./ui.js";
import uPlot from "./vendor/uplot.js";

const SAMPLE_MS = 10_000; // as often as the server samples
const RANGES = {
  "1h": { label: "1 h", text: "the last hour", ms: HOUR },
  "24h": { label: "24 h", text: "the last 24 hours", ms: 24 * HOUR },
};
const LEAST_MS = 120_000; // from edge to edge, where the server has not been up for long
const GAP = 2.5; // intervals without a sample: the line breaks
const HIGH = 132; // of a chart, with its axis, in pixels
const EDGE = 18; // pixels before the right edge where a time would be cut off

const range = signal("1h"); // of all charts

// The charts of the server, or of a model, with the buttons for their range.
export function Charts({ modelId = null, onQuiet = () => {} }) {
  const path = modelId === null ? "/api/v1/resources/samples" : `/api/v1/models/${encodeURIComponent(modelId)}/samples`;
  const { answer: series, again } = useRequest((signal) => api.get(`${path}?range=${range.value}`, { signal }), [path, range.value]);
  useEffect(() => {
    const refresh = () => document.hidden || again();
    const timer = setInterval(refresh, SAMPLE_MS);
    document.addEventListener("visibilitychange", refresh);
    return () => {
      clearInterval(timer);
      document.removeEventListener("visibilitychange", refresh);
    };
  }, []);
  const memory = modelId === null ? SERVER_MEMORY : MODEL_MEMORY, now = memoryNow(modelId);
  const kinds = [
    { title: "Latency", lines: LATENCY, write: milliseconds, said: latencyText },
    { title: "Requests", lines: REQUESTS, write: perSecond, said: requestsText },
    { title: "Memory", lines: memory, write: bytes, said: (of) => memoryText(of, memory[0], now) },
  ].map((kind) => ({ ...kind, isEmpty: Boolean(series) && isEmpty(columnsOf(series, kind.lines)) }));
  const isQuiet = kinds.every((kind) => kind.isEmpty);
  useLayoutEffect(() => onQuiet(isQuiet), [isQuiet]);
  return html`
    <div class="ranges">
      <div class="segmented" role="group" aria-label="Range of the charts">
        ${Object.entries(RANGES).map(([name, { label, text }]) => html`
          <button type="button" aria-label="Show ${text}" aria-pressed=${String(name === range.value)}
            onClick=${() => (range.value = name)}>${label}</button>`)}
      </div>
      <span class="hint">times in ${zone()}</span>
    </div>
    <div class="charts" key=${path}>
      ${kinds.toSorted((a, b) => a.isEmpty - b.isEmpty).map(({ said, ...kind }) => html`
        <${Chart} key=${kind.title} ...${kind} series=${series} said=${series && said(series)} />`)}
    </div>`;
}

// Lines: the colour is a variable of the style sheet, and `of` the value of a point, or null.
const LATENCY = [
  { name: "p50", colour: "--accent", width: 2.5, of: (point) => point.p50_s },
  { name: "p95", colour: "--c1", width: 1.6, of: (point) => point.p95_s },
  { name: "p99", colour: "--c3", width: 1.6, dash: [5, 4], of: (point) => point.p99_s },
];
const REQUESTS = [
  { name: "answered", colour: "--accent", width: 2, of: (point, series) => point.requests / series.interval_s },
  { // a line of zeros says less than none
    name: "failed", colour: "--bad", width: 2,
    of: (point, series) => (series.whole.failures ? point.failures / series.interval_s : null),
  },
];
const SERVER_MEMORY = [
  { name: "models", colour: "--accent", width: 2, of: (point) => point.used_bytes },
  { name: "server", colour: "--others", width: 2, dash: [2, 4], of: (point) => point.server_bytes },
];
const MODEL_MEMORY = [{ name: "memory", colour: "--accent", width: 2, of: (point) => point.memory_bytes }];

// A line's look in the legend, as uPlot draws it.
const strokeOf = ({ colour, width, dash }) => ({ stroke: `var(${colour})`, strokeWidth: width, strokeDasharray: dash?.join(" ") });

// What is used at the moment, which is newer than the last sample; null of a model without a process.
function memoryNow(modelId) {
  if (modelId === null) return resources.value?.used_bytes ?? null;
  const use = useOf({ id: modelId });
  return use.processes ? use.memory_bytes : null;
}

// Headlines, and what they are about.

const inRange = (series) => `in ${RANGES[series.range].text}`;

function latencyText(series) {
  const { requests, p50_s: p50, p95_s: p95, p99_s: p99 } = series.whole;
  if (!requests) return { headline: "–", summary: `no request ${inRange(series)}` };
  const headline = `p50 ${milliseconds(p50)} · p95 ${milliseconds(p95)} · p99 ${milliseconds(p99)}`;
  return { headline, summary: `${inRange(series)}, estimated from a histogram` };
}

function requestsText(series) {
  const { requests, failures } = series.whole, last = series.points.at(-1);
  const failed = failures ? `, ${failures.toLocaleString("en")} failed` : "";
  return {
    headline: perSecond(last ? last.requests / series.interval_s : 0),
    summary: `${requests.toLocaleString("en")} answered${failed} ${inRange(series)}`,
  };
}

function memoryText(series, line, now) {
  if (now == null) return { headline: "–", summary: "no process now" };
  const most = Math.max(now, ...series.points.map((point) => line.of(point) ?? 0));
  return { headline: bytes(now), summary: `now, at most ${bytes(most)}` };
}

function milliseconds(value) {
  if (value == null) return "–";
  return value < 0.01 ? `${Number((value * 1000).toPrecision(2))} ms` : duration(value);
}

function perSecond(value) {
  if (value == null) return "–";
  return `${Number(value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0)).toLocaleString("en")}/s`;
}

// A chart. `said` has the headline and the summary of the series; null before there is one.
function Chart({ title, lines, series, write, said }) {
  const [index, setIndex] = useState(null); // of the row that is read
  const columns = useMemo(() => columnsOf(series, lines), [series, lines]), [times] = columns;
  const [place, plot] = usePlot(columns, spanOf(series), lines, write, setIndex);
  const { headline, summary } = said ?? { headline: "…", summary: "" };
  const at = index === null || times[index] === undefined ? null : clock(new Date(times[index] * 1000).toISOString());
  const values = lines.map((line, number) => [line.name, columns[number + 1][index]]).filter(([, value]) => value != null);
  const texts = values.map(([name, value]) => `${name} ${write(value)}`);
  const read = (row) => plot.current.setCursor({ left: plot.current.valToPos(times[row], "x"), top: 0 });
  return html`
    <figure class="chart">
      <figcaption>${title}</figcaption>
      <p class="figure">${at ? texts.join(" · ") || "none" : headline}</p>
      <p class="summary">${at ? `at ${at}` : summary}</p>
      <div class="plot">
        <div ref=${place} aria-hidden="true"></div>
        <input type="range" class="reader" aria-label="${title}: values over time" min="0" max=${Math.max(0, times.length - 1)}
          value=${index ?? Math.max(0, times.length - 1)} aria-valuetext=${at ? `${at}: ${texts.join(", ") || "none"}` : `${headline}, ${summary}`}
          onInput=${(event) => read(Number(event.target.value))} onBlur=${() => plot.current.setCursor({ left: -10, top: -10 })} />
      </div>
      <ul class="legend lines">${lines.map((line) => html`
        <li><svg class="stroke" viewBox="0 0 24 6" aria-hidden="true"><path class="line" style=${strokeOf(line)} d="M1 3H23" /></svg>${line.name}</li>`)}
      </ul>
    </figure>`;
}

// The samples as uPlot has them: a column of times in seconds, and one for each line. A time without samples is a row of
// nulls, where the lines break: a gap is not a zero.
export function columnsOf(series, lines) {
  const rows = [], interval = series?.interval_s ?? 0;
  for (const point of series?.points ?? []) {
    const time = Date.parse(point.at) / 1000, before = rows.at(-1)?.[0];
    if (time - before > GAP * interval) rows.push([before + interval, ...lines.map(() => null)]);
    rows.push([time, ...lines.map((line) => line.of(point, series) ?? null)]);
  }
  return [null, ...lines].map((_, column) => rows.map((row) => row[column]));
}

const isEmpty = ([, ...lines]) => !lines.some((values) => values.some(Boolean));

// From where to where a chart goes, in seconds: to the present, from the first sample of its range.
function spanOf(series) {
  const to = serverNow(), first = series?.points.length ? Date.parse(series.points[0].at) : to;
  const from = Math.max(to - RANGES[series?.range ?? "1h"].ms, Math.min(first, to - LEAST_MS));
  return [from / 1000, to / 1000];
}

// Has uPlot draw columns into the element of the first reference; the second refers to its chart.
function usePlot(columns, span, lines, write, onRead) {
  const place = useRef(null), plot = useRef(null), shown = useRef(null);
  shown.current = { span, isEmpty: isEmpty(columns) };
  useLayoutEffect(() => {
    const chart = (plot.current = new uPlot(optionsOf(shown, lines, write, onRead), columns, place.current));
    const resize = new ResizeObserver(([{ contentRect }]) => chart.setSize({ width: Math.floor(contentRect.width), height: HIGH }));
    const scheme = matchMedia("(prefers-color-scheme: dark)"), redraw = () => chart.redraw(false, true);
    resize.observe(place.current);
    scheme.addEventListener("change", redraw);
    return () => {
      resize.disconnect();
      scheme.removeEventListener("change", redraw);
      chart.destroy();
    };
  }, []);
  useLayoutEffect(() => plot.current.setData(columns), [columns]);
  return [place, plot];
}

function optionsOf(shown, lines, write, onRead) {
  const font = "11px system-ui, sans-serif", axis = { stroke: () => colour("--dim"), font, ticks: { show: false } };
  const quantity = (_, splits) => splits.map((value) => (shown.current.isEmpty ? "" : write(value)));
  const times = (chart, splits) => splits.map((value) => {
    const isCutOff = chart.valToPos(value, "x") > chart.over.clientWidth - EDGE;
    return isCutOff ? "" : tickLabel(value * 1000, (splits[1] - splits[0]) * 1000).label;
  });
  return {
    width: 300,
    height: HIGH,
    padding: [8, 8, 0, 0],
    legend: { show: false },
    cursor: { y: false, drag: { x: false, y: false } },
    scales: { x: { range: () => shown.current.span }, y: { range: (_, least, most) => [0, most > 0 ? most * 1.05 : 1] } },
    axes: [
      { ...axis, size: 22, space: 50, grid: { show: false }, values: times },
      { ...axis, size: 58, space: 30, grid: { stroke: () => colour("--line"), width: 1 }, values: quantity },
    ],
    series: [{}, ...lines.map(({ colour: name, width, dash }) => ({
      stroke: () => colour(name), width, dash,
      points: { show: false, filter: (chart, number) => alone(chart.data[number]), fill: () => colour(name), size: 4 },
    }))],
    hooks: { setCursor: [(chart) => onRead(chart.cursor.idx ?? null)] },
  };
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);

// The places of values without a neighbour, which no line shows: they are dots.
export function alone(values) {
  const isKnown = (index) => values[index] != null;
  return [...values.keys()].filter((index) => isKnown(index) && !isKnown(index - 1) && !isKnown(index + 1));
}
