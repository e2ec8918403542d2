// Jobs: the list, with those under way and their stages first, and the page of one job, #/jobs/ID.

import { errorText, Latest } from "./api.js";
import { button, byId, h, reconcile, setAttribute, setText, show, showText, statePill } from "./dom.js";
import { age, ago, count, duration, moment, oneLine, secondsSince } from "./format.js";
import { hasEnded } from "./store.js";

const MOST = 100; // that are shown
const STAGES = { load: ["copying", "starting", "loading", "warming_up", "measuring"], unload: ["draining", "stopping"] };

export function jobsView(store, actions) {
  const draw = () => {
    const jobs = store.jobsNow().sort((a, b) => hasEnded(a) - hasEnded(b) || (a.created_at < b.created_at ? 1 : -1));
    const open = jobs.filter((job) => !hasEnded(job)).length;
    reconcile(byId("jobs-list"), jobs.slice(0, MOST), (job) => jobItem(job, actions));
    setText(byId("jobs-count"), open ? `${open} under way` : "");
    showText(byId("jobs-none"), jobs.length > MOST ? `And ${jobs.length - MOST} more.` : jobs.length ? "" : "No load or unload yet.");
  };
  store.watch(draw);
}

export function jobItem(first, actions) {
  const what = h("strong", {}, `${first.kind === "load" ? "Load" : "Unload"} ${first.model_id}${first.version == null ? "" : ` ${first.version}`}`);
  const pill = statePill(), about = h("p", { class: "dim" }), why = h("p", { class: "why" });
  const steps = h("ol", { class: "steps" }, ...STAGES[first.kind].map((stage) => h("li", { "data-stage": stage }, stage.replace("_", " "))));
  const cancel = actions.cancel && button("Cancel", `${first.kind} of ${first.model_id}`, () => actions.cancel(first));
  const trace = actions.trace && button("Events", `of the ${first.kind} of ${first.model_id}`, () => actions.trace(first));
  const node = h("li", { class: "job", "data-job": first.id }, h("div", { class: "head" }, h("p", {}, what, " ", pill), h("div", { class: "do" }, trace, cancel)), steps, why, about);
  node.update = (job) => {
    pill.update(job.status);
    const at = STAGES[job.kind].indexOf(job.stage);
    show(steps, at >= 0 && !hasEnded(job));
    [...steps.children].forEach((step, number) => {
      setAttribute(step, "class", number < at ? "done" : null);
      setAttribute(step, "aria-current", number === at ? "step" : null);
    });
    showText(why, whyText(job));
    setText(about, aboutText(job));
    setAttribute(about, "title", `job ${job.id}, asked for at ${job.created_at}`);
    if (cancel) show(cancel, !hasEnded(job) && !job.cancel_requested && !(job.kind === "unload" && job.status === "in_progress"));
  };
  return node;
}

function whyText(job) {
  if (job.error) return `${job.error.code}: ${oneLine(job.error.message, 400)}`;
  if (job.superseded_by) return `Superseded by job ${job.superseded_by}.`;
  if (job.waiting_for) return `Waits for ${oneLine(job.waiting_for, 400)}`;
  return job.cancel_requested && !hasEnded(job) ? "Being cancelled." : "";
}

function aboutText(job) {
  const took = duration(secondsSince(job.created_at, Date.parse(job.finished_at)));
  const parts = [`by ${oneLine(job.requested_by, 60)}`, job.cause === "request" ? null : `cause ${job.cause}`, job.node ? `at ${oneLine(job.node, 60)}` : null,
    hasEnded(job) ? `${ago(job.finished_at)}, took ${took}` : `for ${age(secondsSince(job.created_at))}`,
    job.attempt > 1 ? count(job.attempt, "attempt") : null, job.parameters?.force ? "forced" : null];
  return parts.filter(Boolean).join(" · ");
}

// Shows what became of a job, and its events in the ledger.
export function jobPage(api, router, ledger) {
  const latest = new Latest();
  let shown = null;
  const draw = (...lines) => {
    byId("job-text").replaceChildren(...lines);
    byId("job").scrollIntoView({ block: "nearest" });
  };
  router.watch(({ view, id }) => {
    const wanted = view === "jobs" ? id : null;
    if (wanted === shown) return;
    shown = wanted;
    show(byId("job"), wanted !== null);
    latest.drop();
    ledger.showJob(wanted ?? "");
    if (wanted === null) return;
    byId("job-close").href = router.href();
    draw(h("p", {}, "Loading…"));
    latest.request((signal) => api.get(`/api/v1/jobs/${encodeURIComponent(wanted)}`, { signal }), (job) => draw(...jobLines(job, router)),
      (error) => draw(h("p", { class: "refusal" }, errorText(error))));
  });
}

function jobLines(job, router) {
  const version = job.version == null ? "" : ` ${job.version}`, cause = job.cause === "request" ? "" : `, cause ${job.cause}`;
  const what = h("p", {}, h("strong", {}, `${job.kind === "load" ? "Load" : "Unload"} of `), h("a", { href: router.href("models", job.model_id) }, oneLine(job.model_id, 130)), version, " ",
    h("span", { class: `pill ${job.status}` }, job.status.replace("_", " ")));
  const asked = `Requested by ${oneLine(job.requested_by, 130)}${cause} at ${moment(job.created_at)}${hasEnded(job) ? `; ended at ${moment(job.finished_at)}` : ""}.`;
  const error = job.error ? h("p", { class: "why" }, `${job.error.code}: ${oneLine(job.error.message, 600)}`) : null;
  return [what, h("p", {}, asked), error, h("p", {}, h("a", { href: router.href("at", String(job.position)) }, "As of its last event")), h("p", { class: "dim" }, h("code", {}, job.id))].filter(Boolean);
}
