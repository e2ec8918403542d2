// The page of the timeline: a lane for each model over a range of time, from the server's summary of it, and the models
// as of a moment of it. Range and moment are in the page's address.

import { api, errorText } from "./api.js";
import { count, moment as momentText, serverNow, zone } from "./format.js";
import {
  Axis, DAY, describe, downTimes, HOUR, isOfServer, itemAt, Lane, lanesOf, LaneTable, Legend, LONGEST, MINUTE, momentOf, nearestItem,
  Patterns, rangeText, Scale, SECOND, SHORTEST, YEAR,
} from "./lanes.js";
import { address, href, replace } from "./router.js";
import { head, now } from "./state.js";
import { AsOf, timeOf, useMoment, useResting } from "./timetravel.js";
import { html, PageHead, Refusal, useEffect, useLayoutEffect, useMemo, useRef, useRequest, useSignal, useState } from "./ui.js";

const PAGE = 25; // lanes: what can be read at once
const CALM_MS = 1000; // between two requests for what events have changed
const SHARE = 3; // a request that takes long is followed by so much longer a pause
const REACH = 7; // pixels around a mark that mean it
const SPANS = { minute: MINUTE, hour: HOUR, day: DAY, month: 30 * DAY, year: YEAR };

const iso = (time) => new Date(time).toISOString();
const clampSpan = (span) => Math.min(LONGEST, Math.max(SHORTEST, span));

export function TimelinePage() {
  const { id, query } = address.value;
  const [width, axis] = useWidth(), tip = useSignal(null);
  const settled = rangeOf(query), [range, setRange] = useResting(settled, (resting) => setQuery(queryOf(resting)));
  const [find, setFind] = useResting(query.find ?? "", (text) => setQuery({ find: text }));
  const [cursors, setCursors] = useState([""]); // of the pages up to the present one
  const [chosen, setChosen] = useState(null); // {lane, key} of an item
  useEffect(() => setCursors([""]), [query.find]);
  const past = useMoment(id), at = timeOf(id, past.answer);
  const { page, error } = useTimeline(settled, query.find ?? "", cursors.at(-1), width);
  const lanes = useMemo(() => (page ? lanesOf(page) : []), [page]);
  const bounds = boundsOf(range, page, steadyNow(range, page, width)), { from, to } = bounds;
  const scale = useMemo(() => new Scale(from, to, width), [from, to, width]);
  const selected = itemOf(lanes, chosen), moves = movesOf(range, bounds, selected?.item.from ?? at, setRange);
  const choose = (lane, item) => setChosen(item && { lane: lane.id, key: item.key });
  const view = { page, lanes, scale, axis, at, chosen, selected, choose, moves, tip, isLive: range.live, isMoving: range !== settled };
  return html`
    <${PageHead} title="Timeline" count=${page?.models ? count(page.models, "model") : ""}>
      <p id="timeline-range" class="figures">${rangeText(from, to)} ${zone(new Date(to))}${range.live ? ", live" : ""}</p>
    <//>
    <section id="timeline" class="panel timeline" aria-label="Timeline">
      <${Controls} range=${range} bounds=${bounds} moves=${moves} find=${find} setFind=${setFind} />
      <${Refusal} text=${error && errorText(error)} />
      <${Plot} view=${view} />
      <${Hints} page=${page} error=${error} find=${query.find} />
      <${Detail} selected=${selected} />
      <div class="foot"><${Legend} /><${Pages} page=${page} cursors=${cursors} setCursors=${setCursors} /></div>
      <${More} lanes=${lanes} />
      <${Tip} tip=${tip} />
      <${Patterns} />
    </section>
    <${AsOf} id=${id} past=${past} />`;
}

// The width of an element in pixels, and the reference that it is given.
function useWidth() {
  const [width, setWidth] = useState(600), node = useRef(null);
  useLayoutEffect(() => {
    const measure = () => setWidth((before) => Math.floor(node.current?.getBoundingClientRect().width ?? 0) || before);
    const observer = new ResizeObserver(measure);
    observer.observe(node.current);
    measure();
    return () => observer.disconnect();
  }, []);
  return [width, node];
}

