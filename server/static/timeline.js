// The timeline: a lane for each model over a range of time, from the server's summary of it. The range is in the
// page's address; a click or Enter shows the models as of that moment.

import { errorText, Latest } from "./api.js";
import { byId, setAttribute, setText, show, showText } from "./dom.js";
import { count, moment, serverNow, zone } from "./format.js";
import { drawAxis, drawRows, fillLegend, fillTable, itemsOf, serverLanes } from "./lanes.js";
import { Pointer } from "./pointer.js";
import { clampSpan, DAY, HOUR, LEAST, MINUTE, rangeText, Scale, SECOND, ticks, YEAR } from "./timescale.js";

const PAGE = 25; // lanes: what can be read at once, and what the server sums up in a third of a second
const PAUSE_MS = 150; // a range that is still being moved is asked for where it rests
const CALM_MS = 1000; // between two looks at what events changed
const SHARE = 3; // a look that takes long is followed by so much longer a pause
const SPANS = { minute: MINUTE, hour: HOUR, day: DAY, month: 30 * DAY, year: YEAR };
const SHAPES = [["loaded", "loaded"], ["waiting", "waiting"], ["loading", "loading"], ["unloading", "unloading"], ["lost", "lost"],
  ["failed", "failed"], ["several", "several changes"], ["swapped", "swapped"], ["exited", "a worker ended"], ["down", "no server"]];

export class Timeline {
  #range = { live: true, span: DAY, auto: true }; // or {live: true, span: null} for all, or {from, to}
  #page = null;
  #lanes = [];
  #down = [];
  #cursors = [""]; // of the pages up to the present one
  #at = null; // the moment that is shown as of, in milliseconds
  #latest = new Latest();
  #due = null;
  #tookMs = 0;
  #upto = -1; // the position that the last answer reflects, or is asked for
  #address = null; // the query of the range that was written into the address last
  #width = 600;
  #drawnAt = 0;

