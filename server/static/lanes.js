// Lanes of the timeline: a row for each model, and one for the server or for each node, drawn as SVG and in words.
// States differ in shape and pattern as well as in colour.

import { cell, h, reconcile, setAttribute, svg, tableRow } from "./dom.js";
import { count, duration, moment, oneLine } from "./format.js";
import { HASH_DIGITS } from "./tables.js";
import { Scale } from "./timescale.js";

const HIGH = 26; // of a row, in pixels
const THIN = 3; // a segment is drawn at least so wide: what is there can be seen
const EDGE = 8; // a mark is drawn no nearer to it, so that it is seen whole
const CHARACTER = 7; // about how wide one is, of a label
const COLOURS = 7;
const MOST = 400; // rows of the table
const SERVER = {
  running: "ran", stopped: "was stopped", unknown: "ended unexpectedly",
  joined: "was there", draining: "was being drained", left: "had left", lost: "was lost",
};
const BARS = { // top and height of a state's bar
  loaded: [4, 18], unloading: [9, 13], loading: [9, 13], failed: [16, 6], lost: [4, 18], unloaded: [20, 2],
  waiting: [12, 10], running: [11, 4], stopped: [11, 4], unknown: [5, 16],
  joined: [11, 4], draining: [9, 13], left: [11, 4],
};
const MARKS = { // glyph, and what it stands for
  swapped: ["◆", "swapped"], failed: ["✕", "load failed"], lost: ["!", "lost"], exited: ["▾", "a worker ended"],
};

// A lane as items in the order of time, each with what it is about: segments, then the marks at their moments.
export function itemsOf(lane) {
  return [
    ...lane.segments.map((segment) => ({ kind: "segment", key: `s${segment.from}`, from: Date.parse(segment.from), to: Date.parse(segment.to), segment })),
    ...(lane.marks ?? []).map((mark) => ({ kind: "mark", key: `m${mark.kind}${mark.position}`, from: Date.parse(mark.at), to: Date.parse(mark.at), mark })),
  ].sort((a, b) => a.from - b.from || (b.kind === "mark") - (a.kind === "mark"));
}

// The lanes of the nodes, or of the server without any; no model has such an id.
export function serverLanes(page) {
  const found = page.nodes?.map((lane) => ({ ...lane, model_id: `:${lane.node_id}` })) ?? [{ model_id: "", segments: page.server }];
  return found.map((lane) => ({ ...lane, segments: lane.segments.map((each) => ({ ...each, version: null, events: 0 })), marks: [], loads: [] }));
}

// Whether a lane is not of a model, and its name then.
export const isOfServer = (lane) => lane.model_id === "" || lane.node_id !== undefined;
const serverName = (lane) => lane.node_id ?? "Server";

// Draws lanes as the rows of a plot: `until` is where the present ends a segment that goes on, `down` when no server
// ran, and `hrefOf` has the address of a model.
export function drawRows(plot, lanes, scale, about) {
  reconcile(plot, lanes.map((lane) => ({ lane, scale, about })), laneRow, ({ lane }) => lane.model_id);
}

function laneRow({ lane: first, about: { hrefOf } }) {
  const drawing = svg("svg", { class: "lane-plot", "aria-hidden": "true", height: HIGH });
  const name = isOfServer(first) ? h("span", { class: "lane-name server", title: serverName(first) }, oneLine(serverName(first), 130))
    : h("a", { class: "lane-name", title: first.model_id, tabindex: "-1" }, oneLine(first.model_id, 130));
  const row = h("div", { class: "lane", "data-model": first.model_id }, name, drawing);
  row.update = ({ lane, scale, about }) => {
    if (!isOfServer(first)) setAttribute(name, "href", hrefOf(lane.model_id));
    setAttribute(drawing, "viewBox", `0 0 ${scale.width} ${HIGH}`);
    setAttribute(drawing, "width", scale.width);
    drawing.replaceChildren(...parts(lane, scale, about));
  };
  return row;
}

function parts(lane, scale, { down, until, end, selected }) {
  const drawn = isOfServer(lane) ? [] : down.map(([from, to]) => box("down", scale, from, to, 0, HIGH));
  const marks = [];
  for (const item of lane.items) {
    const to = item.kind === "segment" && item.to >= end ? until : item.to;
    if (to < scale.from || item.from > scale.to) continue;
    const chosen = selected?.model === lane.model_id && selected.key === item.key;
    if (item.kind === "segment") drawn.push(...segmentParts(item.segment, scale, item.from, to, chosen));
    else marks.push(markPart(item.mark, Math.min(scale.width - EDGE, Math.max(EDGE, scale.x(item.from))), chosen));
  }
  return [...drawn, ...marks];
}