// The range: {live: true, span} ends now, {live: true, span: null} is the whole history, {live: false, from, to} is fixed.

function rangeOf(query) {
  const [from, to] = [Date.parse(query.from), Date.parse(query.to)];
  if (to - from >= 1) return { live: false, from, to };
  if (query.last === "all") return { live: true, span: null };
  if (Number(query.last) > 0) return { live: true, span: clampSpan(Number(query.last) * SECOND) };
  return { live: true, span: DAY, auto: true }; // or the whole history, if that is shorter
}

function queryOf({ live, span, from, to }) {
  if (!live) return { from: iso(from), to: iso(to), last: null };
  return { from: null, to: null, last: span === null ? "all" : Math.round(span / SECOND) };
}

function setQuery(changes) {
  const { id, query } = address.value;
  replace("timeline", id, { ...query, ...changes });
}

function boundsOf({ live, span, auto, from, to }, page, end) {
  if (!live) return { from, to };
  const first = page?.known_from ? Date.parse(page.known_from) : end - MINUTE;
  const begin = span === null ? first : auto ? Math.max(end - span, first) : end - span;
  return { from: Math.min(begin, end - SHORTEST), to: end };
}

// The present, rounded up to about a pixel: a drawing that would change by less is not made anew.
function steadyNow(range, page, width) {
  if (!range.live) return serverNow();
  const { from, to } = boundsOf(range, page, now.value), pixel = 2 ** Math.floor(Math.log2((to - from) / width));
  return Math.ceil(to / pixel) * pixel;
}

// What changes the range. `about` is the moment that is chosen, or shown as of; null if there is none.
function movesOf(range, { from, to }, about, setRange) {
  const last = (span) => setRange({ live: true, span: clampSpan(span) });
  // A range that reaches the present is live again.
  const show = (begin, end) => (end >= serverNow() ? last(end - begin) : setRange({ live: false, from: Math.round(begin), to: Math.round(end) }));
  const zoom = (factor, center = about) => {
    const span = clampSpan((to - from) * factor), isInside = center !== null && center >= from && center <= to;
    if (range.live && !isInside) return last(span);
    const middle = isInside ? center : (from + to) / 2, begin = middle - ((middle - from) / (to - from)) * span;
    show(begin, begin + span);
  };
  return {
    last, show, zoom,
    all: () => setRange({ live: true, span: null }),
    pan: (share) => show(from + (to - from) * share, to + (to - from) * share),
    visit: (moment) => replace("timeline", moment, address.value.query),
  };
}

// A page of lanes, and again what events have changed while the range ends now.
function useTimeline(range, find, cursor, width) {
  const resolution = Math.min(2000, Math.max(100, Math.ceil(width / 100) * 100)), tookMs = useRef(0), known = useRef(null);
  const ask = async (signal) => {
    const query = { limit: PAGE, resolution, active: "true", cursor, find: find.trim() };
    const { from, to } = boundsOf(range, known.current, serverNow()), began = performance.now();
    if (!range.live) query.to = iso(to);
    const begin = range.live && range.auto && known.current === null ? to - range.span : from;
    if (range.span !== null) query.from = iso(begin);
    const page = await api.get(`/api/v1/timeline?${new URLSearchParams(query)}`, { signal });
    tookMs.current = Math.min(2000, performance.now() - began);
    return { ...page, isTooWide: range.auto && Date.parse(page.known_from) > begin + SECOND };
  };
  const { answer: page, error, again } = useRequest(ask, [JSON.stringify(range), find, cursor, resolution]);
  known.current = page;
  const isOld = range.live && page && head.value > page.as_of;
  useEffect(() => {
    if (page?.isTooWide) again(); // the ledger is shorter: what was merged can be drawn apart
  }, [page]);
  useEffect(() => {
    if (!isOld) return undefined;
    const timer = setTimeout(again, Math.max(CALM_MS, SHARE * tookMs.current));
    return () => clearTimeout(timer);
  }, [isOld, page, error]);
  return { page, error };
}

