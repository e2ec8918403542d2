// The jobs: those under way first, with their stages as they happen, then what came of the last ones.

import { button, byId, el, keyed, setAttribute, setText, show, tell } from "./dom.js";
import { age, ago, count, duration, oneLine, secondsSince } from "./format.js";
import { ended } from "./store.js";

const STAGES = { load: ["copying", "starting", "loading", "warming_up", "measuring"], unload: ["draining", "stopping"] };

const MOST = 100; // that are shown

export function jobsView(store, offers) {
  const draw = () => {
    const jobs = store.jobsNow().sort((a, b) => ended(a) - ended(b) || (a.created_at < b.created_at ? 1 : -1));
    const open = jobs.filter((job) => !ended(job)).length;
    keyed(byId("jobs-list"), jobs.slice(0, MOST), (job) => job.id, (job) => jobItem(job, offers), (node, job) => node.update(job));
    setText(byId("jobs-count"), open ? `${open} under way` : "");
    tell(byId("jobs-none"), jobs.length > MOST ? `And ${jobs.length - MOST} more.` : jobs.length ? "" : "No load or unload yet.");
  };
  store.watch(draw);
  setInterval(draw, 1000);
}

export function jobItem(first, offers) {
  const what = el("strong", {}, `${first.kind === "load" ? "Load" : "Unload"} ${first.model_id}${first.version == null ? "" : ` ${first.version}`}`);
  const pill = el("span", { class: "pill" }), about = el("p", { class: "dim" }), why = el("p", { class: "why" });
  const steps = el("ol", { class: "steps" }, ...STAGES[first.kind].map((stage) => el("li", { "data-stage": stage }, stage.replace("_", " "))));
  const cancel = offers.cancel && button("Cancel", `${first.kind} of ${first.model_id}`, () => offers.cancel(first));
  const trace = offers.trace && button("Events", `of the ${first.kind} of ${first.model_id}`, () => offers.trace(first));
  const node = el("li", { class: "job", "data-job": first.id }, el("div", { class: "head" }, el("p", {}, what, " ", pill), el("div", { class: "do" }, trace, cancel)), steps, why, about);
  node.update = (job) => {
    setText(pill, job.status.replace("_", " "));
    setAttribute(pill, "class", `pill ${job.status}`);
    const at = STAGES[job.kind].indexOf(job.stage);
    show(steps, at >= 0 && !ended(job));
    [...steps.children].forEach((step, number) => {
      setAttribute(step, "class", number < at ? "done" : null);
      setAttribute(step, "aria-current", number === at ? "step" : null);
    });
    tell(why, whyText(job));
    setText(about, aboutText(job));
    setAttribute(about, "title", `job ${job.id}, asked for at ${job.created_at}`);
    if (cancel) show(cancel, !ended(job) && !job.cancel_requested && !(job.kind === "unload" && job.status === "in_progress"));
  };
  return node;
}

function whyText(job) {
  if (job.error) return `${job.error.code}: ${oneLine(job.error.message, 400)}`;
  if (job.superseded_by) return `Superseded by job ${job.superseded_by}.`;
  if (job.waiting_for) return `Waits for ${oneLine(job.waiting_for, 400)}`;
  return job.cancel_requested && !ended(job) ? "Being cancelled." : "";
}

function aboutText(job) {
  const took = duration(secondsSince(job.created_at, Date.parse(job.finished_at)));
  const parts = [`by ${oneLine(job.requested_by, 60)}`, job.cause === "request" ? null : `cause ${job.cause}`, job.node ? `at ${oneLine(job.node, 60)}` : null,
    ended(job) ? `${ago(job.finished_at)}, took ${took}` : `for ${age(secondsSince(job.created_at))}`,
    job.attempt > 1 ? count(job.attempt, "attempt") : null, job.parameters?.force ? "forced" : null];
  return parts.filter(Boolean).join(" · ");
}
