// Operations that change something. Each is one request; a notice reports the outcome of its job.

import { api, requestErrorText } from "./api.js";
import { duration, named, oneLine, secondsSince, words } from "./format.js";
import { refreshSoon } from "./live.js";
import { hasEnded, jobs } from "./state.js";
import { effect, notice, untracked } from "./ui.js";

const pending = new Map(); // by job: what to say when it has ended, in place of what was said when it was accepted

const pathOf = (modelId, what) => `/api/v1/models/${encodeURIComponent(modelId)}/${what}`;

// Throws what the server refuses with: who asks in a dialog is told there.
export async function load(modelId, body) {
  await request(pathOf(modelId, "load"), body, `Load of ${modelId}`);
}

export async function unload(modelId, force) {
  await request(pathOf(modelId, `unload${force ? "?force=true" : ""}`), undefined, `${force ? "Forced unload" : "Unload"} of ${modelId}`);
}

// A load of what serves with another `pinned` changes that and nothing else: it is not loaded again.
export async function pin(model, pinned) {
  const what = `${pinned ? "Pinning" : "Unpinning"} of ${model.id}`;
  await orNotice(request(pathOf(model.id, "load"), { version: model.version, pinned }, what));
}

export async function cancel(job) {
  await orNotice(request(`/api/v1/jobs/${encodeURIComponent(job.id)}/cancel`, undefined, `Cancelling the ${job.kind} of ${job.model_id}`));
}

// Approves the bytes of a version; throws what the server refuses with.
export async function approve(modelId, version, digest, reason) {
  await api.send(approvalOf(modelId, version), { method: "PUT", body: JSON.stringify({ digest, reason }) });
  notice(`You approved ${named(modelId, version)}.`);
  refreshSoon();
}

// Withdraws the approval of a version; throws what the server refuses with.
export async function withdraw(modelId, version, reason) {
  await api.send(`${approvalOf(modelId, version)}?reason=${encodeURIComponent(reason)}`, { method: "DELETE" });
  notice(`The approval of ${named(modelId, version)} is withdrawn.`);
  refreshSoon();
}

const approvalOf = (modelId, version) => `/api/v1/models/${encodeURIComponent(modelId)}/versions/${version}/approval`;

// Throws what the server refuses with, too.
export async function drain(node) {
  const { status } = await api.post(`/api/v1/nodes/${encodeURIComponent(node.id)}/drain`);
  notice(status === 200 ? `${node.id} is draining already.` : `${node.id} drains: it takes no more loads.`);
  refreshSoon();
}

async function request(path, body, what) {
  const { status, answer: job } = await api.post(path, body);
  if (status === 200 && hasEnded(job)) notice(`${what}: ${job.kind === "load" && !job.started_at ? "done" : "nothing to do, it is so already"}.`);
  else pending.set(job.id, { what, withdraw: notice(`${what} is accepted.`) });
  refreshSoon();
}

async function orNotice(asked) {
  try {
    await asked;
  } catch (error) {
    notice(requestErrorText(error), "bad");
  }
}

function tellOutcome(job) {
  const { what, withdraw } = pending.get(job.id);
  pending.delete(job.id);
  withdraw(); // its outcome takes its place
  const took = duration(secondsSince(job.created_at, Date.parse(job.finished_at)));
  if (job.status === "completed") notice(`${what} completed in ${took}.`);
  else notice(`${what} ${words(job.status)}${job.error ? `: ${oneLine(job.error.message)}` : "."}`, job.status === "failed" ? "bad" : "good");
}

effect(() => {
  const ended = jobs.value.filter((job) => pending.has(job.id) && hasEnded(job));
  untracked(() => ended.forEach(tellOutcome));
});
