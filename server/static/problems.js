// What is wrong, worst first, and what to do about each: from what the page knows, and nothing else.

import { advice } from "./advice.js";
import { age, ago, bytes, count, oneLine, secondsSince, serverNow } from "./format.js";
import { ended } from "./store.js";

const STUCK_S = 10; // requests in flight, and none answered
const SLOW_UNLOAD_S = 5;
const SLOW_LOAD_S = 60;
const TIGHT = 0.1; // of the budget
const PRESSED_PERCENT = 10;

export const LEVELS = ["critical", "warning", "waiting"];

// Each has key, level, title (which stays the same, so that it is read aloud once), why, todo, and what can be done from here: offers of {do, model, job}.
export function problems(store, now = Date.now(), there = serverNow()) {
  const found = [...ofMemory(store), ...ofStuck(store, now)];
  for (const model of store.models.values()) found.push(...ofModel(model, store.jobs));
  for (const job of store.jobsNow()) found.push(...ofJob(job, there));
  return found.sort((a, b) => LEVELS.indexOf(a.level) - LEVELS.indexOf(b.level) || (a.key < b.key ? -1 : 1));
}

function problem(level, key, title, why, todo, ...offers) {
  return { level, key, title, why: oneLine(why), todo: oneLine(todo), offers };
}

const reason = (error) => (error ? `${error.code}: ${error.message}` : "");

function whenFailed(id, jobs) {
  const last = jobs.filter((job) => job.model_id === id && job.status === "failed").sort((a, b) => (a.finished_at < b.finished_at ? 1 : -1))[0];
  return last ? `${ago(last.finished_at)}, asked for by ${oneLine(last.requested_by, 60)}. ` : "";
}

function* ofModel(model, jobs) {
  const { id, state, error } = model;
  const load = { do: "load", model }, unload = { do: "unload", model };
  if (state === "failed") {
    yield problem("critical", `failed ${id}`, `${id} failed`, `${whenFailed(id, jobs)}${reason(error)}`, advice(error?.code), load);
  } else if (state === "lost") {
    const why = reason(error) || "Its worker or the server died.";
    yield problem("critical", `lost ${id}`, `${id} is lost: it served, and does not now`, why,
      "The server reloads it; its job says what it waits for. To stop that, unload it.", load, unload);
  } else if (error && state === "loaded") {
    yield problem("warning", `error ${id}`, `${id} still serves version ${model.version}, but something failed`,
      reason(error), advice(error.code), { do: "swap", model });
  }
}

function* ofStuck(store, now) {
  for (const [jobId, since] of store.samples.at(-1)?.stuck ?? []) {
    const use = store.resources?.models.find((each) => each.job_id === jobId);
    const seconds = (now - since) / 1000;
    if (!use || seconds < STUCK_S) continue;
    yield problem("critical", `stuck ${jobId}`, `${use.model_id} does not answer`,
      `${count(use.in_flight, "request")} in flight, none answered for ${age(seconds)}.`,
      "Its worker may be stopped or stuck. Force the unload, which ends it within a second; then load it again.",
      { do: "unload", model: store.models.get(use.model_id) });
  }
}

function* ofJob(job, now) {
  if (ended(job)) return;
  const model = { id: job.model_id }, what = `${job.kind === "load" ? "Load" : "Unload"} of ${job.model_id}`;
  const seconds = secondsSince(job.started_at ?? job.created_at, now);
  const cancel = { do: "cancel", job };
  if (job.waiting_for) {
    yield problem("waiting", `waits ${job.id}`, what, `For ${job.waiting_for}.`,
      `Requested by ${job.requested_by} ${age(secondsSince(job.created_at, now))} ago; it starts by itself.`, cancel);
  } else if (job.kind === "unload" && job.status === "in_progress" && seconds > SLOW_UNLOAD_S) {
    yield problem("warning", `slow ${job.id}`, `${what} takes long`,
      `It is ${job.stage ?? "under way"}, for ${age(seconds)} by now: running requests have not ended.`, "It kills the worker when its time is up; a forced unload does so now.",
      { do: "unload", model });
  } else if (job.kind === "load" && job.status === "in_progress" && seconds > SLOW_LOAD_S) {
    yield problem("warning", `slow ${job.id}`, `${what} takes long`,
      `It is ${job.stage ?? "under way"}, for ${age(seconds)} by now.`, `Past its time, ${job.parameters.timeout_s ?? "?"} s, it fails by itself.`, cancel, { do: "unload", model });
  }
}

function* ofMemory({ resources }) {
  if (!resources) return;
  const { budget_bytes: budget, free_bytes: free, pressure, waiting, limit_bytes: limit } = resources;
  const todo = "Unload unused models, or set --evict idle.";
  const needs = Math.max(0, ...waiting.map((each) => each.needs_bytes ?? 0));
  if (free < 0) {
    yield problem("critical", "memory", "Memory is over budget", `By ${bytes(-free)} of ${bytes(budget)}: models have grown.`, todo);
  } else if (budget > 0 && (free < TIGHT * budget || needs > free)) {
    yield problem("warning", "memory", "Memory is tight", `${bytes(free)} of ${bytes(budget)} are free${needs > free ? `, and a load that waits needs ${bytes(needs)}` : ""}.`, todo);
  }
  if ((pressure?.memory_some_percent ?? 0) >= PRESSED_PERCENT) {
    yield problem("warning", "pressure", "The machine is short of memory",
      `In ${Math.round(pressure.memory_some_percent)} % of the last ten seconds a task waited for memory; the limit is ${bytes(limit)}.`,
      "Loads of low priority wait. Check what else runs on the machine.");
  }
}
