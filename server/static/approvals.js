// Approval of loads: the loads that wait for an answer, the dialog that asks for it, and what a model shows of its
// signature and its approval.

import { Dialog, openDialog, TextField } from "./dialogs.js";
import { oneLine, stamp } from "./format.js";
import { answerApproval } from "./operations.js";
import { href } from "./router.js";
import { jobs, needsAnswer } from "./state.js";
import { Badge, Button, Hint, html, Panel, useState } from "./ui.js";

const MOST_FILES = 50; // that are named of one load

// The loads that the signed-in person may approve; nothing without any.
export function WaitingForYou() {
  const listed = jobs.value.filter(needsAnswer);
  if (!listed.length) return null;
  return html`
    <${Panel} kind="approvals" title="Waits for you">
      <ul class="problems">${listed.map((job) => html`<${WaitingLoad} key=${job.id} job=${job} />`)}</ul>
    <//>`;
}

// A load that waits for approval, with the buttons that answer it for those whose answer counts.
export function WaitingLoad({ job }) {
  const title = `Load of ${oneLine(job.model_id, 130)}`, open = (approves) => openDialog(AnswerDialog, { job, approves });
  return html`
    <li class="problem asked" data-job=${job.id}>
      <div class="words">
        <p><span class="level">Approval</span> <strong><a href=${href("jobs", job.id)}>${title}</a></strong></p>
        <${WaitingFacts} job=${job} />
      </div>
      ${needsAnswer(job) && html`
        <div class="do">
          <${Button} about="the load of ${job.model_id}" onClick=${() => open(true)}>Approve…<//>
          <${Button} about="the load of ${job.model_id}" kind="danger" onClick=${() => open(false)}>Reject…<//>
        </div>`}
    </li>`;
}

function WaitingFacts({ job: { version, reason, approval } }) {
  const { served_version: served, differences, signature, requested_by: people, approved_by: by, approvals } = approval;
  const more = differences.length - MOST_FILES, versions = served == null ? `Version ${version}; none is loaded` : `Version ${served} → ${version}`;
  return html`
    <p class="why">${versions}.${differences.length === 0 && " No file differs."}</p>
    <ul class="files">${differences.slice(0, MOST_FILES).map(({ path, change }) => html`<li key=${path}>${change} <code>${oneLine(path, 200)}</code></li>`)}</ul>
    ${more > 0 && html`<${Hint}>And ${more} more files.<//>`}
    <p class="why">${signatureText(signature)}</p>
    <p class="why">Asked for by ${oneLine(people.join(", "), 400)}: ${reason ? oneLine(reason, 1000) : "no reason is given"}</p>
    <p class="todo">Answer ${stamp(approval.expires_at)} at the latest; ${by.length} of ${approvals} approved${by.length ? `: ${oneLine(by.join(", "), 400)}` : ""}.</p>`;
}

// Asks why. The answer names the digest that is shown here: it counts for these bytes only.
function AnswerDialog({ job, approves }) {
  const [reason, setReason] = useState(""), verb = approves ? "Approve" : "Reject";
  const ask = async () => {
    if (!reason.trim()) return "Give a reason: the ledger keeps it with your answer.";
    await answerApproval(job, approves, reason.trim());
    return true;
  };
  const buttons = (send, isBusy) => html`<button type="submit" class=${approves ? "primary" : "danger"} disabled=${isBusy}>${verb}</button>`;
  return html`
    <${Dialog} name="answer" title="${verb} the load of ${job.model_id}" ask=${ask} buttons=${buttons} close="Not now">
      <${WaitingFacts} job=${job} />
      <p class="files">The files have the digest <code>${job.approval.digest}</code></p>
      <${TextField} id="answer-reason" label="Reason" value=${reason} onText=${setReason} required />
    <//>`;
}

// The signature of a version's files, and how it was checked.
export function signatureText(signature) {
  if (!signature) return "Its signature was not checked: no rule asks for one.";
  const { method, signer, problem, enforced, was_verified: wasVerified } = signature;
  const parts = [
    method ? `Signed: the ${method} is ${oneLine(signer, 400)}` : "Not signed as the rules say",
    method && !enforced && "the rules only warn",
    problem && `the rules let pass ${problem}`,
    wasVerified && "today's rules refuse it, and it was verified before",
  ];
  return `${parts.filter(Boolean).join("; ")}.`;
}

export const approvalText = ({ result, by }) => `${result.replaceAll("_", " ")}${by.length ? ` by ${oneLine(by.join(", "), 400)}` : ""}`;

export function TrustBadges({ model: { signature, approval } }) {
  const { signer, problem, was_verified: wasVerified } = signature ?? {};
  const text = wasVerified ? "key exchanged" : signer ? "signed" : problem && "not signed";
  return html`
    ${text && html`<${Badge} title=${signatureText(signature)}>${text}<//>`}
    ${approval?.result === "bypassed" && html`<${Badge} title="Loaded without approval: ${approvalText(approval)}">bypassed<//>`}`;
}
