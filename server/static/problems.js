// Problems, worst first, derived from the page's state: cause, advice and actions of each; and which of them somebody
// has acknowledged in this browser.

import { age, ago, bytes, count, firstLine, JOB_KINDS, named, oneLine, secondsSince, stamp, withoutIds, words } from "./format.js";
import { keep, recall } from "./session.js";
import * as state from "./state.js";
import { ADVICE } from "./tables.js";
import { computed, signal } from "./ui.js";

const UNANSWERED_S = 10; // requests in flight, and none answered
const SLOW_UNLOAD_S = 5;
const SLOW_LOAD_S = 60;
const TIGHT = 0.1; // of the budget
const PRESSED_PERCENT = 10;
const MANY_RELOADS = 6; // in an hour, after evictions; a few a day are what eviction is for
const MUCH_WAITING = 0.1; // of the time of all inferences
const MOST_BRIEFS = 3; // messages of an entry of several

const NOT_APPROVED = "not_approved"; // the code of a load that was refused for it
const APPROVED = "It has its approvals now: load it again, if none of them is yours.";

const LEVELS = ["critical", "warning", "asked", "waiting", "note"];
const CALM = ["waiting", "note"]; // nobody is called for these

// Each has key, level, title (which stays the same, so that it is read aloud once), why, todo, and what can be done
// from here: actions of {do, model, job}. With an `occurrence`, it can be acknowledged until there is another one.
// Those of one `cause` are one entry, which has them as `members`.
export const problems = computed(() => {
  const found = [...serverProblems(), ...nodeProblems(), ...memoryProblems(), ...reloadProblems(), ...unansweredProblems(), ...notices()];
  for (const model of state.models.value.values()) found.push(...modelProblems(model));
  for (const { model, version } of state.unapproved.value) {
    found.push(problem("asked", `asked ${model.id}/${version}`, `${named(model.id, version)} waits for approval`, "", "Approve it."));
  }
  for (const job of state.jobs.value) found.push(...jobProblems(job, state.now.value));
  const sorted = grouped(found).sort((a, b) => LEVELS.indexOf(a.level) - LEVELS.indexOf(b.level) || (a.key < b.key ? -1 : 1));
  return [...unreadyProblems(), ...sorted];
});

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;

// Nobody can put these away: nothing works as it should until they are gone.
const unreadyProblems = () => state.unready.value.map(({ check, cause, cure }) =>
  problem("critical", `not ready ${check}`, sentence(cause).slice(0, -1), "", sentence(cure)));

function grouped(found) {
  const causes = Map.groupBy(found, (each) => each.cause ?? each.key);
  return [...causes].map(([cause, members]) => (members.length === 1 ? members[0] : group(cause, members)));
}

function group(cause, members) {
  const first = members[0], people = [...new Set(members.map((each) => each.by).filter(Boolean))].sort();
  const others = people.length > 3 ? ` and ${count(people.length - 3, "other")}` : "";
  const by = people.length ? `Asked for by ${people.slice(0, 3).join(", ")}${others}.` : "";
  const briefs = [...new Set(members.map((each) => each.brief).filter(Boolean))].slice(0, MOST_BRIEFS).join(" · ");
  const why = [first.sameWhy, by, briefs].filter(Boolean).join(" ");
  const occurrence = members.every((each) => each.occurrence !== null) ? members.map((each) => each.occurrence).join() : null;
  members.sort((a, b) => (a.key < b.key ? -1 : 1));
  return { ...first, key: `group ${cause}`, title: `${count(members.length, first.noun)} ${first.ofMany}`, why, actions: [], members, occurrence };
}

function problem(level, key, title, why, todo, ...actions) {
  return { level, key, title, why: oneLine(why), todo: oneLine(todo), actions, occurrence: null, members: [] };
}

const advice = (code) => ADVICE[code] ?? "Read the reason, then load it again, or load another version.";

const reason = (error) => (error ? `${error.code}: ${firstLine(error.message, 300)}` : "");

// The last time that it failed, and who had asked for that.
function lastFailure(id) {
  const job = state.failures.value.get(id);
  if (!job) return { when: "", by: null, occurrence: null };
  const by = oneLine(job.requested_by, 60);
  return { when: `Asked for by ${by}, failed ${ago(job.finished_at, state.now.value)}. `, by, occurrence: job.id };
}