function itemOf(lanes, chosen) {
  const lane = lanes.find((each) => each.id === chosen?.lane), item = lane?.items.find((each) => each.key === chosen.key);
  return item ? { lane, item } : null;
}

// Parts of the page.

function Controls({ range, bounds, moves, find, setFind }) {
  const span = bounds.to - bounds.from, isAll = range.live && range.span === null;
  const title = (name) => name[0].toUpperCase() + name.slice(1), isShown = (length) => !isAll && Math.abs(span - length) < SECOND;
  return html`
    <div class="controls">
      <div class="segmented" role="group" aria-label="Length of the range">
        ${Object.entries(SPANS).map(([name, length]) => html`
          <button type="button" aria-pressed=${String(isShown(length))} onClick=${() => moves.last(length)}>${title(name)}</button>`)}
        <button type="button" aria-pressed=${String(isAll)} onClick=${moves.all}>All<span class="unseen"> history</span></button>
      </div>
      <div class="segmented" role="group" aria-label="Move the range">
        <button type="button" aria-label="Earlier" onClick=${() => moves.pan(-0.5)}>◂</button>
        <button type="button" aria-label="Zoom out" onClick=${() => moves.zoom(2)}>−</button>
        <button type="button" aria-label="Zoom in" disabled=${span <= SHORTEST} onClick=${() => moves.zoom(0.5)}>+</button>
        <button type="button" aria-label="Later" disabled=${range.live} onClick=${() => moves.pan(0.5)}>▸</button>
        <button type="button" disabled=${range.live} onClick=${() => moves.last(span)}>Now</button>
      </div>
      <span class="pair"><label for="timeline-find">Model</label>
        <input id="timeline-find" type="search" autocomplete="off" maxlength="128" spellcheck=${false} value=${find}
          onInput=${(event) => setFind(event.target.value)} /></span>
    </div>`;
}

function Hints({ page, error, find }) {
  if (!page) return !error && html`<p class="hint">Loading…</p>`;
  const none = find ? "No model of this range matches." : "No model was asked for in this range. Its lane begins with its first load.";
  const hints = [
    page.lanes.length === 0 && none,
    page.marks_from !== null && `There are too many failures to mark all: marks begin at ${momentText(page.marks_from)}.`,
  ];
  return hints.filter(Boolean).map((text) => html`<p class="hint">${text}</p>`);
}

// The chosen item in words, with where it leads.
function Detail({ selected }) {
  if (!selected) return html`<div id="timeline-detail" role="status"></div>`;
  const { lane, item } = selected, [title, ...lines] = describe(lane, item), subject = item.segment ?? item.mark;
  const job = subject.job_id ?? subject.load_job_id;
  return html`
    <div id="timeline-detail" class="detail" role="status">
      <p><strong>${title}</strong></p>
      ${lines.map((line) => html`<p>${line}</p>`)}
      <p class="links">
        ${!isOfServer(lane) && html`<a href=${href("models", lane.model_id)}>Model</a>`}
        ${job && html`<a href=${href("jobs", job)}>Job</a>`}
        <a href=${href("timeline", momentOf(item), address.value.query)}>As of this moment</a>
      </p>
    </div>`;
}

function Pages({ page, cursors, setCursors }) {
  const before = (cursors.length - 1) * PAGE, next = () => setCursors([...cursors, page.next_cursor]);
  if (!page || (before === 0 && page.next_cursor === null)) return null;
  return html`
    <div class="pages">
      <button type="button" aria-label="Previous models" disabled=${before === 0} onClick=${() => setCursors(cursors.slice(0, -1))}>◂</button>
      <span class="figures">${before + 1} to ${before + page.lanes.length} of ${page.models}</span>
      <button type="button" aria-label="Next models" disabled=${page.next_cursor === null} onClick=${next}>▸</button>
    </div>`;
}

