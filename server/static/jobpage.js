// The page of a job, #/jobs/ID: what became of it, and its events in the ledger.

import { told } from "./api.js";
import { byId, el, show } from "./dom.js";
import { moment, oneLine } from "./format.js";
import { ended } from "./store.js";

export function jobPage(api, router, ledger) {
  let shown = null;
  router.watch(({ view, id }) => {
    const wanted = view === "jobs" ? id : null;
    if (wanted === shown) return;
    shown = wanted;
    show(byId("job"), wanted !== null);
    if (wanted === null) return ledger.only("");
    ledger.only(wanted);
    byId("job-close").href = router.href();
    draw(api, router, wanted, () => shown === wanted);
  });
}

async function draw(api, router, id, isShown) {
  const text = byId("job-text");
  text.replaceChildren(el("p", {}, "Loading…"));
  try {
    const job = await api.get(`/api/v1/jobs/${encodeURIComponent(id)}`);
    if (isShown()) text.replaceChildren(...lines(job, router));
  } catch (error) {
    if (isShown()) text.replaceChildren(el("p", { class: "refusal" }, told(error)));
  }
  byId("job").scrollIntoView({ block: "nearest" });
}

function lines(job, router) {
  const version = job.version == null ? "" : ` ${job.version}`, cause = job.cause === "request" ? "" : `, cause ${job.cause}`;
  const what = el("p", {}, el("strong", {}, `${job.kind === "load" ? "Load" : "Unload"} of `), el("a", { href: router.href("models", job.model_id) }, oneLine(job.model_id, 130)), version, " ",
    el("span", { class: `pill ${job.status}` }, job.status.replace("_", " ")));
  const asked = `Requested by ${oneLine(job.requested_by, 130)}${cause} at ${moment(job.created_at)}${ended(job) ? `; ended at ${moment(job.finished_at)}` : ""}.`;
  const error = job.error ? el("p", { class: "why" }, `${job.error.code}: ${oneLine(job.error.message, 600)}`) : null;
  return [what, el("p", {}, asked), error, el("p", {}, el("a", { href: router.href("at", String(job.position)) }, "As of its last event")), el("p", { class: "dim" }, el("code", {}, job.id))].filter(Boolean);
}