function* serverProblems() {
  const started = state.started.value;
  if (!started?.data.unclean) return;
  const { last_event_at: event, last_seen_at: seen } = started.data;
  const known = [`The last event was recorded ${stamp(event)}`, seen && seen !== event ? `the server was last seen ${stamp(seen)}` : null];
  yield {
    ...problem("warning", "unclean", "The server ended unexpectedly",
      `${known.filter(Boolean).join("; ")}. It started again ${stamp(started.recorded_at)}, and reloads what was loaded.`,
      "Look for the cause in the machine's log: it may have run out of memory, lost power, or been killed."),
    occurrence: String(started.position),
  };
}

function* nodeProblems() {
  const nodes = state.nodes.value;
  for (const node of nodes) {
    const { id, epoch } = node, rest = node.models.length + node.jobs.length;
    const renewed = node.renewed_at ? `It renewed its lease last ${stamp(node.renewed_at)}.` : "";
    if (node.phase === "lost") {
      yield { ...problem("warning", `node lost ${id}`, `Node ${id} is lost`, renewed,
        "The other nodes load its models. Check its machine: when it starts again, it joins by itself."), occurrence: String(epoch) };
    } else if (node.late) {
      yield problem("warning", `node late ${id}`, `Node ${id} is late`, renewed,
        "Another node declares it lost, and its models are loaded elsewhere. Check its machine, and whether it reaches the database.");
    } else if (node.phase === "draining" && rest && !nodes.some((each) => each.phase === "joined")) {
      yield problem("warning", `node stays ${id}`, `Node ${id} drains, and its models stay there`, "No other node takes loads.",
        "Start another node, or start this one again: it then takes loads.");
    }
  }
}

function* modelProblems(model) {
  const { id, error } = model, isRefused = error?.code === NOT_APPROVED;
  const load = { do: "load", model }, unload = { do: "unload", model };
  const { when, by, occurrence } = lastFailure(id);
  const todo = isRefused && !model.unapproved?.some((each) => each.is_refused) ? APPROVED : advice(error?.code);
  const isAsked = isRefused && state.unapproved.value.some((each) => each.model === model && each.is_refused); // in a list of its own
  const isNotice = error?.code === "bytes_gone"; // which the server has put into words
  if (model.state === "failed" && !isAsked && !isNotice) {
    yield { ...problem("critical", `failed ${id}`, `${id} failed`, `${when}${reason(error)}`, todo, load),
      cause: `failed ${error?.code} ${todo}`, noun: "model", ofMany: `failed: ${error?.code}`, by,
      brief: error && firstLine(error.message), occurrence: occurrence ?? reason(error), model: id };
  } else if (model.state === "lost") {
    const why = reason(error) || "Its worker or the server died.";
    yield { ...problem("critical", `lost ${id}`, `${id} is lost: it served, and does not now`, why,
      "The server reloads it; its job says what it waits for. To stop that, unload it.", load, unload),
    cause: "lost", noun: "model", ofMany: "are lost: they served, and do not now", by: model.loaded_by,
    occurrence: `${model.position} ${reason(error)}`, model: id };
  } else if (error && model.state === "loaded" && !isAsked) {
    yield { ...problem("warning", `error ${id}`, `${named(id, model.version)} still serves, but something failed`,
      `${when}${reason(error)}`, todo, { do: "swap", model }), occurrence: occurrence ?? reason(error), model: id };
  }
  yield* trustProblems(model);
}

// Versions that serve without the approval, or the signature, that the rules ask for.
function* trustProblems({ id, signature, approval, job_id: jobId, loaded_by: by }) {
  if (approval?.result === "bypassed") {
    yield { ...problem("warning", `bypassed ${id}`, `${id} was loaded without approval`, `The role emergency let it pass, for ${approval.by.join(", ")}.`,
      "Check the version that serves, and the reason in its job; else load another version."),
    cause: "bypassed", noun: "model", ofMany: "were loaded without approval", by, occurrence: jobId, model: id };
  }
  if (signature?.was_verified) {
    yield { ...problem("warning", `signature ${id}`, `${id} serves with a signature that today's rules refuse`,
      `Its signer is ${signature.signer}. It was verified before, so a reload went on.`, "Sign the version with a key or certificate of today's rules, and load it."),
    cause: "was verified", noun: "model", ofMany: "serve with a signature that today's rules refuse", by, occurrence: `${jobId} ${signature.policy}`, model: id };
  }
}