  // `visit` shows the models as of a time; null is now.
  constructor(api, store, router, visit) {
    Object.assign(this, { api, store, router });
    fillLegend(byId("timeline-legend"), SHAPES);
    this.#listen();
    this.pointer = new Pointer({
      lanes: () => this.#lanes, scale: () => this.#scale(), draw: () => this.#draw(), visit, router,
      zoom: (factor, about) => this.#zoom(factor, about), pan: (share) => this.#pan(share),
      window: (from, to) => this.#showRange(from, to), all: () => this.#set({ live: true, span: null }),
    });
    show(byId("timeline"), true);
    new ResizeObserver(() => this.#measure()).observe(byId("timeline-axis").parentElement);
    router.watch(({ query }) => this.#readAddress(query));
    store.watch(() => this.#onStoreChange());
  }

  // Marks the moment that is shown as of; null is now.
  mark(time) {
    this.#at = time;
    this.#draw();
  }

  #listen() {
    for (const [name, span] of Object.entries(SPANS)) byId(`timeline-${name}`).addEventListener("click", () => this.#showLast(span));
    byId("timeline-all").addEventListener("click", () => this.#set({ live: true, span: null }));
    byId("timeline-in").addEventListener("click", () => this.#zoom(0.5));
    byId("timeline-out").addEventListener("click", () => this.#zoom(2));
    byId("timeline-earlier").addEventListener("click", () => this.#pan(-0.5));
    byId("timeline-later").addEventListener("click", () => this.#pan(0.5));
    byId("timeline-now").addEventListener("click", () => this.#showLast(this.#bounds().to - this.#bounds().from));
    byId("timeline-find").addEventListener("input", () => this.#turnPage([""]));
    byId("timeline-next").addEventListener("click", () => this.#turnPage([...this.#cursors, this.#page.next_cursor]));
    byId("timeline-previous").addEventListener("click", () => this.#turnPage(this.#cursors.slice(0, -1)));
    byId("timeline-text").addEventListener("toggle", () => this.#draw());
  }

  // The range that is shown, in milliseconds.
  #bounds() {
    const { live, span, auto, from, to } = this.#range;
    if (!live) return { from, to };
    const now = serverNow(), first = this.#page?.known_from ? Date.parse(this.#page.known_from) : now - MINUTE;
    const begin = span === null ? first : auto ? Math.max(now - span, first) : now - span;
    return { from: Math.min(begin, now - LEAST), to: now };
  }

  #scale() {
    const { from, to } = this.#bounds();
    return new Scale(from, to, this.#width);
  }

  #measure() {
    const width = Math.floor(byId("timeline-axis").parentElement.getBoundingClientRect().width);
    if (width === 0 || width === this.#width) return;
    this.#width = width;
    this.#draw();
    this.#schedule(PAUSE_MS);
  }

  // Ranges.

  #readAddress(query) {
    const address = JSON.stringify([query.from, query.to, query.last]);
    if (address === this.#address) return;
    this.#address = address;
    const [from, to] = [Date.parse(query.from), Date.parse(query.to)];
    if (to - from >= 1) this.#range = { live: false, from, to };
    else if (query.last === "all") this.#range = { live: true, span: null };
    else if (Number(query.last) > 0) this.#range = { live: true, span: clampSpan(Number(query.last) * SECOND) };
    else this.#range = { live: true, span: DAY, auto: true };
    this.#draw();
    this.#schedule(0);
  }

  #set(range) {
    this.#range = range;
    const { live, span, from, to } = range;
    const query = live ? { last: span === null ? "all" : Math.round(span / SECOND), from: null, to: null } : { last: null, from: iso(from), to: iso(to) };
    this.#address = JSON.stringify([query.from ?? undefined, query.to ?? undefined, query.last == null ? undefined : String(query.last)]);
    const { view, id } = this.router.now;
    this.router.replace(view || "ledger", id, query);
    this.#draw();
    this.#schedule(PAUSE_MS);
  }

  #showLast(span) {
    this.#set({ live: true, span: clampSpan(span) });
  }

  // Zooms about a moment, by default the one that is shown as of or chosen, else the end of a live range.
  #zoom(factor, about = null) {
    const { from, to } = this.#bounds(), span = clampSpan((to - from) * factor);
    const chosen = about ?? this.pointer.chosen()?.item.from ?? this.#at;
    if (this.#range.live && (chosen === null || chosen < from || chosen > to)) return this.#showLast(span);
    const center = chosen !== null && chosen >= from && chosen <= to ? chosen : (from + to) / 2;
    const begin = center - ((center - from) / (to - from)) * span;
    this.#showRange(begin, begin + span);
  }

  #pan(share) {
    const { from, to } = this.#bounds(), by = (to - from) * share;
    this.#showRange(from + by, to + by);
  }

  // Shows a range; one that reaches the present is live again.
  #showRange(from, to) {
    const now = serverNow();
    if (to >= now) this.#showLast(to - from);
    else this.#set({ live: false, from: Math.round(from), to: Math.round(to) });
  }

  #turnPage(cursors) {
    this.#cursors = cursors;
    byId("timeline-plot").scrollTop = 0;
    this.#schedule(PAUSE_MS);
  }

  // Answers.

  // Moves the right edge of a live range along, once that is a pixel, and asks for what events have changed.
  #onStoreChange() {
    const { from, to } = this.#bounds();
    if (this.#range.live && !document.hidden && serverNow() - this.#drawnAt >= (to - from) / this.#width) this.#draw();
    if (!this.#range.live || this.store.head <= this.#upto || this.#due !== null || this.#latest.isBusy) return;
    this.#schedule(Math.max(CALM_MS, SHARE * this.#tookMs));
  }

  #schedule(pauseMs) {
    clearTimeout(this.#due);
    this.#due = setTimeout(() => this.#load(), pauseMs);
  }

  async #load() {
    this.#due = null;
    const began = performance.now(), { live, span, to } = this.#range, isFirst = this.#page === null;
    const query = new URLSearchParams({ limit: PAGE, resolution: Math.min(2000, Math.max(100, this.#width)), active: "true",
      cursor: this.#cursors.at(-1), find: byId("timeline-find").value.trim() });
    if (!live) query.set("to", iso(to));
    const begin = live && isFirst ? serverNow() - span : this.#bounds().from;
    if (span !== null) query.set("from", iso(begin));
    this.#upto = this.store.head;
    await this.#latest.request((signal) => this.api.get(`/api/v1/timeline?${query}`, { signal }), (page) => {
      this.#setPage(page);
      showText(byId("timeline-refusal"), "");
      if (isFirst && this.#bounds().from > begin + SECOND) this.#schedule(0); // the ledger is shorter: what was merged can be drawn apart
    }, (error) => showText(byId("timeline-refusal"), errorText(error)));
    if (!this.#latest.isBusy) this.#tookMs = Math.min(2000, performance.now() - began);
    this.#draw();
  }

  #setPage(page) {
    this.#page = page;
    this.#upto = Math.max(this.#upto, page.as_of);
    this.#lanes = [...serverLanes(page), ...page.lanes].map((lane) => ({ ...lane, items: itemsOf(lane) }));
    this.#down = page.server.filter((each) => each.state !== "running").map((each) => [Date.parse(each.from), Date.parse(each.to)]);
  }

  // Drawing.

  #draw() {
    const scale = this.#scale(), now = serverNow();
    this.#drawnAt = now;
    setText(byId("timeline-range"), `${rangeText(scale.from, scale.to)} ${zone(new Date(scale.to))}${this.#range.live ? ", live" : ""}`);
    for (const [name, span] of Object.entries(SPANS)) setAttribute(byId(`timeline-${name}`), "aria-pressed", String(Math.abs(scale.to - scale.from - span) < SECOND));
    setAttribute(byId("timeline-all"), "aria-pressed", String(this.#range.live && this.#range.span === null));
    byId("timeline-in").disabled = scale.to - scale.from <= LEAST;
    byId("timeline-later").disabled = byId("timeline-now").disabled = this.#range.live;
    drawAxis(byId("timeline-axis"), scale, ticks(scale), { at: this.#ifShown(this.#at, scale), now: this.#range.live ? null : now });
    if (this.#page === null) return;
    const until = this.#range.live ? now : Math.min(scale.to, now), end = Date.parse(this.#page.to) - 1;
    const hrefOf = (id) => this.router.href("models", id);
    drawRows(byId("timeline-rows"), this.#lanes, scale, { hrefOf, down: this.#down.map(([from, to]) => [from, to >= end ? until : to]), until, end, selected: this.pointer.selected });
    this.#drawCursor(scale);
    this.#drawTexts();
  }

  #ifShown(time, scale) {
    return time !== null && time >= scale.from && time <= scale.to ? time : null;
  }

  #drawCursor(scale) {
    const line = byId("timeline-cursor"), at = this.#ifShown(this.#at, scale);
    show(line, at !== null);
    if (at === null) return;
    line.style.left = `${byId("timeline-axis").parentElement.offsetLeft + scale.x(at)}px`;
    line.style.height = `${byId("timeline-rows").offsetHeight}px`;
  }

  #drawTexts() {
    const page = this.#page, shown = page.lanes.length, before = (this.#cursors.length - 1) * PAGE;
    const find = byId("timeline-find").value.trim();
    setText(byId("timeline-count"), page.models ? count(page.models, "model") : "");
    showText(byId("timeline-none"), shown ? "" : find ? "No model of this range matches." : "No model was asked for in this range. Its lane begins with its first load.");
    const archived = page.oldest > 1 && page.known_from !== null && Date.parse(page.known_from) > this.#bounds().from;
    showText(byId("timeline-archived"), [archived ? `Earlier events are archived: the timeline knows from ${moment(page.known_from)} on.` : "",
      page.marks_from !== null ? `There are too many failures to mark all: marks begin at ${moment(page.marks_from)}.` : ""].filter(Boolean).join(" "));
    show(byId("timeline-pages"), this.#cursors.length > 1 || page.next_cursor !== null);
    setText(byId("timeline-page"), `${before + 1} to ${before + shown} of ${page.models}`);
    byId("timeline-previous").disabled = this.#cursors.length < 2;
    byId("timeline-next").disabled = page.next_cursor === null;
    if (byId("timeline-text").open) fillTable(byId("timeline-table"), this.#lanes);
  }
}

const iso = (time) => new Date(time).toISOString();
