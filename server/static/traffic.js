// The charts of latencies, requests and memory, of the server or of one model, and the choice of their range.

import { chart } from "./charts.js";
import { el, setAttribute } from "./dom.js";
import { bytes, duration, number } from "./format.js";
import { RANGES } from "./history.js";

const milliseconds = (value) => (value == null ? "–" : value < 0.01 ? `${Number((value * 1000).toPrecision(2))} ms` : duration(value));
const perSecond = (value) => `${value != null && value < 10 ? Number(value.toFixed(2)) : number(value)}/s`;

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
  const used = chart("Memory", memory, bytes, { headline: (history) => memoryHeadline(history, memory[0], now()) });
  const charts = [latency, requests, used];
  return {
    nodes: charts.map((each) => each.node),
    draw: (history) => {
      interval = history?.interval_s ?? interval;
      failed = history?.whole.failures > 0; // a line of zeros says less than none
      for (const each of charts) each.draw(history);
    },
  };
}

const when = (history) => `in ${RANGES[history.range]}`;

function latencyHeadline(history) {
  const { requests, p50_s: p50, p95_s: p95, p99_s: p99 } = history.whole;
  if (!requests) return { headline: "–", summary: `no request ${when(history)}` };
  return { headline: `p50 ${milliseconds(p50)} · p95 ${milliseconds(p95)} · p99 ${milliseconds(p99)}`, summary: `${when(history)}, estimated from a histogram` };
}

function requestsHeadline(history) {
  const { requests, failures } = history.whole, last = history.points.at(-1);
  const rate = last ? last.requests / history.interval_s : 0;
  const failed = failures ? `, ${failures.toLocaleString("en")} failed` : "";
  return { headline: perSecond(rate), summary: `${requests.toLocaleString("en")} answered${failed} ${when(history)}` };
}

function memoryHeadline(history, line, now) {
  if (now == null) return { headline: "–", summary: "no process now" };
  const most = Math.max(now, ...history.points.map((point) => line.of(point) ?? 0));
  return { headline: bytes(now), summary: `now, at most ${bytes(most)}` };
}

// Buttons for the range of the charts; `which` history they are about.
export function rangeSwitch(histories, which) {
  const buttons = Object.keys(RANGES).map((range) =>
    el("button", { type: "button", "aria-label": `Show ${RANGES[range]}`, onclick: () => (histories.choose({ range }), draw()) }, range === "1h" ? "1 h" : "24 h"));
  const node = el("div", { class: "segmented", role: "group", "aria-label": which === "server" ? "Range of the charts" : "Range of the model's charts" }, ...buttons);
  const draw = () => Object.keys(RANGES).forEach((range, number) => setAttribute(buttons[number], "aria-pressed", String(range === histories.range)));
  return { node, draw };
}
