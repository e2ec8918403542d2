// The page's state, in one place. Views are notified of changes, ten times a second at most.

const PAUSE_MS = 100; // between two looks: a thousand events a second are still ten

export class Store {
  #views = [];
  #due = null;
  #uses = new Map(); // by model, of the resources below
  #usesFrom = null;

  constructor() {
    this.models = new Map(); // by id, as the API has them
    this.nodes = []; // that share the ledger; none of a server alone
    this.jobs = []; // unfinished ones, then the newest
    this.failures = new Map(); // by model that failed: the last job that did
    this.started = null; // the last ServerStarted, for those who may read the ledger
    this.stages = new Map(); // by job: what the stream said since the jobs were asked for
    this.subject = null; // the model whose page is open
    this.readOnly = false; // whether the server has refused to add a version
    this.resources = null;
    this.unanswered = null; // loads whose requests get no answer: see findUnanswered
    this.head = 0; // the highest position that is known of
    this.oldest = 1; // the lowest position that is not archived
    this.epoch = 0; // changes where the ledger that was shown has to be looked at anew
    this.connection = { mode: "connecting", since: Date.now(), why: "", retryAt: null };
    this.heardAt = Date.now(); // when the server said something last
    this.listeners = []; // each is told every event of the stream, with the text that came
  }

  // Has `view` called now, and after each change.
  watch(view) {
    this.#views.push(view);
    view();
  }

  notify() {
    this.#due ??= setTimeout(() => {
      this.#due = null;
      callEach(this.#views);
    }, PAUSE_MS);
  }

  connect(mode, why = "", retryAt = null) {
    const same = this.connection.mode === mode;
    this.connection = { mode, why, retryAt, since: same ? this.connection.since : Date.now() };
    this.notify();
  }

  advance(position) {
    this.heardAt = Date.now();
    if (position > this.head) this.head = position;
  }

  onEvent(event) {
    this.advance(event.position);
    for (const listener of this.listeners) listener(event);
    this.notify();
  }

  // A job with its latest stage laid over it.
  jobsNow() {
    return this.jobs.map((job) => (hasEnded(job) ? job : { ...job, ...this.stages.get(job.id) }));
  }

  // What the processes of a model use together: two loads while one takes the other's place. `serving` is the one of
  // the load that answers.
  useOf(model) {
    if (this.#usesFrom !== this.resources) {
      this.#usesFrom = this.resources;
      this.#uses = Map.groupBy(this.resources?.models ?? [], (use) => use.model_id);
    }
    const uses = this.#uses.get(model.id) ?? [], sum = (name) => uses.reduce((total, use) => total + use[name], 0);
    return {
      processes: uses.length,
      serving: uses.find((use) => use.job_id === model.job_id),
      memory_bytes: sum("memory_bytes"),
      reserved_bytes: sum("reserved_bytes"),
      in_flight: sum("in_flight"),
      last_used_at: uses.map((use) => use.last_used_at).filter(Boolean).sort().at(-1) ?? null,
    };
  }

  // The load of a model that is under way, if there is one.
  loadOf(modelId) {
    return this.jobs.find((job) => job.model_id === modelId && job.kind === "load" && !hasEnded(job)) ?? null;
  }
}

export const hasEnded = (job) => job.finished_at !== null;

export function callEach(views, ...about) {
  for (const view of views) {
    try {
      view(...about);
    } catch (error) {
      console.error(error); // one view that fails must not blind the others
    }
  }
}