function box(kind, scale, from, to, top, high, more = {}) {
  const left = Math.max(-2, scale.x(from)), right = Math.min(scale.width + 2, scale.x(to));
  return svg("rect", { class: kind, x: left.toFixed(1), y: top, width: Math.max(0, right - left).toFixed(1), height: high, ...more });
}

function segmentParts(segment, scale, from, to, chosen) {
  const shape = segment.waiting ? "waiting" : segment.state, [top, high] = BARS[shape];
  const left = Math.max(-2, scale.x(from)), right = Math.min(scale.width + 2, Math.max(scale.x(to), scale.x(from) + THIN));
  const colour = segment.state === "loaded" || segment.state === "unloading" ? ` v${(segment.version ?? 0) % COLOURS}` : "";
  const about = { x: left.toFixed(1), y: top, width: (right - left).toFixed(1), height: high, rx: segment.state === "loaded" || segment.state === "lost" ? 3 : 1 };
  const found = [svg("rect", { class: `seg ${shape}${colour}${chosen ? " chosen" : ""}`, ...about })];
  const pattern = segment.summary ? "several" : { loading: "rising", unloading: "falling", draining: "falling", unknown: "unsure" }[shape];
  if (pattern) found.push(svg("rect", { class: "over", fill: `url(#${pattern})`, ...about }));
  const text = labelOf(segment), room = right - Math.max(left, 0);
  if (text && high > 12 && room > text.length * CHARACTER + 10) {
    found.push(svg("text", { class: "seg-label", x: (Math.max(left, 0) + 6).toFixed(1), y: top + 13 }, text));
  }
  return found;
}

function labelOf(segment) {
  if (segment.summary) return segment.events ? `${segment.events.toLocaleString("en")} events` : "";
  if (segment.state === "loaded") return segment.next_version == null ? `v${segment.version}${segment.degraded ? " degraded" : ""}` : `v${segment.version} → ${segment.next_version}`;
  return segment.state === "lost" || segment.state === "draining" ? segment.state : "";
}

function markPart(mark, x, chosen) {
  const [glyph] = MARKS[mark.kind];
  return svg("g", { class: `mark ${mark.kind}${chosen ? " chosen" : ""}`, transform: `translate(${x.toFixed(1)} 0)` },
    svg("line", { x1: 0, x2: 0, y1: 2, y2: HIGH - 2 }),
    svg("circle", { cx: 0, cy: 7, r: 6 }),
    svg("text", { x: 0, y: 10.5 }, glyph));
}

// The axis above the rows: ticks with their labels, and where the present and the moment of `at` are.
export function drawAxis(drawing, scale, marks, { at, now }) {
  setAttribute(drawing, "viewBox", `0 0 ${scale.width} 34`);
  setAttribute(drawing, "width", scale.width);
  const found = [];
  for (const tick of marks) {
    const x = scale.x(tick.time);
    found.push(svg("line", { class: "tick", x1: x.toFixed(1), x2: x.toFixed(1), y1: 26, y2: 34 }));
    if (x < 30 || x > scale.width - 30) continue; // its label would be cut off
    found.push(svg("text", { class: tick.day ? "tick-label day" : "tick-label", x: x.toFixed(1), y: 20, "text-anchor": "middle" }, tick.label));
  }
  if (now !== null && scale.x(now) <= scale.width) found.push(svg("line", { class: "now", x1: scale.x(now).toFixed(1), x2: scale.x(now).toFixed(1), y1: 22, y2: 34 }));
  if (at !== null) found.push(svg("path", { class: "at", d: `M${scale.x(at).toFixed(1)} 34l-6 -8h12z` }));
  drawing.replaceChildren(...found);
}

// Fills the legend: a sample of each shape, and what it says.
export function fillLegend(legend, shapes) {
  legend.replaceChildren(...shapes.map(([state, text]) => {
    const sample = svg("svg", { width: 28, height: HIGH, viewBox: `0 0 28 ${HIGH}`, "aria-hidden": "true" }), scale = new Scale(0, 28, 28);
    const segment = { state: state === "several" ? "loaded" : state, summary: state === "several", version: 1 };
    if (state === "down") sample.append(box("down", scale, 0, 28, 0, HIGH));
    else if (BARS[segment.state]) sample.append(...segmentParts(segment, scale, 1, 27, false));
    if (MARKS[state]) sample.append(markPart({ kind: state }, 14, false));
    return h("li", {}, sample, h("span", {}, text));
  }));
}

