// Lanes of the timeline: a row for each model, and one for the server or for each node, drawn as SVG and in words.
// A bar's colour, height and pattern are its state; its version is text. Also the time scale and the axis above them.

import { duration, local, moment, named, oneLine, words } from "./format.js";
import { address, href } from "./router.js";
import { Cell, html, Row } from "./ui.js";

export const SECOND = 1000, MINUTE = 60 * SECOND, HOUR = 60 * MINUTE, DAY = 24 * HOUR, YEAR = 365 * DAY;
export const SHORTEST = MINUTE, LONGEST = YEAR; // lengths of a range

const HIGH = 26; // of a row, in pixels
const THIN = 3; // a bar is drawn at least so wide: what is there can be seen
const EDGE = 8; // a mark is drawn no nearer to it, so that it is seen whole
const CHARACTER = 7; // about how wide one is, of a label

// The top and the height of a bar, by its shape.
const BARS = {
  loaded: [4, 18], degraded: [4, 18], unloading: [9, 13], loading: [9, 13], failed: [16, 6], lost: [4, 18],
  unloaded: [20, 2], waiting: [12, 10],
  running: [11, 4], stopped: [11, 4], unknown: [5, 16], joined: [11, 4], draining: [9, 13], left: [11, 4],
};
const PATTERNS = { loading: "rising", unloading: "falling", draining: "falling", unknown: "unsure" };
const MARKS = { // glyph, and what it stands for
  swapped: ["◆", "swapped"], failed: ["✕", "load failed"], lost: ["!", "lost"], exited: ["▾", "a worker ended"],
};
const SERVER = {
  running: "ran", stopped: "was stopped", unknown: "ended unexpectedly",
  joined: "was there", draining: "was being drained", left: "had left", lost: "was lost",
};

// The scale.

// Maps milliseconds to pixels and back.
export class Scale {
  constructor(from, to, width) {
    Object.assign(this, { from, to, width });
  }

  x(time) {
    return ((time - this.from) / (this.to - this.from)) * this.width;
  }

  time(x) {
    return this.from + (x / this.width) * (this.to - this.from);
  }
}

const MONTH = 30 * DAY;
const STEPS = [
  SECOND, 5 * SECOND, 10 * SECOND, 30 * SECOND, MINUTE, 5 * MINUTE, 10 * MINUTE, 30 * MINUTE, HOUR, 3 * HOUR, 6 * HOUR, 12 * HOUR,
  DAY, 2 * DAY, 7 * DAY, MONTH, 3 * MONTH, 6 * MONTH, 12 * MONTH, 60 * MONTH, 120 * MONTH,
];
const NAMES = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

// The moments that an axis names, at round times of this place: [{time, label, isDay}], `apart` pixels from one
// another at least. `isDay` says that the label is a date.
export function ticks(scale, apart = 90) {
  const least = ((scale.to - scale.from) * apart) / scale.width, step = STEPS.find((each) => each >= least) ?? STEPS.at(-1);
  const midnight = new Date(scale.from).setHours(0, 0, 0, 0), found = [];
  if (step < DAY) {
    const first = midnight + Math.ceil((scale.from - midnight) / step) * step;
    for (let time = first; time <= scale.to; time += step) found.push(time);
  } else {
    for (const day = new Date(midnight); day <= scale.to; day.setDate(day.getDate() + 1)) {
      if (day >= scale.from && isRound(day, step)) found.push(day.getTime());
    }
  }
  return found.map((time) => ({ time, ...tickLabel(time, step) }));
}

function isRound(day, step) {
  const days = step / DAY, months = step / MONTH, date = day.getDate();
  if (months >= 1) return date === 1 && (day.getFullYear() * 12 + day.getMonth()) % months === 0;
  return (date - 1) % days === 0 && (days === 1 || date <= 31 - days / 2); // a later one is too near to the first of a month
}

export function tickLabel(time, step) {
  const date = new Date(time), name = NAMES[date.getMonth()], year = date.getFullYear();
  if (step >= MONTH) return { label: date.getMonth() === 0 ? String(year) : `${name} ${year}`, isDay: true };
  const isMidnight = local(date).endsWith("T00:00:00");
  if (step >= DAY || isMidnight) return { label: `${date.getDate()} ${name}`, isDay: true };
  return { label: local(date).slice(11, step < MINUTE ? 19 : 16), isDay: false };
}

// A range in words, with each date once.
export function rangeText(from, to) {
  const [first, last] = [from, to].map((time) => new Date(time));
  const [firstDay, lastDay] = [first, last].map((day) => `${day.getDate()} ${NAMES[day.getMonth()]} ${day.getFullYear()}`);
  const end = to - from < 10 * MINUTE ? 19 : 16; // with seconds where they tell
  const [begin, finish] = [first, last].map((time) => local(time).slice(11, end));
  return firstDay === lastDay ? `${firstDay}, ${begin} to ${finish}` : `${firstDay}, ${begin} to ${lastDay}, ${finish}`;
}

