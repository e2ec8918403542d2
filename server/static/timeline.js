// The page of the timeline: a lane for each model over a range of time, and the models as of a moment of it. Range and
// moment are in the page's address.

import { api, errorText } from "./api.js";
import { serverNow, zone } from "./format.js";
import {
  Axis, DAY, Detail, downTimes, HOUR, itemAt, Lane, lanesOf, LaneTable, Legend, LONGEST, MINUTE, Patterns, rangeText, Scale, SECOND,
  SHORTEST, YEAR,
} from "./lanes.js";
import { address, replace } from "./router.js";
import { head, now } from "./state.js";
import { AsOf, timeOf, useMoment, useResting } from "./timetravel.js";
import { html, PageHead, Refusal, useEffect, useLayoutEffect, useMemo, useRef, useRequest, useState } from "./ui.js";

const PAGE = 25; // lanes: what can be read at once
const CALM_MS = 1000; // between two requests for what events have changed
const REACH = 7; // pixels around a mark that mean it
const SPANS = { minute: MINUTE, hour: HOUR, day: DAY, month: 30 * DAY, year: YEAR };

const iso = (time) => new Date(time).toISOString();
const clampSpan = (span) => Math.min(LONGEST, Math.max(SHORTEST, span));

export function TimelinePage() {
  const { id, query } = address.value;
  const [width, axis] = useWidth();
  const range = rangeOf(query);
  const [find, setFind] = useResting(query.find ?? "", (text) => setQuery({ find: text }));
  const [cursors, setCursors] = useState([""]); // of the pages up to the present one
  const [chosen, setChosen] = useState(null), [isOpen, setOpen] = useState(false); // {lane, key} of an item; the table
  useEffect(() => setCursors([""]), [query.find]);
  const past = useMoment(id), at = timeOf(id, past.answer);
  const { page, error } = useTimeline(range, query.find ?? "", cursors.at(-1));
  const lanes = useMemo(() => (page ? lanesOf(page) : []), [page]);
  const bounds = boundsOf(range, page, steadyNow(range, page, width)), { from, to } = bounds;
  const scale = useMemo(() => new Scale(from, to, width), [from, to, width]);
  const selected = itemOf(lanes, chosen), moves = movesOf(range, bounds, selected?.item.from ?? at);
  const choose = (lane, item) => setChosen(item && { lane: lane.id, key: item.key });
  const view = { page, lanes, scale, axis, at, chosen, choose, moves, isLive: range.live };
  return html`
    <${PageHead} title="Timeline">
      <p id="timeline-range" class="figures">${rangeText(from, to)} ${zone(new Date(to))}${range.live ? ", live" : ""}</p>
    <//>
    <section id="timeline" class="panel timeline" aria-label="Timeline">
      <${Controls} range=${range} bounds=${bounds} moves=${moves} find=${find} setFind=${setFind} />
      <${Refusal} text=${error && errorText(error)} />
      <${Plot} view=${view} />
      <${Hints} page=${page} error=${error} find=${query.find} moves=${moves} />
      <${Detail} selected=${selected} />
      <div class="foot"><${Legend} /><${Pages} page=${page} cursors=${cursors} setCursors=${setCursors} /></div>
      <details id="timeline-text" class="more" onToggle=${(event) => setOpen(event.target.open)}>
        <summary>As a table</summary>${isOpen && html`<${LaneTable} lanes=${lanes} />`}
      </details>
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
function movesOf(range, { from, to }, about) {
  const setRange = (next) => setQuery(queryOf(next));
  const last = (span) => setRange({ live: true, span: clampSpan(span) });
  // A range that reaches the present is live again.
  const show = (begin, end) => (end >= serverNow() ? last(end - begin) : setRange({ live: false, from: Math.round(begin), to: Math.round(end) }));
  const zoom = (factor) => {
    const span = clampSpan((to - from) * factor), isInside = about !== null && about >= from && about <= to;
    if (range.live && !isInside) return last(span);
    const middle = isInside ? about : (from + to) / 2, begin = middle - ((middle - from) / (to - from)) * span;
    show(begin, begin + span);
  };
  return {
    last, zoom,
    all: () => setRange({ live: true, span: null }),
    pan: (share) => show(from + (to - from) * share, to + (to - from) * share),
    visit: (moment) => replace("timeline", moment, address.value.query),
  };
}

// A page of lanes, and again what events have changed while the range ends now.
function useTimeline(range, find, cursor) {
  const ask = (signal) => {
    const query = { limit: PAGE, cursor, find: find.trim() };
    if (!range.live) Object.assign(query, { from: iso(range.from), to: iso(range.to) });
    else if (range.span !== null) query.from = iso(serverNow() - range.span);
    return api.get(`/api/v1/timeline?${new URLSearchParams(query)}`, { signal });
  };
  const { answer: page, error, again } = useRequest(ask, [JSON.stringify(range), find, cursor]);
  const isOld = range.live && page && head.value > page.as_of;
  useEffect(() => {
    if (!isOld) return undefined;
    const timer = setTimeout(again, CALM_MS);
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

function Hints({ page, error, find, moves }) {
  if (!page) return !error && html`<p class="hint">Loading…</p>`;
  const none = find ? "No model of this range matches." : "No model was asked for in this range. Its lane begins with its first load.";
  if (page.rows <= page.max_rows) return page.lanes.length === 0 && html`<p class="hint">${none}</p>`;
  const [rows, most] = [page.rows, page.max_rows].map((number) => number.toLocaleString("en"));
  return html`
    <p class="hint">There are ${rows} changes in this range, and no more than ${most} are drawn: zoom in, or name a model.${" "}
      <button type="button" onClick=${() => moves.zoom(page.max_rows / page.rows)}>Zoom in until they fit</button></p>`;
}

function Pages({ page, cursors, setCursors }) {
  const isFirst = cursors.length === 1, next = () => setCursors([...cursors, page.next_cursor]);
  if (!page || (isFirst && page.next_cursor === null)) return null;
  return html`
    <div class="pages">
      <button type="button" aria-label="Previous models" disabled=${isFirst} onClick=${() => setCursors(cursors.slice(0, -1))}>◂</button>
      <span class="figures">page ${cursors.length}</span>
      <button type="button" aria-label="Next models" disabled=${page.next_cursor === null} onClick=${next}>▸</button>
    </div>`;
}

// The axis and the lanes, with the moment that is shown as of.
function Plot({ view }) {
  const { scale, axis, at, isLive } = view, rows = useRows(view);
  const isInside = at !== null && at >= scale.from && at <= scale.to;
  return html`
    <div id="timeline-plot" class="plot-lanes" tabindex="0" role="group" aria-label="Timeline of the models"
      aria-describedby="timeline-range" onClick=${(event) => pick(event, view)}>
      <div class="lane axis"><span class="lane-name"></span>
        <span class="lane-plot" ref=${axis}><${Axis} scale=${scale} at=${at} now=${isLive ? null : serverNow()} /></span></div>
      <div id="timeline-rows" class="rows">${rows}
        ${isInside && html`<div id="timeline-cursor" class="cursor" style=${{ "--x": `${scale.x(at)}px` }}></div>`}
      </div>
    </div>`;
}

function useRows({ page, lanes, scale, chosen, isLive }) {
  return useMemo(() => {
    const until = isLive ? scale.to : Math.min(scale.to, serverNow());
    const shown = { down: page ? downTimes(page, until) : [], until };
    return lanes.map((lane) => html`
      <${Lane} key=${lane.id} lane=${lane} scale=${scale} shown=${shown}
        chosenKey=${chosen?.lane === lane.id ? chosen.key : null} />`);
  }, [lanes, scale, chosen]);
}

// A click chooses the item there, and shows the models as of that time.
function pick(event, { lanes, scale, axis, choose, moves }) {
  const row = event.target.closest(".lane"), x = event.clientX - axis.current.getBoundingClientRect().left;
  if (!row || x < 0 || event.target.closest("a")) return;
  const lane = lanes.find((each) => each.id === row.dataset.model), time = scale.time(x);
  if (lane) choose(lane, itemAt(lane, time, (scale.to - scale.from) * (REACH / scale.width)));
  moves.visit(iso(Math.min(time, serverNow())));
}