// What an item is, as lines: the first is its title.
export function describe(lane, item) {
  return item.kind === "mark" ? describeMark(lane, item.mark) : isOfServer(lane) ? describeServer(lane, item.segment) : describeSegment(lane, item.segment);
}

function times(segment) {
  return `${moment(segment.from)} to ${moment(segment.to)}, ${duration((Date.parse(segment.to) - Date.parse(segment.from)) / 1000)}`;
}

function describeServer(lane, segment) {
  const name = lane.node_id === undefined ? "The server" : oneLine(`Node ${lane.node_id}`, 130);
  const starts = segment.restarts > 1 ? `; ${count(segment.restarts, "start")}` : "";
  const state = segment.state === "unknown" && lane.node_id !== undefined ? "did not renew its lease" : SERVER[segment.state];
  const found = lane.node_id === undefined ? ", and was found ended at the next start" : "";
  const until = segment.state === "unknown" ? `It may have run for some of this time${found}.` : "";
  return [`${name} ${state}${starts}`, times(segment), until].filter(Boolean);
}

function describeSegment(lane, segment) {
  const version = segment.version == null ? "" : ` ${segment.version}`, load = loadOf(lane, segment);
  if (segment.waiting && !segment.summary) return describeWaiting(lane, segment);
  const title = segment.summary ? `${lane.model_id}: ${count(segment.events, "event")}, ${segment.state}${segment.state === "unloaded" ? "" : version} at the end` : `${lane.model_id}${version} ${segment.state}`;
  const cause = segment.cause && segment.cause !== "request" ? `, cause ${segment.cause}` : "";
  return [
    oneLine(title, 200),
    times(segment),
    segment.summary ? "Too short, or too many, to draw apart: zoom in." : segment.by ? `by ${oneLine(segment.by, 130)}${cause}` : "",
    segment.next_version == null ? "" : `version ${segment.next_version} loads beside it`,
    segment.degraded ? "degraded: some of its workers are gone" : "",
    segment.error ? `error ${segment.error}` : "",
    load && !segment.summary ? `bytes: ${bytesOf(load)}` : "",
    !segment.summary && segment.load_job_id ? `job ${segment.load_job_id}` : "",
  ].filter(Boolean);
}

function describeWaiting(lane, segment) {
  return [oneLine(`${lane.model_id} ${segment.next_version} waits to be loaded`, 200), times(segment),
    segment.by ? `requested by ${oneLine(segment.by, 130)}` : "", `job ${segment.load_job_id}`].filter(Boolean);
}

function describeMark(lane, mark) {
  const version = mark.version == null ? "" : ` ${mark.version}`;
  return [
    oneLine(`${lane.model_id}${version} ${MARKS[mark.kind][1]}${mark.code ? `: ${mark.code}` : ""}`, 200),
    `${moment(mark.at)}${mark.count > 1 ? `, the last of ${mark.count.toLocaleString("en")} nearby` : ""}`,
    mark.by ? `by ${oneLine(mark.by, 130)}` : "",
    `event ${mark.position}`,
  ].filter(Boolean);
}

function loadOf(lane, segment) {
  return lane.loads.find((load) => load.job_id === segment.load_job_id);
}

function bytesOf(load) {
  const more = load.file_count - load.files.length;
  return load.files.map((file) => `${oneLine(file.path, 80)} ${file.sha256.slice(0, HASH_DIGITS)}`).join(", ") + (more > 0 ? ` and ${more} more` : "");
}

// Fills the table, for who does not see the drawing.
export function fillTable(table, lanes) {
  const items = lanes.flatMap((lane) => lane.items.map((item) => ({ lane, item })));
  const rows = items.slice(0, MOST).map(({ lane, item }) => {
    const [title, when, ...rest] = describe(lane, item);
    return tableRow([isOfServer(lane) ? serverName(lane) : lane.model_id], cell("State", null, title), cell("When", null, when), cell("By, bytes, job", null, rest.join("; ")));
  });
  if (items.length > MOST) rows.push(h("tr", { role: "row" }, h("td", { colspan: 4, role: "cell" }, `And ${(items.length - MOST).toLocaleString("en")} more: zoom in.`)));
  table.replaceChildren(...rows);
}