// What the lanes hold.

// The lanes of a page of the timeline, the nodes' or the server's first, each with its items: its segments and marks
// in the order of time. Below a model with copies is a lane for each node that had one: `at` names it.
export function lanesOf(page) {
  const ofServer = page.nodes?.map((lane) => ({ ...lane, model_id: `:${lane.node_id}` })) // no model has such an id
    ?? [{ model_id: "", segments: page.server }];
  const plain = ofServer.map((lane) => ({
    ...lane, marks: [],
    segments: lane.segments.map((segment) => ({ ...segment, version: null })),
  }));
  const ofCopies = (lane) => (lane.copies ?? []).map(({ node_id: at, segments }) => ({
    ...lane, id: `${lane.model_id}:${at}`, at, segments, marks: [],
  }));
  const all = [...plain, ...page.lanes.flatMap((lane) => [lane, ...ofCopies(lane)])];
  return all.map((lane) => ({ id: lane.model_id, ...lane, items: itemsOf(lane, page) }));
}

// When a segment of a page began and ended; one that reaches the end of the page goes on.
function timesOf(segment, page) {
  const to = Date.parse(segment.to);
  return { from: Date.parse(segment.from), to: to < Date.parse(page.to) - 1 ? to : Infinity };
}

// The times at which no server ran, up to `until`.
export function downTimes(page, until) {
  const times = page.server.filter((segment) => segment.state !== "running").map((segment) => timesOf(segment, page));
  return times.map(({ from, to }) => [from, Math.min(to, until)]);
}

function itemsOf(lane, page) {
  const segments = lane.segments.map((segment) => ({ key: `s${segment.from}`, ...timesOf(segment, page), segment }));
  const marks = lane.marks.map((mark) => ({
    key: `m${mark.kind}${mark.position}`, from: Date.parse(mark.at), to: Date.parse(mark.at), mark,
  }));
  return [...segments, ...marks].sort((a, b) => a.from - b.from || Boolean(b.mark) - Boolean(a.mark));
}

// Whether a lane is the server's or a node's, and its name then.
const isOfServer = (lane) => lane.model_id === "" || lane.node_id !== undefined;
const nameOf = (lane) => oneLine(isOfServer(lane) ? lane.node_id ?? "Server" : lane.at ? `at ${lane.at}` : lane.model_id, 130);

// The item of a lane at a time: a mark within `slack` of it, else the segment there, else one within `slack`.
export function itemAt(lane, time, slack) {
  const isNear = (item) => item.from - slack <= time && time <= item.to + slack;
  const distance = (item) => Math.abs(item.from - time);
  const [mark] = lane.items.filter((item) => item.mark && isNear(item)).sort((a, b) => distance(a) - distance(b));
  const segments = lane.items.filter((item) => item.segment);
  return mark ?? segments.find((item) => item.from <= time && time < item.to) ?? segments.findLast(isNear) ?? null;
}

// The moment at which an item begins: its event, else the time to the microsecond, which no `Date` has.
const momentOf = ({ mark, segment }) => String((mark ?? segment).position ?? segment.from);

// Drawing.

// A row. `shown` has what all rows share: `down` when no server ran, and `until`, where the present ends what goes on.
export function Lane({ lane, scale, chosenKey, shown }) {
  const { down, until } = shown;
  const items = lane.items
    .map((item) => ({ ...item, to: Math.min(item.to, until) }))
    .filter((item) => item.to >= scale.from && item.from <= scale.to);
  return html`
    <div class="lane" data-model=${lane.id}>
      ${isOfServer(lane) || lane.at ? html`<span class="lane-name server" title=${nameOf(lane)}>${nameOf(lane)}</span>`
        : html`<a class="lane-name" title=${lane.model_id} href=${href("models", lane.model_id)}>${nameOf(lane)}</a>`}
      <svg class="lane-plot" aria-hidden="true" width=${scale.width} height=${HIGH} viewBox="0 0 ${scale.width} ${HIGH}">
        ${!isOfServer(lane) && down.map(([from, to]) => html`<${Down} scale=${scale} from=${from} to=${to} />`)}
        ${items.filter((item) => item.segment).map((item) => html`
          <${Bar} segment=${item.segment} scale=${scale} from=${item.from} to=${item.to} isChosen=${item.key === chosenKey}
            title=${describe(lane, item).join("\n")} />`)}
        ${items.filter((item) => item.mark).map((item) => html`
          <${Mark} kind=${item.mark.kind} x=${scale.x(item.from)} width=${scale.width} isChosen=${item.key === chosenKey}
            title=${describe(lane, item).join("\n")} />`)}
      </svg>
    </div>`;
}