function* unansweredProblems() {
  for (const [jobId, since] of state.unanswered.value?.since ?? []) {
    const use = state.resources.value?.models.find((each) => each.job_id === jobId);
    const seconds = (state.now.value - since) / 1000;
    if (!use || seconds < UNANSWERED_S) continue;
    yield problem("critical", `unanswered ${jobId}`, `${use.model_id} does not answer`,
      `${count(use.in_flight, "request")} in flight, none answered for ${age(seconds)}.`,
      "Its worker may be stopped or stuck. Force the unload, which ends it within a second; then load it again.",
      { do: "unload", model: state.models.value.get(use.model_id) });
  }
}

// What ends a job by itself: the limit that acts first. `timeout_s` is of all of a load, waiting included, and
// `progress_timeout_s` since a load that has started last made progress, which only the server knows.
export function limitText({ kind, stage, created_at: created, started_at: started, parameters }, now) {
  const endOf = (stamp, limit) => Date.parse(stamp) + limit * 1000, leftText = (end) => `in ${age(Math.max(0, end - now) / 1000)}`;
  if (kind === "unload") {
    const drain = state.resources.value?.drain_timeout_s ?? 0;
    if (stage !== "draining") return "Its worker is killed if it does not exit within seconds.";
    return `Its requests have ${drain} s (--drain-timeout-s), and end with its worker ${leftText(endOf(started, drain))}.`;
  }
  const { timeout_s: whole, progress_timeout_s: progress } = parameters, end = endOf(created, whole);
  if (!started || !progress || end <= endOf(started, progress)) {
    return `It fails by itself ${whole} s after its request, waiting included (timeout_s): ${leftText(end)}.`;
  }
  return `Without progress for ${progress} s it fails by itself (progress_timeout_s), at the latest ${leftText(end)}.`;
}

function* jobProblems(job, now) {
  if (state.hasEnded(job)) return;
  const model = { id: job.model_id }, what = `${JOB_KINDS[job.kind]} of ${named(job.model_id, job.version)}`;
  const seconds = secondsSince(job.started_at ?? job.created_at, now);
  const cancel = { do: "cancel", job };
  if (job.waiting_for) {
    const why = `For ${oneLine(withoutIds(job.waiting_for))}.`, limit = job.kind === "load" ? ` ${limitText(job, now)}` : "";
    yield { ...problem("waiting", `waits ${job.id}`, what, why,
      `Requested by ${job.requested_by} ${age(secondsSince(job.created_at, now))} ago; it starts by itself.${limit}`, cancel),
    cause: `${job.kind} waits for ${job.waiting_for}`, noun: job.kind, ofMany: "wait", sameWhy: why,
    by: oneLine(job.requested_by, 60), model: job.model_id };
  } else if (job.kind === "unload" && job.status === "in_progress" && seconds > SLOW_UNLOAD_S) {
    yield problem("warning", `slow ${job.id}`, `${what} takes long`,
      `It is ${words(job.stage ?? "under way")}, for ${age(seconds)} by now.`,
      `${limitText(job, now)} A forced unload kills it now.`,
      { do: "unload", model });
  } else if (job.kind === "load" && job.status === "in_progress" && seconds > SLOW_LOAD_S) {
    yield problem("warning", `slow ${job.id}`, `${what} takes long`,
      `It is ${words(job.stage ?? "under way")}, for ${age(seconds)} by now.`, limitText(job, now), cancel, { do: "unload", model });
  }
}

