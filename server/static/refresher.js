// Fetches what is shown: all of it, or, debounced, what an event says has changed.

export const STATUS_EVERY_MS = 2000;
const PAUSE_MS = 300; // between an event and the look at what it changed: many come together
const SHARE = 3; // a look that takes long is followed by so much longer a pause: the server has other things to do
const FEW = 200; // models of which all are asked for: that is one request, and no harder than some
const MOST_ALONE = 12; // of many, those that are asked for one by one
const PAGE = 1000;
const NEWEST = 40; // jobs, beside those that have not ended

export class Refresher {
  #changedModels = new Set();
  #due = null;
  #tookMs = 0;
  #running = Promise.resolve();

  // `audits`: whether the ledger may be read. `onError` is called with what a fetch in the background failed with.
  constructor(api, store, { audits }, onError) {
    Object.assign(this, { api, store, audits, onError });
    store.listeners.push((event) => this.#onEvent(event));
  }

  // Asks for everything, one thing after the other: what comes later is at least as new.
  async fetchAll(signal) {
    const position = await this.fetchModels(signal);
    await this.fetchJobs(signal);
    await this.fetchNodes(signal);
    await this.fetchStatus(signal);
    if (this.audits) await this.#fetchStart(signal);
    return position;
  }

  #onEvent(event) {
    if (event.type === "ServerStarted") this.store.started = event;
    if (event.type === "LoadFailed") this.store.failures.delete(event.model_id); // by another job than the one that is known
  }

  async fetchModels(signal) {
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
    this.store.notify();
    return position;
  }

  async fetchJobs(signal) {
    const found = new Map();
    for (const status of ["pending", "in_progress", null]) {
      const query = status ? `status=${status}&limit=${PAGE}` : `limit=${NEWEST}`;
      const page = await this.api.get(`/api/v1/jobs?${query}`, { signal });
      for (const job of page.jobs) found.set(job.id, job);
    }
    this.store.jobs = [...found.values()];
    const unfinished = new Set(this.store.jobs.filter((job) => job.finished_at === null).map((job) => job.id));
    for (const id of this.store.stages.keys()) if (!unfinished.has(id)) this.store.stages.delete(id);
    await this.#fetchFailures(signal);
    this.store.notify();
  }

  // Finds, for each model that failed, the job that did: who asked for it is said for as long as it is so.
  async #fetchFailures(signal) {
    const { failures, jobs, models } = this.store;
    for (const id of failures.keys()) if (!models.get(id)?.error) failures.delete(id);
    const keepFailed = (found) => {
      for (const job of found.toReversed()) if (job.status === "failed" && models.get(job.model_id)?.error) failures.set(job.model_id, job);
    };
    keepFailed(jobs);
    const unknown = [...models.values()].filter((model) => model.error && !failures.has(model.id));
    if (!unknown.length) return;
    keepFailed((await this.api.get(`/api/v1/jobs?status=failed&limit=${PAGE}`, { signal })).jobs);
    for (const { id } of unknown) if (!failures.has(id)) failures.set(id, null); // too long ago
  }

  // Asks how the server started last: whether it had ended in order.
  async #fetchStart(signal) {
    try {
      const page = await this.api.get(`/api/v1/events?type=ServerStarted&before=${Number.MAX_SAFE_INTEGER}&limit=1`, { signal });
      this.store.started = page.events[0] ?? null;
      this.store.notify();
    } catch (error) {
      if (error.code !== "forbidden") throw error; // the token said more than the server grants
    }
  }

  async fetchResources(signal) {
    this.store.resources = await this.api.get("/api/v1/resources", { signal });
    this.store.advance(this.store.resources.as_of);
    this.store.notify();
  }

  async fetchNodes(signal) {
    this.store.nodes = (await this.api.get("/api/v1/nodes", { signal })).nodes;
    this.store.notify();
  }

  // Asks for memory, and for whether what is in flight is answered.
  async fetchStatus(signal) {
    await this.fetchResources(signal);
    if (this.store.nodes.length) await this.fetchNodes(signal); // their leases are no events
    const isBusy = this.store.resources.models.some((use) => use.in_flight > 0); // else nothing is unanswered
    const statistics = isBusy ? (await this.api.get("/v2/models/stats", { signal })).model_stats : [];
    this.store.unanswered = findUnanswered(this.store.unanswered, this.store.resources, statistics);
    this.store.notify();
  }

  // Fetches, a little later, what an event is about.
  schedule(modelId) {
    if (modelId) this.#changedModels.add(modelId);
    this.#due ??= setTimeout(() => {
      this.#due = null;
      this.#running = this.#running.then(() => this.#catchUp()).catch((error) => this.onError(error));
    }, Math.max(PAUSE_MS, SHARE * this.#tookMs));
  }

  async #catchUp() {
    const began = performance.now();
    const changed = [...this.#changedModels];
    this.#changedModels.clear();
    if (changed.length && (this.store.models.size <= FEW || changed.length > MOST_ALONE)) await this.fetchModels();
    else for (const id of changed) await this.#fetchModel(id);
    await this.fetchJobs();
    if (this.store.nodes.length) await this.fetchNodes();
    await this.fetchResources();
    this.#tookMs = Math.min(1000, performance.now() - began);
  }

  async #fetchModel(id) {
    try {
      const model = await this.api.get(`/api/v1/models/${encodeURIComponent(id)}`);
      this.store.models.set(id, model);
      if (model.active) for (const other of this.store.models.values()) other.active = other.id === id;
    } catch (error) {
      if (error.code !== "unknown_model") throw error;
      this.store.models.delete(id);
    }
    this.store.notify();
  }
}

// Finds loads that have requests in flight and have answered none since the last time. Returns how much each has
// answered, and since when those have not, by job.
export function findUnanswered(before, resources, statistics, now = Date.now()) {
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
