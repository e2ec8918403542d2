// The memory budget as a bar: who uses how much of it, what is reserved, what is free. And the charts of the server.

import { byId, h, reconcile, setAttribute, setText, svg } from "./dom.js";
import { bytes, count, oneLine } from "./format.js";
import { rangeSwitch, trafficCharts } from "./charts.js";

const COLOURS = 7; // models that are told apart; the smaller ones are one part
const THIN = 6; // of 1,000: an edge would hide it
const MEMORY = [
  { kind: "plain", name: "models", of: (point) => point.used_bytes },
  { kind: "second", name: "server", of: (point) => point.server_bytes },
];

export function memoryView(store, series) {
  const bar = svg("svg", { viewBox: "0 0 1000 28", preserveAspectRatio: "none", role: "img" });
  byId("memory-bar").append(bar);
  const charts = trafficCharts(MEMORY, () => store.resources?.used_bytes), range = rangeSwitch(series, "server");
  byId("charts").before(h("div", { class: "head over-time" }, h("h3", {}, "Over time"), range.node));
  byId("charts").append(...charts.nodes);
  store.watch(() => {
    if (store.resources) draw(bar, store.resources, store.nodes.find((node) => node.this));
    charts.draw(series.server);
    range.draw();
  });
}

// Of one node, where there are nodes.
function draw(bar, resources, here) {
  const { budget_bytes: budget, used_bytes: used, reserved_bytes: reserved, free_bytes: free } = resources;
  const level = free < 0 ? "over" : free < budget / 10 ? "tight" : "fine";
  byId("memory-bar").className = `bar ${level}`;
  const parts = partsOf(resources), whole = Math.max(budget, used + reserved, 1);
  let x = 0;
  const placed = parts.map((part) => {
    const width = (1000 * part.bytes) / whole;
    x += width;
    return { ...part, x: x - width, width };
  });
  reconcile(bar, placed, barPart, (part) => part.key);
  const limit = resources.max_loaded ? `; ${count(resources.max_loaded, "model")} may be loaded at once` : "";
  const rest = free < 0 ? `${bytes(-free)} over budget` : `${bytes(free)} free`;
  const text = `${here ? `Of ${oneLine(here.id, 130)}: ` : ""}${bytes(used)} used${reserved ? `, ${bytes(reserved)} reserved` : ""}, ${rest}, of a budget of ${bytes(budget)}${limit}.`;
  setText(byId("memory-text"), text);
  setAttribute(bar, "aria-label", `Memory: ${text}`);
  reconcile(byId("memory-legend"), parts, legendItem, (part) => part.key);
}

function partsOf(resources) {
  const uses = [...resources.models].sort((a, b) => b.memory_bytes - a.memory_bytes || (a.job_id < b.job_id ? -1 : 1));
  const own = uses.slice(0, COLOURS).filter((use) => use.memory_bytes > 0);
  const others = uses.slice(own.length).reduce((sum, use) => sum + use.memory_bytes, 0);
  const reserved = uses.filter((use) => use.reserved_bytes > 0);
  const parts = own.map((use, at) => ({ key: use.job_id, kind: `c${at}`, name: `${use.model_id} ${use.version}`, bytes: use.memory_bytes, note: use.phase === "serving" ? "" : use.phase }));
  if (others > 0) parts.push({ key: "others", kind: "others", name: count(uses.length - own.length, "other"), bytes: others, note: "" });
  for (const use of reserved.slice(0, COLOURS)) parts.push({ key: `r ${use.job_id}`, kind: "reserved", name: `${use.model_id} ${use.version}`, bytes: use.reserved_bytes, note: "reserved" });
  const more = reserved.slice(COLOURS).reduce((sum, use) => sum + use.reserved_bytes, 0);
  if (more > 0) parts.push({ key: "r others", kind: "reserved", name: "others", bytes: more, note: "reserved" });
  const preparing = resources.preparing;
  if (preparing) parts.push({ key: "p", kind: "reserved", name: `${preparing.model_id} ${preparing.version}`, bytes: preparing.reserved_bytes, note: "to prepare it" });
  return parts;
}

function barPart() {
  const rect = svg("rect", { y: 0, height: 28 });
  rect.update = (part) => {
    setAttribute(rect, "class", `part ${part.kind}${part.width < THIN ? " thin" : ""}`);
    setAttribute(rect, "x", part.x.toFixed(2));
    setAttribute(rect, "width", Math.max(part.width, part.bytes ? 2 : 0).toFixed(2));
  };
  return rect;
}

function legendItem() {
  const swatch = h("span", { "aria-hidden": "true" }), text = h("span"), item = h("li", {}, swatch, text);
  item.update = (part) => {
    setAttribute(swatch, "class", `swatch ${part.kind}`);
    setText(text, `${part.name}: ${bytes(part.bytes)}${part.note ? `, ${part.note}` : ""}`);
  };
  return item;
}
