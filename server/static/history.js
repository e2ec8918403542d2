// The server's own samples of memory, requests and latencies, for the charts: of the server, and of the model whose
// page is open. They are there after a reload, too, since the server keeps them.

import { Unreachable } from "./api.js";

const EVERY_MS = 10_000; // as often as the server samples
export const RANGES = { "1h": "the last hour", "24h": "the last 24 hours" };

export class Histories {
  #asked = 0;
  #due = null;

  constructor(api, store) {
    this.api = api;
    this.store = store;
    this.range = "1h";
    this.modelId = null;
    this.server = null;
    this.model = null; // of `modelId`
    document.addEventListener("visibilitychange", () => document.hidden || this.fetch());
    this.fetch();
  }

  // Shows another range, or the history of a model; null is none.
  choose({ range = this.range, modelId = this.modelId }) {
    if (!(range in RANGES) || (range === this.range && modelId === this.modelId)) return;
    if (modelId !== this.modelId || range !== this.range) this.model = null;
    if (range !== this.range) this.server = null;
    [this.range, this.modelId] = [range, modelId];
    this.fetch();
  }

  // Asks now, and then again and again. An answer that was overtaken by another choice is dropped.
  async fetch() {
    const asked = ++this.#asked, { range, modelId } = this;
    clearTimeout(this.#due);
    if (!document.hidden) {
      const path = modelId === null ? "/api/v1/resources/history" : `/api/v1/models/${encodeURIComponent(modelId)}/history`;
      try {
        const found = await this.api.get(`${path}?range=${range}`);
        if (asked !== this.#asked) return;
        this[modelId === null ? "server" : "model"] = found;
        this.store.changed();
      } catch (error) {
        if (asked !== this.#asked) return;
        if (!(error instanceof Unreachable) && error.status === undefined) throw error;
        // The page says itself when the server is away; the charts keep what they have.
      }
    }
    this.#due = setTimeout(() => this.fetch(), EVERY_MS);
  }
}