function Down({ scale, from, to }) {
  const left = Math.max(-2, scale.x(from)), right = Math.min(scale.width + 2, scale.x(to));
  return html`<rect class="down" x=${pixels(left)} y="0" width=${pixels(Math.max(0, right - left))} height=${HIGH} />`;
}

function Bar({ segment, title, scale, from, to, isChosen }) {
  const shape = shapeOf(segment), [top, high] = BARS[shape];
  const left = Math.max(-2, scale.x(from));
  const right = Math.min(scale.width + 2, Math.max(scale.x(to), scale.x(from) + THIN));
  const box = { x: pixels(left), y: top, width: pixels(right - left), height: high, rx: high > 16 ? 3 : 1 };
  const pattern = PATTERNS[shape];
  const text = labelOf(segment), begin = Math.max(left, 0);
  const fits = text && high > 12 && right - begin > text.length * CHARACTER + 12;
  return html`
    <rect class="seg ${shape} ${isChosen ? "chosen" : ""}" ...${box}><title>${title}</title></rect>
    ${pattern && html`<rect class="over" fill="url(#${pattern})" ...${box} />`}
    ${fits && html`<text class="seg-label" x=${pixels(begin + 9)} y=${top + 13}>${text}</text>`}`;
}

function shapeOf(segment) {
  if (segment.waiting) return "waiting";
  return segment.degraded && segment.state === "loaded" ? "degraded" : segment.state;
}

function labelOf(segment) {
  const version = segment.version == null ? "" : String(segment.version);
  if (segment.state === "loaded" && segment.next_version != null) return `${version} → ${segment.next_version}`;
  if (segment.state === "loaded") return segment.degraded ? `${version} degraded` : version;
  return ["lost", "draining"].includes(segment.state) ? segment.state : "";
}

function Mark({ kind, title, x, width, isChosen }) {
  const place = Math.min(width - EDGE, Math.max(EDGE, x));
  return html`
    <g class="mark ${kind} ${isChosen ? "chosen" : ""}" transform="translate(${pixels(place)} 0)"><title>${title}</title>
      <line x1="0" x2="0" y1="2" y2=${HIGH - 2} />
      <circle cx="0" cy="7" r="6" />
      <text x="0" y="10.5">${MARKS[kind][0]}</text>
    </g>`;
}

// The axis above the rows: ticks with their labels, and where the present and the moment of `at` are.
export function Axis({ scale, at, now }) {
  const isInside = (time) => time !== null && time >= scale.from && time <= scale.to;
  return html`
    <svg height="34" width=${scale.width} viewBox="0 0 ${scale.width} 34" aria-hidden="true">
      ${ticks(scale).map(({ time, label, isDay }) => html`<${Tick} x=${scale.x(time)} ...${{ label, isDay, scale }} />`)}
      ${isInside(now) && html`<line class="now" x1=${pixels(scale.x(now))} x2=${pixels(scale.x(now))} y1="22" y2="34" />`}
      ${isInside(at) && html`<path class="at" d="M${pixels(scale.x(at))} 34l-6 -8h12z" />`}
    </svg>`;
}

function Tick({ x, label, isDay, scale }) {
  const isCutOff = x < 30 || x > scale.width - 30;
  return html`
    <line class="tick" x1=${pixels(x)} x2=${pixels(x)} y1="26" y2="34" />
    ${!isCutOff && html`<text class="tick-label ${isDay ? "day" : ""}" x=${pixels(x)} y="20" text-anchor="middle">${label}</text>`}`;
}

const pixels = (length) => length.toFixed(1);

const LEGEND = [
  ["loaded", "loaded"], ["degraded", "degraded"], ["waiting", "waiting"], ["loading", "loading"], ["unloading", "unloading"],
  ["lost", "lost"], ["failed", "failed"], ["swapped", "swapped"], ["exited", "a worker ended"], ["down", "no server"],
];

// A sample of each shape, and what it says.
export function Legend() {
  const scale = new Scale(0, 28, 28);
  const sample = (kind) => {
    if (kind === "down") return html`<${Down} scale=${scale} from=${0} to=${28} />`;
    if (BARS[kind] === undefined && MARKS[kind]) return html`<${Mark} kind=${kind} x=${14} width=${28} />`;
    const isDegraded = kind === "degraded";
    return html`<${Bar} scale=${scale} from=${1} to=${27}
      segment=${{ state: isDegraded ? "loaded" : kind, degraded: isDegraded, waiting: kind === "waiting" }} />`;
  };
  return html`
    <ul class="legend shapes" aria-hidden="true">
      ${LEGEND.map(([kind, text]) => html`
        <li><svg width="28" height=${HIGH} viewBox="0 0 28 ${HIGH}">${sample(kind)}</svg><span>${text}</span></li>`)}
    </ul>`;
}

