// The ledger: its newest events, those that are asked for, and each as it was hashed; live while it follows.

import { errorText, Latest } from "./api.js";
import { byId, h, reconcile, setText, show, showText } from "./dom.js";
import { summary, toneOf, TYPES } from "./eventtext.js";
import { clock, oneLine, plain } from "./format.js";

const PAGE = 50;
const MOST = 400; // that are kept on the page, while nobody asks for older ones
const MOST_ASKED = 4000;

export class Ledger {
  #events = new Map(); // by position
  #cursor = null; // where the older ones begin
  #epoch = null;
  #filters = {};
  #latest = new Latest();
  #most = MOST;
  #upto = 0; // as of which position it was asked for last

  // `visit` shows the models as of a position.
  constructor(api, store, visit) {
    Object.assign(this, { api, store, visit });
    byId("ledger-type").append(...TYPES.map((type) => h("option", {}, type)));
    byId("ledger-filters").addEventListener("submit", (event) => (event.preventDefault(), this.#readFilters()));
    byId("ledger-type").addEventListener("change", () => this.#readFilters());
    byId("ledger-clear").addEventListener("click", () => (byId("ledger-filters").reset(), this.#readFilters()));
    byId("ledger-older").addEventListener("click", () => this.#loadOlder());
    byId("ledger-follow").addEventListener("change", (event) => event.target.checked && this.#load());
    store.listeners.push((event) => this.#onEvent(event));
    show(byId("ledger"), true);
    store.watch(() => this.#draw());
  }

  #onEvent(event) {
    if (byId("ledger-follow").checked && this.#matches(event)) this.#events.set(event.position, event);
  }

  #matches(event) {
    const { type, model, actor, job } = this.#filters;
    return (!type || event.type === type) && (!model || event.model_id === model) && (!actor || event.actor === actor) && (!job || event.job_id === job);
  }

  // Shows the events of the job with this id; of all jobs, if it is empty.
  showJob(jobId, { scrolls = false } = {}) {
    byId("ledger-filters").reset();
    byId("ledger-job").value = jobId;
    this.#readFilters();
    if (scrolls) byId("ledger").scrollIntoView({ block: "nearest" });
  }

  #readFilters() {
    const names = ["type", "model", "actor", "job"];
    this.#filters = Object.fromEntries(names.map((name) => [name, byId(`ledger-${name}`).value.trim()]).filter(([, value]) => value));
    this.#load();
  }

  #loadOlder() {
    this.#most = Math.max(MOST, Math.min(MOST_ASKED, this.#events.size + PAGE));
    this.#load(this.#cursor);
  }

  // Asks for the newest events, or those before a position.
  async #load(before = null) {
    if (before === null) [this.#upto, this.#most] = [this.store.head, MOST];
    const query = new URLSearchParams({ ...this.#filters, before: before ?? Number.MAX_SAFE_INTEGER, limit: PAGE });
    await this.#latest.request((signal) => this.api.get(`/api/v1/events?${query}`, { signal }), (page) => {
      if (before === null) {
        const since = [...this.#events.values()].filter((event) => event.position > page.as_of && this.#matches(event));
        this.#events = new Map(since.map((event) => [event.position, event]));
      }
      for (const event of page.events) this.#events.set(event.position, event);
      this.#cursor = page.next_cursor;
      this.store.oldest = page.oldest;
      this.store.advance(page.as_of);
      showText(byId("ledger-refusal"), "");
    }, (error) => showText(byId("ledger-refusal"), errorText(error)));
    this.#draw();
  }

  #draw() {
    if (this.#epoch !== this.store.epoch) {
      this.#epoch = this.store.epoch;
      if (this.#epoch > 0) this.#load();
    } else if (this.store.connection.mode === "polled" && byId("ledger-follow").checked && this.store.head > this.#upto) {
      this.#load(); // no stream tells it
    }
    const events = [...this.#events.values()].sort((a, b) => b.position - a.position);
    for (const event of events.splice(this.#most)) {
      this.#events.delete(event.position);
      this.#cursor = Math.max(this.#cursor ?? 0, event.position + 1);
    }
    reconcile(byId("ledger-list"), events, (event) => this.#item(event), (event) => event.position);
    setText(byId("ledger-count"), this.store.head ? `${this.store.head.toLocaleString("en")} events` : "");
    show(byId("ledger-none"), events.length === 0 && this.#cursor === null);
    show(byId("ledger-older"), this.#cursor !== null && events.length < MOST_ASKED);
  }

  #item(event) {
    const subject = event.model_id ? `${event.model_id}${event.version == null ? "" : ` ${event.version}`}` : "";
    const line = h("summary", {},
      h("span", { class: "position" }, String(event.position)), " ",
      h("time", { datetime: event.recorded_at, title: event.recorded_at }, clock(event.recorded_at)), " ",
      h("strong", { class: toneOf(event) }, oneLine(event.type, 60)), " ",
      h("span", {}, oneLine(subject, 160)), " ", h("span", { class: "dim" }, `by ${oneLine(event.actor, 130)}`), " ",
      h("span", { class: "says" }, summary(event)));
    const text = h("pre", { tabindex: "0", role: "group", "aria-label": `Event ${event.position}, as it was hashed` });
    const then = h("button", { type: "button", onclick: () => this.visit(event.position) }, "Look at this moment");
    const node = h("details", {}, line, text, then);
    node.addEventListener("toggle", () => node.open && text.textContent === "" && this.#showText(event.position, text));
    return h("li", { class: "event", "data-position": event.position }, node);
  }

  // Shows an event's very text: read into numbers and written again, some would be rounded.
  async #showText(position, node) {
    try {
      const page = await this.api.text(`/api/v1/events?after=${position - 1}&limit=1`);
      setText(node, plain(page.slice('{"events":['.length, page.lastIndexOf('],"as_of"')), 100_000));
    } catch (error) {
      setText(node, errorText(error));
    }
  }
}