function More({ lanes }) {
  const [isOpen, setOpen] = useState(false);
  return html`
    <div class="more">
      <details id="timeline-text" onToggle=${(event) => setOpen(event.target.open)}>
        <summary>As a table</summary>${isOpen && html`<${LaneTable} lanes=${lanes} />`}
      </details>
      <details>
        <summary>Mouse and keys</summary>
        <ul id="timeline-help">
          <li>Click, or press <kbd>Enter</kbd>: the models as of that moment. <kbd>Escape</kbd>: now.</li>
          <li><kbd>←</kbd> <kbd>→</kbd>: the change before or after. <kbd>↑</kbd> <kbd>↓</kbd>: the model above or below.</li>
          <li><kbd>+</kbd> <kbd>−</kbd>, or the wheel with <kbd>Ctrl</kbd>: zoom. <kbd>0</kbd>: the whole history.</li>
          <li>Drag, <kbd>Shift</kbd> and <kbd>←</kbd> <kbd>→</kbd>, or the wheel with <kbd>Shift</kbd>: move the range.</li>
        </ul>
      </details>
    </div>`;
}

// The axis and the lanes, with the moment that is shown as of.
function Plot({ view }) {
  const { scale, axis, at, chosen, isLive } = view, plot = useRef(null), [rows, style] = useRows(view);
  useEffect(() => {
    plot.current.querySelector(".chosen")?.closest(".lane").scrollIntoView({ block: "nearest" });
  }, [chosen]);
  const isInside = at !== null && at >= scale.from && at <= scale.to;
  return html`
    <div id="timeline-plot" class="plot-lanes" tabindex="0" role="application" aria-label="Timeline of the models"
      aria-describedby="timeline-help timeline-range" ref=${plot} ...${handlersOf(view)}>
      <div class="lane axis"><span class="lane-name"></span>
        <span class="lane-plot" ref=${axis}><${Axis} scale=${scale} at=${at} now=${isLive ? null : serverNow()} /></span></div>
      <div id="timeline-rows" class="rows" style=${style}>${rows}
        ${isInside && html`<div id="timeline-cursor" class="cursor" style=${{ "--x": `${scale.x(at)}px` }}></div>`}
      </div>
    </div>`;
}

// The rows, as they were drawn where the range rested, and the style that moves and stretches them with it.
function useRows({ page, lanes, scale, chosen, isLive, isMoving }) {
  const settled = useRef(scale);
  if (!isMoving) settled.current = scale;
  const drawn = settled.current;
  const rows = useMemo(() => {
    const until = isLive ? drawn.to : Math.min(drawn.to, serverNow());
    const shown = { down: page ? downTimes(page, until) : [], until };
    return lanes.map((lane) => html`
      <${Lane} key=${lane.id} lane=${lane} scale=${drawn} shown=${shown} href=${href("models", lane.model_id)}
        chosenKey=${chosen?.lane === lane.id ? chosen.key : null} />`);
  }, [lanes, drawn, chosen]);
  return [rows, { "--shift": `${scale.x(drawn.from)}px`, "--zoom": (drawn.to - drawn.from) / (scale.to - scale.from) }];
}

// What the pointer is at, beside it: {lane, item, x, y} of the window.
function Tip({ tip }) {
  const node = useRef(null), pointed = tip.value;
  useLayoutEffect(() => {
    if (!pointed) return;
    const size = node.current.getBoundingClientRect(), frame = node.current.parentElement.getBoundingClientRect();
    const left = Math.min(pointed.x - frame.left + 14, frame.width - size.width - 8);
    const isBelow = pointed.y + 18 + size.height < innerHeight;
    node.current.style.left = `${Math.max(8, left)}px`;
    node.current.style.top = `${pointed.y - frame.top + (isBelow ? 18 : -size.height - 12)}px`;
  }, [pointed]);
  if (!pointed) return null;
  const [title, ...lines] = describe(pointed.lane, pointed.item);
  return html`
    <div class="tip" aria-hidden="true" ref=${node}>
      <strong>${title}</strong>${lines.map((line) => html`<span>${line}</span>`)}
    </div>`;
}