// The patterns of bars, which every drawing on the page refers to.
export function Patterns() {
  return html`
    <svg class="defs" width="0" height="0" aria-hidden="true"><defs>
      <pattern id="rising" width="6" height="6" patternUnits="userSpaceOnUse"><path d="M-1 7L7 -1M-1 1L1 -1M5 7L7 5" /></pattern>
      <pattern id="falling" width="6" height="6" patternUnits="userSpaceOnUse"><path d="M-1 -1L7 7M5 -1L7 1M-1 5L1 7" /></pattern>
      <pattern id="unsure" width="5" height="5" patternUnits="userSpaceOnUse"><circle cx="2" cy="2" r="1" /></pattern>
    </defs></svg>`;
}

// Words.

// What an item is, as lines: the first is its title.
export function describe(lane, { mark, segment }) {
  const lines = mark ? describeMark(lane, mark)
    : isOfServer(lane) ? describeServer(lane, segment)
      : segment.waiting ? describeWaiting(lane, segment) : describeSegment(lane, segment);
  return lines.filter(Boolean);
}

function timesText({ from, to }) {
  return `${moment(from)} to ${moment(to)}, ${duration((Date.parse(to) - Date.parse(from)) / 1000)}`;
}

function describeServer(lane, segment) {
  const isNode = lane.node_id !== undefined, isUnknown = segment.state === "unknown";
  const name = isNode ? oneLine(`Node ${lane.node_id}`, 130) : "The server";
  const state = isUnknown && isNode ? "did not renew its lease" : SERVER[segment.state];
  const found = isNode ? "" : ", and was found ended at the next start";
  return [`${name} ${state}`, timesText(segment), isUnknown && `It may have run for some of this time${found}.`];
}

function describeSegment(lane, segment) {
  const place = lane.at ? ` at ${lane.at}` : "", cause = segment.cause && segment.cause !== "request" ? `, cause ${words(segment.cause)}` : "";
  return [
    oneLine(`${named(lane.model_id, segment.version)} ${words(segment.state)}${place}`, 200),
    timesText(segment),
    segment.by && `by ${oneLine(segment.by, 130)}${cause}`,
    segment.next_version != null && `${named(lane.model_id, segment.next_version)} loads beside it`,
    segment.degraded && "degraded: some of its workers are gone",
    segment.error && `error ${segment.error}`,
  ];
}

function describeWaiting(lane, segment) {
  return [
    `${named(lane.model_id, segment.next_version)} waits to be loaded`, timesText(segment),
    segment.by && `requested by ${oneLine(segment.by, 130)}`,
  ];
}

function describeMark(lane, mark) {
  const code = mark.code ? `: ${mark.code}` : "";
  return [
    oneLine(`${named(lane.model_id, mark.version)} ${MARKS[mark.kind][1]}${code}`, 200),
    moment(mark.at), mark.by && `by ${oneLine(mark.by, 130)}`, `event ${mark.position}`,
  ];
}

// The chosen item in words, with where it leads.
export function Detail({ selected }) {
  if (!selected) return html`<div id="timeline-detail" role="status"></div>`;
  const { lane, item } = selected, [title, ...lines] = describe(lane, item);
  return html`
    <div id="timeline-detail" class="detail" role="status">
      <p><strong>${title}</strong></p>
      ${lines.map((line) => html`<p>${line}</p>`)}
      <${Links} ...${selected} />
    </div>`;
}

function Links({ lane, item }) {
  const subject = item.segment ?? item.mark, job = subject.job_id ?? subject.load_job_id;
  return html`
    <p class="links">
      ${!isOfServer(lane) && html`<a href=${href("models", lane.model_id)}>Model</a>`}
      ${job && html`<a href=${href("jobs", job)}>Job</a>`}
      <a href=${href("timeline", momentOf(item), address.value.query)}>As of this moment</a>
    </p>`;
}

// All items as text, for a reader without a mouse, or who does not see the drawing.
export function LaneTable({ lanes }) {
  const items = lanes.flatMap((lane) => lane.items.map((item) => ({ lane, item })));
  return html`
    <div class="scroll" tabindex="0" role="group" aria-label="The timeline as a table">
      <table class="cards">
        <caption class="unseen">Changes in this range, by model</caption>
        <thead><tr>${["Model", "State", "When", "By", "See"].map((name) => html`<th scope="col">${name}</th>`)}</tr></thead>
        <tbody id="timeline-table">
          ${items.map(({ lane, item }) => {
            const [title, when, ...rest] = describe(lane, item);
            return html`
              <${Row} heading=${nameOf(lane)}>
                <${Cell} label="State">${title}<//><${Cell} label="When">${when}<//>
                <${Cell} label="By">${rest.join("; ")}<//><${Cell} label="See"><${Links} lane=${lane} item=${item} /><//>
              <//>`;
          })}
        </tbody>
      </table>
    </div>`;
}
