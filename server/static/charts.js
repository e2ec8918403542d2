// Small charts, drawn as SVG: a line for what happened in the last minutes, and its present figure beside it.

import { el, setAttribute, setText, svg } from "./dom.js";

const WIDE = 300, HIGH = 64;
const LEAST_MS = 60_000, MOST_MS = 300_000; // from edge to edge: as long as it has been looked at


// Returns an element and a function that draws: `lines` of {name, kind, values}, each value [time, number or null].
export function chart(title, write) {
  const figure = el("p", { class: "figure" });
  const most = el("span", { class: "most" });
  const drawing = svg("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, preserveAspectRatio: "none", role: "img" });
  const node = el("figure", { class: "chart" }, el("div", { class: "head" }, el("figcaption", {}, title), figure), el("div", { class: "plot" }, drawing, most));
  const paths = new Map();
  const draw = (lines, now = Date.now()) => {
    const values = lines.flatMap((line) => line.values.map(([, value]) => value ?? 0));
    const first = Math.min(now, ...lines.flatMap((line) => line.values.slice(0, 1).map(([at]) => at)));
    const span = Math.min(MOST_MS, Math.max(LEAST_MS, now - first));
    const highest = Math.max(0, ...values);
    for (const line of lines) {
      if (!paths.has(line.kind)) {
        paths.set(line.kind, svg("path", { class: `line ${line.kind}`, "vector-effect": "non-scaling-stroke" }));
        drawing.append(paths.get(line.kind));
      }
      setAttribute(paths.get(line.kind), "d", path(line.values, now, span, highest));
    }
    const told = lines.filter((line) => line.said !== false).map((line) => `${write(line.values.at(-1)?.[1])}${line.name ? ` ${line.name}` : ""}`);
    setText(figure, told.join(", "));
    setText(most, highest > 0 ? `most ${write(highest)}` : "");
    setAttribute(drawing, "aria-label", `${title} of the last minutes: now ${told.join(", ")}, at most ${write(highest)}`);
  };
  return { node, draw };
}

// A line breaks where nothing is known: a gap is not a zero. What stands alone is a dot.
function path(values, now, span, highest) {
  let drawn = "", pen = "M";
  for (const [at, value] of values) {
    const x = WIDE * (1 - (now - at) / span);
    if (value == null || x < 0) {
      pen = "M";
      continue;
    }
    const y = HIGH - 2 - (highest > 0 ? (value / highest) * (HIGH - 6) : 0);
    drawn += `${pen}${x.toFixed(1)} ${y.toFixed(1)}${pen === "M" ? "h0" : ""}`;
    pen = "L";
  }
  return drawn;
}
