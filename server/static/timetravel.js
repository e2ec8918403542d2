// Time travel: the models as of a position or a time, with who had loaded which bytes.

import { errorText, Latest } from "./api.js";
import { byId, cell, h, reconcile, setAttribute, setText, show, showText, statePill, tableRow } from "./dom.js";
import { summary } from "./eventtext.js";
import { broughtBack, clock, local, moment, oneLine, zone } from "./format.js";
import { fileList } from "./models.js";

const MOST = 500; // models that are shown
const PAGE = 1000;
const PAUSE_MS = 120; // a slider that is pulled asks for where it rests
const CALM_MS = 1000; // what is now moves with each event: nobody can read that, and the server has other things to do

export class TimeTravel {
  #moment = null; // a position; null is now
  #latest = new Latest(); // a ledger that moves does not overtake it
  #due = null;
  #shown = null; // the position that is shown, or asked for
  #address = null; // the moment that the page's address has

  // `shown` is called with the moment that is shown, in milliseconds; null is now.
  constructor(api, store, router, shown) {
    Object.assign(this, { api, store, router, shown });
    const slider = byId("past-slider"), position = byId("past-position"), time = byId("past-time");
    slider.addEventListener("input", () => this.#schedule(Number(slider.value)));
    position.addEventListener("change", () => position.value !== "" && this.#schedule(Number(position.value)));
    time.addEventListener("change", () => time.value && this.visit(new Date(time.value).toISOString()));
    byId("past-back").addEventListener("click", () => this.#schedule(this.#position - 1));
    byId("past-on").addEventListener("click", () => this.#schedule(this.#position + 1));
    byId("past-now").addEventListener("click", () => this.#schedule(null));
    show(byId("past"), true);
    router.watch((address) => this.#readAddress(address));
    store.watch(() => this.#onStoreChange());
  }

  get #position() {
    return this.#moment ?? this.store.head;
  }

  // Shows a moment, a position or a time as text, and stays there; null is now.
  visit(at, { scrolls = false } = {}) {
    if (at === null) this.#schedule(null);
    else this.#show(at, { stays: true });
    if (!scrolls) return;
    byId("past").scrollIntoView({ block: "start" });
    byId("past-slider").focus({ preventScroll: true });
  }

  // Shows what the address says; what this view has written there itself, it shows already.
  #readAddress({ view, id }) {
    const at = view === "at" ? id : null;
    if (at === this.#address) return;
    this.#address = at;
    if (at !== null || this.#moment !== null) this.visit(at);
  }

  // Writes what is shown into the address: the moment, or that it is now.
  #writeAddress(at) {
    if (at === this.#address) return;
    this.#address = at;
    if (at !== null) this.router.replace("at", at);
    else if (this.router.now.view === "at") this.router.replace();
  }

  #onStoreChange() {
    const slider = byId("past-slider"), head = this.store.head;
    const first = Math.max(0, this.store.oldest - 1);
    setAttribute(slider, "min", first);
    setAttribute(slider, "max", head);
    setAttribute(byId("past-position"), "max", head);
    if (this.#moment !== null || this.#latest.isBusy || this.#due !== null || head === 0 || this.#shown === head) return;
    this.#schedule(null, this.#shown === null ? PAUSE_MS : CALM_MS);
  }

  #schedule(position, pauseMs = PAUSE_MS) {
    const head = this.store.head;
    this.#moment = position === null || position >= head ? null : Math.max(0, Math.floor(position));
    this.#drawPosition(this.#position);
    this.#shown = this.#position;
    clearTimeout(this.#due);
    this.#due = setTimeout(() => this.#show(String(this.#position)), pauseMs);
  }

  #drawPosition(position) {
    byId("past-slider").value = position;
    setAttribute(byId("past-slider"), "aria-valuetext", `position ${position} of ${this.store.head}`);
    if (document.activeElement !== byId("past-position")) byId("past-position").value = position;
    byId("past-back").disabled = position <= Math.max(0, this.store.oldest - 1);
    byId("past-on").disabled = position >= this.store.head;
  }

  #show(at, { stays = false } = {}) {
    clearTimeout(this.#due);
    this.#due = null;
    const ask = async (signal) => {
      const page = await this.#modelsAt(at, signal);
      return { page, event: await this.#eventAt(page.as_of, signal) };
    };
    this.#latest.request(ask, ({ page, event }) => {
      if (stays) this.#moment = page.as_of;
      this.#shown = page.as_of;
      this.#drawPosition(page.as_of);
      this.#draw(page, event);
      this.#writeAddress(this.#moment === null ? null : stays ? at : String(page.as_of));
      const time = Date.parse(at) > 0 && !/^\d+$/.test(at) ? at : page.as_of_time; // a time may be long after the event
      this.shown(this.#moment === null || !time ? null : Date.parse(time));
      showText(byId("past-refusal"), "");
    }, (error) => showText(byId("past-refusal"), errorText(error)));
  }

  // The event at a position; null before all events, and where it is archived: what was so then is known all the same.
  async #eventAt(position, signal) {
    if (position === 0) return null;
    try {
      return (await this.api.get(`/api/v1/events?after=${position - 1}&limit=1`, { signal })).events[0];
    } catch (error) {
      if (error.code !== "archived") throw error;
      return null;
    }
  }

  // All models of a moment, those first that were more than known of.
  async #modelsAt(at, signal) {
    const ask = (moment, cursor) => this.api.get(`/api/v1/models?limit=${PAGE}&at=${encodeURIComponent(moment)}&cursor=${encodeURIComponent(cursor)}`, { signal });
    const first = await ask(at, ""), models = [...first.models];
    for (let cursor = first.next_cursor; cursor; ) {
      const page = await ask(first.as_of, cursor);
      models.push(...page.models);
      cursor = page.next_cursor;
    }
    models.sort((a, b) => (a.state === "unloaded") - (b.state === "unloaded"));
    return { ...first, models };
  }

  #draw(page, event) {
    const now = this.#moment === null;
    setText(byId("past-when"), page.as_of === 0 ? "before everything" : `position ${page.as_of}${page.as_of_time ? `, ${moment(page.as_of_time)}` : ""}${now ? ", which is now" : ""}${absence(page.server)}`);
    byId("past").classList.toggle("then", !now);
    setText(byId("past-zone"), zone(new Date(page.as_of_time ?? Date.now())));
    if (page.as_of_time && document.activeElement !== byId("past-time")) byId("past-time").value = local(new Date(page.as_of_time));
    setText(byId("past-event"), event ? `Here: ${oneLine([event.type, event.model_id, event.version, `by ${event.actor}`].filter((part) => part != null).join(" "), 300)}${summary(event) ? `, ${summary(event)}` : ""}` : "");
    setText(byId("past-nodes"), nodesText(page.nodes ?? []));
    reconcile(byId("past-rows"), page.models.slice(0, MOST), pastRow);
    const more = page.models.length - MOST;
    showText(byId("past-none"), more > 0 ? `And ${more} more.` : page.models.length ? "" : "The ledger had no model at that time.");
  }
}

// What is to be said of the server, where it did not run or nobody knows.
function absence(server) {
  if (!server || server.state === "running") return "";
  const state = server.state === "unknown" ? "whether the server ran is unknown" : "the server was stopped";
  return `; ${state}${server.since ? ` since ${clock(server.since)}` : ""}`;
}

// The nodes that were there, and those that were lost.
function nodesText(nodes) {
  const there = nodes.filter((node) => node.state !== "left").map((node) => {
    const state = { joined: "", draining: " draining", lost: " lost", unknown: " not seen" }[node.state];
    return `${oneLine(node.id, 130)}${state}${state && node.since ? ` since ${clock(node.since)}` : ""}`;
  });
  return there.length ? `Nodes: ${there.join(", ")}` : "";
}

function pastRow(first) {
  const pill = statePill(), version = cell("Version"), by = cell("Loaded by"), files = fileList();
  const row = tableRow([h("span", { class: "name" }, first.id)], cell("State", null, pill), version, by, cell("Which bytes", "hashes", files));
  row.update = (model) => {
    pill.update(model.state);
    setText(version, model.version == null ? "–" : String(model.version));
    setText(by, model.loaded_by ? `${oneLine(model.loaded_by, 130)}, ${clock(model.loaded_at)}${broughtBack(model)}${model.node ? ` at ${oneLine(model.node, 130)}` : ""}` : "–");
    files.update(model.files);
  };
  return row;
}