function* memoryProblems() {
  const resources = state.resources.value;
  if (!resources) return;
  const { budget_bytes: budget, free_bytes: free, pressure, waiting, limit_bytes: limit } = resources;
  const todo = "Unload models that are not used. Or start the server with --evict idle: it then does so by itself.";
  const needs = Math.max(0, ...waiting.map((each) => each.needs_bytes ?? 0));
  if (free < 0) {
    yield problem("critical", "memory", "Memory is over budget", `By ${bytes(-free)} of ${bytes(budget)}: models have grown.`, todo);
  } else if (budget > 0 && (free < TIGHT * budget || needs > free)) {
    const wanted = needs > free ? `, and a load that waits needs ${bytes(needs)}` : "";
    yield problem("warning", "memory", "Memory is tight", `${bytes(free)} of ${bytes(budget)} are free${wanted}.`, todo);
  }
  if (resources.memory?.excess_bytes) {
    yield problem("warning", "memory plan", "The container may run out of memory", resources.memory.summary,
      "Set a smaller --memory-budget, or give the container more memory.");
  }
  if ((pressure?.memory_some_percent ?? 0) >= PRESSED_PERCENT) {
    yield problem("warning", "pressure", "The machine is short of memory",
      `In ${Math.round(pressure.memory_some_percent)} % of the last ten seconds a task waited for memory; the limit is ${bytes(limit)}.`,
      "Loads of low priority wait. Check what else runs on the machine.");
  }
}

// More models in use than fit. Acknowledged for a day, or until another limit is the tight one.
function* reloadProblems() {
  const { reloads, max_loaded: most, budget_bytes: budget } = state.resources.value ?? {};
  if (!reloads || reloads.last_hour < MANY_RELOADS || reloads.share < MUCH_WAITING) return;
  const settings = { memory: `--memory-budget (${bytes(budget)})`, ...(most && { max_loaded: `--max-loaded (${most})` }) };
  const short = reloads.limits.map((each) => settings[each] ?? each).join(" and "), raised = short || Object.values(settings).join(" or ");
  yield {
    ...problem("warning", "reloads", "The models in use do not fit",
      `${count(reloads.last_hour, "reload")} in the last hour after evictions: inferences spent ${Math.round(100 * reloads.share)} % of their time waiting for loads.`,
      `Raise ${raised}, pin the models that must answer fast, or add a node.`),
    occurrence: `${new Date(state.now.value).toISOString().slice(0, 10)} ${reloads.limits}`,
  };
}

// What the server has put into words. A note stays as long as it is so, and can be put away for good.
const notices = () => (state.resources.value?.notices ?? []).map(({ title, why, todo, level = "critical" }) => ({
  ...problem(level, `notice ${level === "note" ? todo : title}`, title, why, todo), occurrence: level === "note" ? todo : null }));

const KEPT = "loadledger.acknowledged";
const MOST_KEPT = 1000; // acknowledgements; the oldest are forgotten

// By the key of a problem, the occurrence that was acknowledged: a new one is shown again.
const acknowledged = signal(new Map(readKept()));

// A problem without an occurrence cannot be acknowledged: it goes by itself.
const isAcknowledged = (problem) => problem.occurrence !== null && acknowledged.value.get(problem.key) === problem.occurrence;

export const openProblems = computed(() => problems.value.filter((problem) => !isAcknowledged(problem)));

export const alarmingProblems = computed(() => openProblems.value.filter(({ level }) => !CALM.includes(level)));

export function acknowledge(problem) {
  const known = new Map(acknowledged.value);
  for (const each of [problem, ...problem.members]) {
    known.delete(each.key);
    known.set(each.key, each.occurrence);
  }
  keepAcknowledged(known);
}

// Shows again what was acknowledged.
export function showAgain() {
  const known = new Map(acknowledged.value);
  for (const problem of problems.value) for (const each of [problem, ...problem.members]) known.delete(each.key);
  keepAcknowledged(known);
}

function keepAcknowledged(known) {
  acknowledged.value = known;
  const kept = [...known].slice(-MOST_KEPT);
  keep("localStorage", KEPT, kept.length ? JSON.stringify(kept) : null);
}

function readKept() {
  try {
    const kept = JSON.parse(recall("localStorage", KEPT) ?? "[]");
    return Array.isArray(kept) ? kept.filter((pair) => Array.isArray(pair) && pair.length === 2) : [];
  } catch {
    return []; // nothing of this page
  }
}
