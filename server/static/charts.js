// Charts of the server's samples, drawn as SVG: lines over time, with the values at the pointer or at the keyboard's cursor.

import { el, setAttribute, setText, svg } from "./dom.js";
import { clock, local, serverNow, zone } from "./format.js";

const WIDE = 600, HIGH = 120;
const LEAST_MS = 120_000; // from edge to edge, where the server has not been up for long
const GAP = 2.5; // intervals without a sample: the line breaks

// Returns an element and a function that draws. `lines` are {kind, name, of}: the value of a point, or null.
export function chart(title, lines, write, { headline }) {
  const figure = el("p", { class: "figure" }), summary = el("p", { class: "summary" });
  const drawing = svg("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const paths = lines.map(({ kind }) => svg("path", { class: `line ${kind}`, "vector-effect": "non-scaling-stroke" }));
  const cursor = svg("line", { class: "reading", y1: 0, y2: HIGH, "vector-effect": "non-scaling-stroke" });
  drawing.append(...[0.5, HIGH / 2].map((y) => svg("line", { class: "grid", x1: 0, x2: WIDE, y1: y, y2: y, "vector-effect": "non-scaling-stroke" })), ...paths, cursor);
  const most = el("span", { class: "most" }), half = el("span", { class: "half" });
  const slider = el("input", { type: "range", class: "reader", "aria-label": `${title}: values over time`, min: 0, max: 0, value: 0 });
  const times = ["from", "middle", "to"].map((name) => el("span", { class: name }));
  const legend = el("ul", { class: "legend lines" }, ...lines.map(({ kind, name }) => el("li", {}, svgSwatch(kind), name)));
  const plot = el("div", { class: "plot" }, drawing, most, half, slider);
  const node = el("figure", { class: "chart" }, el("figcaption", {}, title), figure, summary, plot, el("div", { class: "times", "aria-hidden": "true" }, ...times), legend);

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

  const draw = (history) => {
    const now = serverNow(), points = history?.points ?? [];
    const first = points.length ? Date.parse(points[0].at) : now;
    const whole = history?.range === "24h" ? 86_400_000 : 3_600_000;
    const span = Math.min(whole, Math.max(LEAST_MS, (now - first) * 1.02));
    const x = (point) => WIDE * (1 - (now - Date.parse(point.at)) / span);
    const inside = points.filter((point) => x(point) >= 0);
    const highest = niceCeiling(Math.max(0, ...inside.flatMap((point) => lines.map((line) => line.of(point) ?? 0))));
    const y = (value) => HIGH - 1.5 - (highest > 0 ? (value / highest) * (HIGH - 3) : 0);
    lines.forEach((line, number) => setAttribute(paths[number], "d", path(inside, line.of, x, y, (history?.interval_s ?? 10) * 1000 * GAP)));
    shown = history ? { points: inside, x, ...headline(history) } : { points: [], x, headline: "…", summary: "" };
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