// Mouse, touch and keys.

function handlersOf(view) {
  return {
    onKeyDown: (event) => onKey(event, view),
    onWheel: (event) => onWheel(event, view),
    onPointerDown: (event) => drag(event, view),
    onPointerMove: (event) => hover(event, view),
    onPointerLeave: () => (view.tip.value = null),
  };
}

// The lane, the item and the time at the pointer; null where there is none.
function pick(event, { lanes, scale, axis }) {
  const row = event.target.closest?.(".lane"), x = event.clientX - axis.current.getBoundingClientRect().left;
  if (!row || x < 0) return { lane: null, item: null, time: null };
  const lane = lanes.find((each) => each.id === row.dataset.model) ?? null, time = scale.time(x);
  const slack = (scale.to - scale.from) * (REACH / scale.width);
  return { lane, item: lane && itemAt(lane, time, slack), time };
}

function hover(event, view) {
  const { lane, item } = pick(event, view), isPointed = item && event.pointerType !== "touch" && !event.buttons;
  view.tip.value = isPointed ? { lane, item, x: event.clientX, y: event.clientY } : null;
}

// A press without a move chooses; with a move it pulls the range along.
function drag(event, view) {
  if (event.button !== 0 || event.target.closest("a")) return;
  const { lane, item, time } = pick(event, view), { from, to, width } = view.scale, ended = new AbortController();
  let hasMoved = false;
  const move = (next) => {
    const by = next.clientX - event.clientX;
    hasMoved ||= Math.abs(by) > 4;
    if (hasMoved && event.pointerType !== "touch") view.moves.show(from - (by * (to - from)) / width, to - (by * (to - from)) / width);
  };
  const end = (last) => {
    ended.abort();
    if (hasMoved || last.type === "pointercancel" || time === null) return;
    if (lane) view.choose(lane, item);
    view.moves.visit(iso(Math.min(time, serverNow())));
  };
  for (const [type, listener] of [["pointermove", move], ["pointerup", end], ["pointercancel", end]]) {
    addEventListener(type, listener, { signal: ended.signal });
  }
}

function onWheel(event, view) {
  if (event.ctrlKey || event.metaKey || event.altKey) {
    event.preventDefault();
    view.moves.zoom(event.deltaY > 0 ? 1.25 : 0.8, pick(event, view).time);
  } else if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
    event.preventDefault();
    view.moves.pan(Math.sign(event.deltaX || event.deltaY) * 0.1);
  }
}

function onKey(event, { lanes, selected, moves, choose }) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("a")) return;
  const full = lanes.filter((lane) => lane.items.length), last = full.at(-1);
  const step = (by) => {
    if (!selected) return last && choose(last, last.items.at(-1));
    const { lane, item } = selected, next = lane.items[lane.items.indexOf(item) + by];
    if (next) choose(lane, next);
  };
  const stepLane = (by) => {
    if (!selected) return step(0);
    const lane = full[full.indexOf(selected.lane) + by];
    if (lane) choose(lane, nearestItem(lane, selected.item));
  };
  const acts = event.shiftKey ? { ArrowLeft: () => moves.pan(-0.25), ArrowRight: () => moves.pan(0.25), "+": () => moves.zoom(0.5) } : {
    ArrowLeft: () => step(-1), ArrowRight: () => step(1), ArrowUp: () => stepLane(-1), ArrowDown: () => stepLane(1),
    Enter: () => selected && moves.visit(momentOf(selected.item)),
    "+": () => moves.zoom(0.5), "=": () => moves.zoom(0.5), "-": () => moves.zoom(2), 0: moves.all,
    Escape: () => moves.visit(null),
  };
  if (!acts[event.key]) return;
  event.preventDefault();
  acts[event.key]();
}
