// Keeps the state current: follows the stream of events, or polls where the role or the server allows no stream, and
// reconnects for as long as the page is open. What an event changed is asked for a little later, in one answer.

import { api, Refusal, Unreachable, errorText } from "./api.js";
import { serverNow } from "./format.js";
import { batch } from "./vendor/signals.js";
import * as state from "./state.js";

const STATUS_EVERY_MS = 2000;
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 5000;
const LONGEST_ASKED_MS = 60_000; // what `Retry-After` may ask for: somebody looks at this page, and what is far too long would pass for none
const SILENCE_MS = 40_000; // the server says something every 15 s: who says nothing for so long is not there
const POLL_MS = 3000;
const WITHOUT_STREAM_MS = 30_000; // how long it does without, where too many streams are open
const LONGEST_TIMER_MS = 2 ** 31 - 1;
const MOST_MISSED = 2000; // events that are caught up with; after more, the ledger is looked at anew
const RELIST_EVERY = 15; // looks: new versions in the repository are no events
const DEBOUNCE_MS = 300; // between an event and the look at what it changed: many come together
const SHARE = 3; // a look that takes long is followed by so much longer a pause: the server has other things to do
const PAGE = 1000;

let attempt = new AbortController(), end = new AbortController();
let endReason = null; // why the present attempt was ended from outside
let wake = () => {};
let lastPosition = null; // of the stream
let farewell = null; // why the server ends it
let follows = true;

addEventListener("online", retryNow);
document.addEventListener("visibilitychange", () => document.hidden || retryNow());

// Waits no longer for the next attempt.
export function retryNow() {
  wake();
}

export function stop() {
  end.abort();
  attempt.abort();
}

// Follows until `stop`. `onSignedOut` is called with the reason when the server does not accept the token any more.
export async function run(onSignedOut) {
  let pause = FIRST_PAUSE_MS;
  end = new AbortController();
  follows = state.session.value.audits;
  while (!end.signal.aborted) {
    const began = Date.now();
    attempt = new AbortController();
    endReason = null;
    try {
      await showAndFollow(attempt.signal);
    } catch (error) {
      const why = endReason ?? error;
      if (end.signal.aborted) return;
      if (why.status === 401) return stop(), onSignedOut(`The server no longer accepts this token: ${why.message}.`);
      if (Date.now() - began > LONGEST_PAUSE_MS) pause = FIRST_PAUSE_MS; // it had worked meanwhile
      const wait = Math.max(pause, Math.min(LONGEST_ASKED_MS, (why.retryAfterS ?? 0) * 1000));
      state.connect("lost", errorText(why), serverNow() + wait);
      await sleep(wait).catch(() => {});
      pause = Math.min(LONGEST_PAUSE_MS, pause * 1.7);
    }
  }
}

// Shows everything, then what changes, until something goes wrong.
async function showAndFollow(signal) {
  const position = await fetchOverview(signal), both = [follow(position, signal), refreshRegularly(signal)];
  try {
    await Promise.race(both);
  } finally {
    attempt.abort();
    await Promise.allSettled(both);
  }
}

// Follows the stream. Where there is none to be had, the state is polled, and this returns when it is time to try again.
async function follow(position, signal) {
  if (follows) await readStream(resumePosition(position), signal);
  else state.connect("polled");
  await sleep(follows ? WITHOUT_STREAM_MS : LONGEST_TIMER_MS, signal);
}

// Where the stream goes on: after what was heard last, unless that is too long ago, or of another ledger.
function resumePosition(position) {
  const missed = position - (lastPosition ?? -Infinity);
  if (missed >= 0 && missed <= MOST_MISSED) return lastPosition;
  state.head.value = position;
  state.epoch.value += 1;
  return position;
}

async function readStream(position, signal) {
  try {
    for await (const line of linesAfter(position, signal)) onLine(JSON.parse(line));
  } catch (error) {
    if (error.code === "beyond_head") lastPosition = null; // it is another log's
    if (!(error instanceof Refusal) || !["forbidden", "too_many_streams"].includes(error.code)) throw error;
    if (error.code === "forbidden") follows = false; // the token said more than the server grants
    return state.connect("polled", errorText(error));
  }
  throw new Unreachable(farewell ?? "the server ended the stream");
}

function onLine(said) {
  if (said.position !== undefined) lastPosition = said.position;
  if (said.stream === undefined) {
    state.hear(said);
    refreshSoon();
  } else if (said.stream === "live") {
    farewell = null;
    state.advance(said.position);
    state.connect("live");
  } else if (said.stream === "stage") {
    refreshSoon();
  } else if (said.stream === "end") {
    farewell = said.reason;
  }
}

