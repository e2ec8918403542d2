// The page's state as signals, and what follows from it.

import { batch, computed, signal } from "./vendor/signals.js";
import { age, clock, firstLine, secondsSince, serverNow, withoutIds, words } from "./format.js";

export const session = signal(null); // who is signed in, with what the roles allow; see session.js
export const models = signal(new Map()); // by id, as the API has them
export const nodes = signal([]); // that share the ledger; none of a server alone
export const jobs = signal([]); // unfinished ones, then the newest
export const failures = signal(new Map()); // by model that failed: the last job that did
export const started = signal(null); // the last ServerStarted, for those who may read the ledger
export const resources = signal(null);
export const unanswered = signal(null); // loads whose requests get no answer: see findUnanswered
export const head = signal(0); // the highest position that is known of
export const epoch = signal(0); // changes where the ledger that was shown has to be looked at anew
export const connection = signal({ mode: "connecting", since: serverNow(), why: "", retryAt: null });
export const heardAt = signal(serverNow()); // when the server said something last
export const readOnly = signal(false); // whether the server has refused to add a version
export const now = signal(serverNow()); // of the server, each second: "3 s ago" goes on where nothing happens

setInterval(() => (now.value = serverNow()), 1000);

export const hasEnded = (job) => job.finished_at !== null;

const uses = computed(() => Map.groupBy(resources.value?.models ?? [], (use) => use.model_id));

// What the processes of a model use together: two loads while one takes the other's place. `serving` is the one of the
// load that answers.
export function useOf(model) {
  const found = uses.value.get(model.id) ?? [], sum = (name) => found.reduce((total, use) => total + use[name], 0);
  return {
    processes: found.length,
    serving: found.find((use) => use.job_id === model.job_id || model.copies_at?.some((copy) => copy.job_id === use.job_id)),
    memory_bytes: sum("memory_bytes"),
    reserved_bytes: sum("reserved_bytes"),
    in_flight: sum("in_flight"),
    last_used_at: found.map((use) => use.last_used_at).filter(Boolean).sort().at(-1) ?? null,
  };
}

// What a model is, for people: its state, or "waiting" of one that serves nothing and whose load has not started; and in
// words what that load waits for or does, since when, or why the last one failed.
export function statusOf({ state, open_load: load, error }, at = now.value) {
  const serves = state === "loaded" || state === "lost", next = state === "loaded" ? "next version " : "";
  if (load?.status === "pending") {
    const shown = serves || state === "unloading" ? state : "waiting", since = age(secondsSince(load.created_at, at));
    const what = `since ${clock(load.created_at)} (${since}) for ${withoutIds(load.waiting_for ?? "its turn")}`;
    return { state: shown, detail: shown === "waiting" ? what : `${next}waits ${what}` };
  }
  if (load) return { state, detail: `${next && `${next}is `}${words(load.stage ?? "under way")}, for ${age(secondsSince(load.started_at, at))}` };
  return { state, detail: error ? `${error.code}: ${firstLine(error.message)}` : "" };
}

// The versions that wait for approval by who is signed in, and neither added nor approved them, newest first. The server
// decides, also who is the same person.
export const unapproved = computed(() => {
  const { approves, subject } = session.value ?? {}, listed = approves ? [...models.value.values()] : [];
  const found = listed.flatMap((model) => (model.unapproved ?? []).map((each) => ({ model, ...each })));
  const isAsked = ({ model, version, digest, added_by: by }) =>
    by !== subject && !model.approvals?.some((each) => each.by === subject && each.version === version && each.digest === digest);
  return found.filter(isAsked).sort((a, b) => (b.position ?? Infinity) - (a.position ?? Infinity));
});

export function connect(mode, why = "", retryAt = null) {
  const same = connection.value.mode === mode;
  connection.value = { mode, why, retryAt, since: same ? connection.value.since : serverNow() };
}

const LOUD_AFTER_MS = 1500; // a server that starts again is back by then, and nobody needs to know

export const isLost = computed(() => connection.value.mode === "lost" && now.value - connection.value.since > LOUD_AFTER_MS);

// Why the server cannot be reached, or is not ready: before all else, with cause and cure.
export const unready = computed(() => {
  const failed = resources.value?.not_ready ?? [], { mode, why } = connection.value;
  if (mode !== "lost") return failed;
  const cause = `No connection to the server: all this is as of ${clock(new Date(heardAt.value).toISOString())}`;
  const cure = `${why} Check its process and its machine; this page tries again by itself`;
  return isLost.value ? [{ check: "connection", cause, cure }] : [];
});

export function advance(position) {
  heardAt.value = serverNow();
  if (position > head.value) head.value = position;
}

const PAUSE_MS = 100; // between two looks at what was heard: a thousand events a second are still ten
const listeners = new Set();
let heard = [], due = null;

// Has `listener` called with the events of the stream, ten times a second at most. Returns what ends that.
export function subscribe(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

export function hear(event) {
  heard.push(event);
  due ??= setTimeout(() => {
    const events = heard;
    [heard, due] = [[], null];
    batch(() => {
      advance(events.at(-1).position);
      for (const listener of listeners) listener(events);
    });
  }, PAUSE_MS);
}
