// Jobs: those under way with their stages, then the newest that ended; and the page of one job with its events.

import { api, errorText } from "./api.js";
import { age, ago, clock, count, duration, JOB_KINDS, moment, named, oneLine, secondsSince, withoutIds, words } from "./format.js";
import { EventList, useEvents } from "./ledger.js";
import { cancel } from "./operations.js";
import { address, href } from "./router.js";
import { hasEnded, jobs, now, session } from "./state.js";
import { Button, Hint, html, PageHead, Panel, Pill, Refusal, useRequest } from "./ui.js";

const MOST = 100; // that are shown
const STAGES = {
  load: ["copying", "starting", "loading", "warming_up", "measuring"],
  unload: ["draining", "stopping"],
};

export function JobsPage() {
  const { id } = address.value;
  return id === null ? html`<${JobList} />` : html`<${JobPage} key=${id} id=${id} />`;
}

function JobList() {
  const newest = (some, when) => some.toSorted((a, b) => (a[when] < b[when] ? 1 : -1));
  const running = newest(jobs.value.filter((job) => !hasEnded(job)), "created_at");
  const ended = newest(jobs.value.filter(hasEnded), "finished_at");
  return html`
    <${PageHead} title="Jobs" count=${running.length ? `${running.length} under way` : ""} />
    <${Panel} kind="jobs" title="Under way">
      <${Jobs} listed=${running} none="Nothing is being loaded or unloaded." />
    <//>
    <${Panel} kind="ended-jobs" title="Ended">
      <${Jobs} listed=${ended} none="No job has ended yet." />
    <//>`;
}

function Jobs({ listed, none }) {
  return html`
    <ul class="jobs-list">${listed.slice(0, MOST).map((job) => html`<${JobItem} key=${job.id} job=${job} />`)}</ul>
    ${listed.length === 0 && html`<${Hint}>${none}<//>`}
    ${listed.length > MOST && html`<${Hint}>And ${listed.length - MOST} more: the ledger has them.<//>`}`;
}

// A job in a list: what it is, how far it is, why it ended so, and who asked for it.
export function JobItem({ job }) {
  const why = whyText(job);
  return html`
    <li class="job" data-job=${job.id}>
      <div class="head">
        <p><a class="name" href=${href("jobs", job.id)}>${JOB_KINDS[job.kind]} ${named(job.model_id, job.version)}</a> <${Pill} state=${job.status} /></p>
        <div class="do"><${CancelButton} job=${job} /></div>
      </div>
      <${Steps} job=${job} />
      ${why && html`<p class="why ${job.error ? "bad" : ""}">${why}</p>`}
      <p class="dim" title="job ${job.id}, asked for at ${job.created_at}">${aboutText(job, now.value)}</p>
    </li>`;
}

export function CancelButton({ job }) {
  const isLate = hasEnded(job) || job.cancel_requested || (job.kind === "unload" && job.status === "in_progress");
  if (isLate || !session.value.manages) return null;
  return html`<${Button} about="the ${job.kind} of ${job.model_id}" onClick=${() => cancel(job)}>Cancel<//>`;
}

function Steps({ job }) {
  const stages = STAGES[job.kind], at = stages.indexOf(job.stage);
  if (at < 0 || hasEnded(job)) return null;
  return html`
    <ol class="steps">${stages.map((stage, number) => html`
      <li class=${number < at ? "done" : ""} aria-current=${number === at ? "step" : undefined}>${words(stage)}</li>`)}
    </ol>`;
}

function whyText(job) {
  if (job.error) return `${job.error.code}: ${oneLine(job.error.message, 400)}`;
  if (job.superseded_by) return html`Superseded by <a href=${href("jobs", job.superseded_by)}>another load</a>.`;
  if (job.waiting_for) return `Waits for ${oneLine(withoutIds(job.waiting_for), 400)}`;
  return job.cancel_requested && !hasEnded(job) ? "Being cancelled." : "";
}

function aboutText(job, at) {
  const took = duration(secondsSince(job.created_at, Date.parse(job.finished_at)));
  const parts = [
    `by ${oneLine(job.requested_by, 60)}`,
    job.passed_over && `passed over: ${oneLine(job.passed_over, 400)}`,
    job.reason && `reason: ${oneLine(job.reason, 1000)}`,
    job.emergency && `emergency: ${oneLine(job.emergency, 1000)}`,
    job.cause !== "request" && `cause ${words(job.cause)}`,
    job.node && `at ${oneLine(job.node, 60)}`,
    hasEnded(job) ? `${clock(job.finished_at)}, ${ago(job.finished_at, at)}, took ${took}` : `for ${age(secondsSince(job.created_at, at))}`,
    job.attempt > 1 && count(job.attempt, "attempt"),
    job.parameters?.force && "forced",
  ];
  return parts.filter(Boolean).join(" · ");
}

function JobPage({ id }) {
  const { answer, error } = useRequest((signal) => api.get(`/api/v1/jobs/${encodeURIComponent(id)}`, { signal }), [id]);
  const job = jobs.value.find((each) => each.id === id) ?? answer;
  return html`
    <${PageHead} title="Job"><a href=${href("jobs")}>All jobs</a><//>
    <section id="job" class="panel job-page" aria-label="The job">
      <${Refusal} text=${!job && error && errorText(error)} />
      ${job && html`<ul><${JobItem} job=${job} /></ul><${JobFacts} job=${job} />`}
    </section>
    ${session.value.audits && html`<${JobEvents} id=${id} />`}`;
}

function JobFacts({ job }) {
  const ended = hasEnded(job) ? `; ended at ${moment(job.finished_at)}` : "";
  return html`
    <p>Requested by ${oneLine(job.requested_by, 130)} at ${moment(job.created_at)}${ended}. <code>${job.id}</code></p>
    <p class="links"><a href=${href("models", job.model_id)}>Model ${oneLine(job.model_id, 130)}</a>
      ${session.value.audits && html`<a href=${href("timeline", job.position)}>As of its last event</a>`}</p>`;
}

function JobEvents({ id }) {
  const { events, error, isEmpty } = useEvents({ job: id });
  return html`
    <${Panel} kind="job-events" title="Events" controls=${html`<a href=${href("ledger", null, { job: id })}>In the ledger</a>`}>
      <${Refusal} text=${error && errorText(error)} />
      <${EventList} events=${events} />${isEmpty && html`<${Hint}>The ledger has no event of it.<//>`}
    <//>`;
}