async function refreshRegularly(signal) {
  for (let times = 1; ; times++) {
    const isPolled = state.connection.value.mode === "polled";
    await sleep(isPolled ? POLL_MS : STATUS_EVERY_MS, signal);
    if (isPolled || times % RELIST_EVERY === 0) await fetchOverview(signal);
    else await fetchStatus(signal);
    await findUnansweredLoads(signal);
  }
}

function sleep(ms, signal) {
  return new Promise((resolve, reject) => {
    const over = (settle, value) => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", aborted);
      settle(value);
    };
    const aborted = () => over(reject, signal.reason);
    const timer = setTimeout(() => over(resolve), ms);
    if (signal) signal.addEventListener("abort", aborted);
    else wake = () => over(resolve); // nobody hurries what is going well
  });
}

// Asks for everything in one answer. Returns its position.
async function fetchOverview(signal) {
  const found = await api.get(`/api/v1/overview?limit=${PAGE}`, { signal }), models = found.models;
  for (let cursor = found.next_cursor; cursor; ) {
    const page = await api.get(`/api/v1/models?limit=${PAGE}&cursor=${encodeURIComponent(cursor)}`, { signal });
    models.push(...page.models);
    cursor = page.next_cursor;
  }
  batch(() => {
    state.models.value = new Map(models.map((model) => [model.id, model]));
    state.jobs.value = found.jobs;
    state.failures.value = new Map(found.failed_jobs.map((job) => [job.model_id, job]));
    state.nodes.value = found.nodes;
    state.started.value = found.server_started;
    state.resources.value = found.resources;
    state.advance(found.as_of);
  });
  return found.as_of;
}

// Asks for memory, and for the leases of nodes, which are no events.
async function fetchStatus(signal) {
  const resources = await api.get("/api/v1/resources", { signal });
  const nodes = state.nodes.value.length ? (await api.get("/api/v1/nodes", { signal })).nodes : [];
  batch(() => {
    state.resources.value = resources;
    state.nodes.value = nodes;
    state.advance(resources.as_of);
  });
}

async function findUnansweredLoads(signal) {
  const resources = state.resources.value, isBusy = resources.models.some((use) => use.in_flight > 0); // else nothing is unanswered
  const statistics = isBusy ? (await api.get("/v2/models/stats", { signal })).model_stats : [];
  state.unanswered.value = findUnanswered(state.unanswered.value, resources, statistics);
}

let due = null, tookMs = 0, running = Promise.resolve();

// Asks for everything a little later, once for all events of a burst.
export function refreshSoon() {
  due ??= setTimeout(() => {
    running = running.then(async () => {
      due = null; // one that waits for an earlier one is enough
      const began = performance.now();
      await fetchOverview(attempt.signal);
      tookMs = Math.min(1000, performance.now() - began);
    }).catch(endAttempt);
  }, Math.max(DEBOUNCE_MS, SHARE * tookMs));
}

// What a look in the background met counts as much as what the stream does.
function endAttempt(error) {
  if (!(error instanceof Unreachable) && error.status !== 401) return;
  endReason ??= error;
  attempt.abort();
}

// Finds loads that have requests in flight and have answered none since the last time. Returns how much each has
// answered, and since when those have not, by job.
export function findUnanswered(before, resources, statistics, now = serverNow()) {
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

// Yields each line of the stream of events, from after a position on; ends when the server ends it. The stream is
// fetched, so that the token travels in a header.
// Throws Refusal or Unreachable.
async function* linesAfter(position, signal) {
  const quiet = new AbortController();
  const both = AbortSignal.any([signal, quiet.signal]);
  let timer = setTimeout(() => quiet.abort(), SILENCE_MS);
  try {
    const headers = { Accept: "application/x-ndjson" };
    const response = await api.send(`/api/v1/events/stream?after=${position}`, { headers, signal: both, limitMs: null });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return; // an unfinished line says nothing
      clearTimeout(timer);
      timer = setTimeout(() => quiet.abort(), SILENCE_MS);
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      yield* lines.filter((line) => line !== "");
    }
  } catch (error) {
    if (signal.aborted) throw error;
    if (quiet.signal.aborted) throw new Unreachable(`nothing was heard for ${SILENCE_MS / 1000} s`);
    throw error.status || error instanceof Unreachable ? error : new Unreachable("the connection broke");
  } finally {
    clearTimeout(timer);
    quiet.abort(); // whoever stops listening hangs up
  }
}
