// Operations that change something. Each is one request; a notice reports the outcome of its job.

import { requestErrorText } from "./api.js";
import { notice } from "./dom.js";
import { duration, oneLine, secondsSince } from "./format.js";
import { hasEnded } from "./store.js";

export class Operations {
  #pending = new Map(); // by job: what to say when it has ended, in place of what was said when it was accepted

  constructor(api, store, refresher) {
    Object.assign(this, { api, store, refresher });
    store.watch(() => this.#noticeEnded());
  }

  // Throws what the server refuses with: who asks in a dialog is told there.
  async load(modelId, body) {
    await this.#request(`/api/v1/models/${encodeURIComponent(modelId)}/load`, body, `Load of ${modelId}`);
  }

  async unload(modelId, force) {
    const query = force ? "?force=true" : "";
    await this.#request(`/api/v1/models/${encodeURIComponent(modelId)}/unload${query}`, undefined, `${force ? "Forced unload" : "Unload"} of ${modelId}`);
  }

  // A load of what serves with another `pinned` changes that and nothing else: it is not loaded again.
  async pin(model, pinned) {
    const what = `${pinned ? "Pinning" : "Unpinning"} of ${model.id}`;
    await this.#orNotice(this.#request(`/api/v1/models/${encodeURIComponent(model.id)}/load`, { version: model.version, pinned }, what));
  }

  async cancel(job) {
    await this.#orNotice(this.#request(`/api/v1/jobs/${encodeURIComponent(job.id)}/cancel`, undefined, `Cancelling the ${job.kind} of ${job.model_id}`));
  }

  // Throws what the server refuses with, too.
  async drain(node) {
    const { status } = await this.api.post(`/api/v1/nodes/${encodeURIComponent(node.id)}/drain`);
    notice(status === 200 ? `${node.id} is draining already.` : `${node.id} drains: it takes no more loads.`);
    await this.refresher.fetchNodes();
  }

  async #request(path, body, what) {
    const { status, answer: job } = await this.api.post(path, body);
    if (status === 200 && hasEnded(job)) notice(`${what}: ${job.kind === "load" && !job.started_at ? "done" : "nothing to do, it is so already"}.`);
    else {
      this.#pending.set(job.id, { what, withdraw: notice(`${what} is accepted.`) });
    }
    this.refresher.schedule(job.model_id);
  }

  async #orNotice(asked) {
    try {
      await asked;
    } catch (error) {
      notice(requestErrorText(error), "bad");
    }
  }

  #noticeEnded() {
    for (const job of this.store.jobs) {
      if (!this.#pending.has(job.id) || !hasEnded(job)) continue;
      const { what, withdraw } = this.#pending.get(job.id);
      this.#pending.delete(job.id);
      withdraw(); // its outcome takes its place
      const took = duration(secondsSince(job.created_at, Date.parse(job.finished_at)));
      if (job.status === "completed") notice(`${what} completed in ${took}.`);
      else notice(`${what} ${job.status}${job.error ? `: ${oneLine(job.error.message)}` : "."}`, job.status === "failed" ? "bad" : "good");
    }
  }
}
