// Asks the server for what is shown: all of it, or what an event says has changed, and never in a hurry.

export const STATUS_EVERY_MS = 2000;
const PAUSE_MS = 300; // between an event and the look at what it changed: many come together
const SHARE = 3; // a look that takes long is followed by so much longer a pause: the server has other things to do
const FEW = 200; // models of which all are asked for: that is one request, and no harder than some
const MOST_ALONE = 12; // of many, those that are asked for one by one
const PAGE = 1000;
const NEWEST = 40; // jobs, beside those that have not ended

export class Refresher {
  #dirty = new Set();
  #due = null;
  #tookMs = 0;
  #running = Promise.resolve();

  // `audits`: whether the ledger may be read.
  constructor(api, store, { audits = false } = {}) {
    this.api = api;
    this.store = store;
    this.audits = audits;
    store.listeners.push((event) => this.#hear(event));
    this.failed = () => {}; // called with what a look in the background met
  }

  // Asks for everything, one thing after the other: what comes later is at least as new.
  async everything(signal) {
    const position = await this.models(signal);
    await this.jobs(signal);
    await this.nodes(signal);
    await this.status(signal);
    if (this.audits) await this.#start(signal);
    return position;
  }

  #hear(event) {
    if (event.type === "ServerStarted") this.store.started = event;
    if (event.type === "LoadFailed") this.store.failures.delete(event.model_id); // by another job than the one that is known
  }

  async models(signal) {
    const models = new Map();
    let cursor = "", position = null;
    do {
      const page = await this.api.get(`/api/v1/models?limit=${PAGE}&cursor=${encodeURIComponent(cursor)}`, { signal });
      for (const model of page.models) models.set(model.id, model);
      position ??= page.as_of; // of the first page: what follows may have been missed by it
      cursor = page.next_cursor;
    } while (cursor);
    this.store.models = models;
    this.store.advance(position);
    this.store.changed();
    return position;
  }

  async jobs(signal) {
    const found = new Map();
    for (const status of ["pending", "in_progress", null]) {
      const query = status ? `status=${status}&limit=${PAGE}` : `limit=${NEWEST}`;
      const page = await this.api.get(`/api/v1/jobs?${query}`, { signal });
      for (const job of page.jobs) found.set(job.id, job);
    }
    this.store.jobs = [...found.values()];
    const unfinished = new Set(this.store.jobs.filter((job) => job.finished_at === null).map((job) => job.id));
    for (const id of this.store.stages.keys()) if (!unfinished.has(id)) this.store.stages.delete(id);
    await this.#failures(signal);
    this.store.changed();
  }

  // Finds, for each model that failed, the job that did: who asked for it is said for as long as it is so.
  async #failures(signal) {
    const { failures, jobs, models } = this.store;
    for (const id of failures.keys()) if (!models.get(id)?.error) failures.delete(id);
    for (const job of jobs.toReversed()) if (job.status === "failed" && models.get(job.model_id)?.error) failures.set(job.model_id, job);
    const unknown = () => [...models.values()].filter((model) => model.error && !failures.has(model.id));
    if (unknown().length > MOST_ALONE) {
      const page = await this.api.get(`/api/v1/jobs?status=failed&limit=${PAGE}`, { signal });
      for (const job of page.jobs.toReversed()) if (models.get(job.model_id)?.error) failures.set(job.model_id, job);
    }
    for (const { id } of unknown().slice(0, MOST_ALONE)) {
      const page = await this.api.get(`/api/v1/jobs?model=${encodeURIComponent(id)}&status=failed&limit=1`, { signal });
      failures.set(id, page.jobs[0] ?? null);
    }
  }

  // Asks how the server started last: whether it had ended in order.
  async #start(signal) {
    try {
      const page = await this.api.get(`/api/v1/events?type=ServerStarted&before=${Number.MAX_SAFE_INTEGER}&limit=1`, { signal });
      this.store.started = page.events[0] ?? null;
      this.store.changed();
    } catch (error) {
      if (error.code !== "forbidden") throw error; // the token said more than the server grants
    }
  }

  async resources(signal) {
    this.store.resources = await this.api.get("/api/v1/resources", { signal });
    this.store.advance(this.store.resources.as_of);
    this.store.changed();
  }

  async nodes(signal) {
    this.store.nodes = (await this.api.get("/api/v1/nodes", { signal })).nodes;
    this.store.changed();
  }

  // Asks for memory, and for whether what is in flight is answered.
  async status(signal) {
    await this.resources(signal);
    if (this.store.nodes.length) await this.nodes(signal); // their leases are no events
    const isBusy = this.store.resources.models.some((use) => use.in_flight > 0); // else nothing can be stuck
    const statistics = isBusy ? (await this.api.get("/v2/models/stats", { signal })).model_stats : [];
    this.store.stalls = findStalls(this.store.stalls, this.store.resources, statistics);
    this.store.changed();
  }

  // Looks, soon, at what an event is about.
  soon(modelId) {
    if (modelId) this.#dirty.add(modelId);
    this.#due ??= setTimeout(() => {
      this.#due = null;
      this.#running = this.#running.then(() => this.#catchUp()).catch((error) => this.failed(error));
    }, Math.max(PAUSE_MS, SHARE * this.#tookMs));
  }

  async #catchUp() {
    const began = performance.now();
    const dirty = [...this.#dirty];
    this.#dirty.clear();
    if (dirty.length && (this.store.models.size <= FEW || dirty.length > MOST_ALONE)) await this.models();
    else for (const id of dirty) await this.#model(id);
    await this.jobs();
    if (this.store.nodes.length) await this.nodes();
    await this.resources();
    this.#tookMs = Math.min(1000, performance.now() - began);
  }

  async #model(id) {
    try {
      const model = await this.api.get(`/api/v1/models/${encodeURIComponent(id)}`);
      this.store.models.set(id, model);
      if (model.active) for (const other of this.store.models.values()) other.active = other.id === id;
    } catch (error) {
      if (error.code !== "unknown_model") throw error;
      this.store.models.delete(id);
    }
    this.store.changed();
  }
}

// Finds loads that have requests in flight and have answered none since the last time. Returns how much each has
// answered, and since when those have not, by job.
export function findStalls(before, resources, statistics, now = Date.now()) {
  const counts = new Map(statistics.map((entry) => [`${entry.name}/${entry.version}`, countOf(entry)]));
  const since = new Map();
  for (const use of resources.models) {
    const key = `${use.model_id}/${use.version}`;
    const answered = counts.has(key) && before?.counts.has(key) && counts.get(key) !== before.counts.get(key);
    if (use.in_flight > 0 && use.phase === "serving" && !answered) since.set(use.job_id, before?.since.get(use.job_id) ?? now);
  }
  return { counts, since };
}

const countOf = ({ inference_stats: { success, fail } }) => success.count + fail.count;
