// Approval of versions: those that wait for it, the dialogs that give and withdraw it, and what a model shows of its
// signature and its approval.

import { api, errorText } from "./api.js";
import { Dialog, openDialog, TextField } from "./dialogs.js";
import { named, oneLine, stamp, words } from "./format.js";
import { approve, withdraw } from "./operations.js";
import { href } from "./router.js";
import { session, unapproved } from "./state.js";
import { HASH_DIGITS } from "./tables.js";
import { ActionsCell, Badge, Button, Cell, Hint, html, Panel, Row, useRequest, useState } from "./ui.js";

const MOST_FILES = 50; // that are named of one version
const MOST = 50; // versions that are listed

// The versions that the signed-in person may approve; nothing without any.
export function WaitingForYou() {
  const listed = unapproved.value, more = listed.length - MOST;
  if (!listed.length) return null;
  return html`
    <${Panel} kind="approvals" title="Waits for you">
      <ul class="problems">${listed.slice(0, MOST).map((each) => html`<${Unapproved} key="${each.model.id}/${each.version}" ...${each} />`)}</ul>
      ${more > 0 && html`<${Hint}>And ${more} more.<//>`}
    <//>`;
}

function Unapproved({ model, version, digest, is_refused: isRefused, added_by: by }) {
  const why = [isRefused && "Its last load was refused.", adderText(by && [by]), givenText(model, digest)];
  return html`
    <li class="problem asked">
      <div class="words">
        <p><span class="level">Approval</span> <strong><a href=${href("models", model.id)}>${named(model.id, version)}</a></strong></p>
        <p class="why">${why.filter(Boolean).join(" ")}</p>
      </div>
      <div class="do"><${ApproveButton} model=${model} version=${version} /></div>
    </li>`;
}

// Opens the dialog that approves a version, for those who may.
export function ApproveButton({ model, version }) {
  if (!session.value.approves) return null;
  return html`<${Button} about=${named(model.id, version)} onClick=${() => openDialog(ApproveDialog, { model, version })}>Approve…<//>`;
}

// Asks why. The approval names the digest that is shown here: it counts for these bytes only.
function ApproveDialog({ model, version }) {
  const path = `/api/v1/models/${encodeURIComponent(model.id)}/verify?version=${version}`, [reason, setReason] = useState("");
  const { answer: found, error } = useRequest((signal) => api.get(path, { signal, limitMs: 600_000 }), []);
  const ask = async () => {
    if (!found) return "The server has not hashed the files yet.";
    if (!reason.trim()) return "Give a reason: the ledger keeps it with your approval.";
    await approve(model.id, version, found.digest, reason.trim());
    return true;
  };
  const buttons = (send, isBusy) => html`<button type="submit" class="primary" disabled=${isBusy || !found}>Approve</button>`;
  return html`
    <${Dialog} name="answer" title="Approve ${named(model.id, version)}" ask=${ask} buttons=${buttons} close="Not now"
        refusal=${error ? errorText(error) : ""}>
      ${found ? html`<${VersionFacts} model=${model} found=${found} />` : !error && html`<p role="status">The server hashes the files…</p>`}
      <${TextField} id="answer-reason" label="Reason" value=${reason} onText=${setReason} required />
    <//>`;
}

function VersionFacts({ model, found: { version, digest, files, signature, problem, added_by: by } }) {
  const now = new Map(model.files.map((file) => [file.path, file.sha256])), next = new Map(files.map((file) => [file.path, file.sha256]));
  const change = (path) => (!now.has(path) ? "added" : !next.has(path) ? "removed" : "changed");
  const differing = [...new Set([...now.keys(), ...next.keys()])].filter((path) => now.get(path) !== next.get(path)).sort();
  const more = differing.length - MOST_FILES, versions = now.size ? `Version ${model.version} → ${version}` : `Version ${version}; none is loaded`;
  return html`
    <p class="why">${versions}.${differing.length === 0 && " No file differs."}</p>
    <ul class="files">${differing.slice(0, MOST_FILES).map((path) => html`<li key=${path}>${change(path)} <code>${oneLine(path, 200)}</code></li>`)}</ul>
    ${more > 0 && html`<${Hint}>And ${more} more files.<//>`}
    <p class="why">${problem && problem.code !== "not_approved" ? `${problem.code}: ${oneLine(problem.message, 400)}` : signatureText(signature)}</p>
    <p class="why">${adderText(by)} ${givenText(model, digest)}</p>
    <p class="files">The files have the digest <code>${digest}</code></p>`;
}

function WithdrawDialog({ model, version }) {
  const [reason, setReason] = useState("");
  const ask = async () => {
    if (!reason.trim()) return "Give a reason: the ledger keeps it.";
    await withdraw(model.id, version, reason.trim());
    return true;
  };
  const buttons = (send, isBusy) => html`<button type="submit" class="danger" disabled=${isBusy}>Withdraw</button>`;
  return html`
    <${Dialog} name="withdraw" title="Withdraw the approval of ${named(model.id, version)}" ask=${ask} buttons=${buttons} close="Keep it">
      <p>The approvals of all persons are withdrawn. What is loaded serves on; where a rule asks for approval, the next load of it is refused.</p>
      <${TextField} id="withdraw-reason" label="Reason" value=${reason} onText=${setReason} required />
    <//>`;
}

// What persons approved of a model; nothing without any. A withdrawal is of all approvals of a version.
export function Approvals({ model }) {
  const given = (model.approvals ?? []).toReversed();
  if (!given.length) return null;
  const isNewest = (each) => given.find(({ version }) => version === each.version) === each;
  return html`
    <${Panel} kind="its-approvals" title="Approvals">
      <table class="cards">
        <thead><tr>
          <th scope="col">Version</th><th scope="col">By</th><th scope="col">Approved</th><th scope="col">Reason</th><th scope="col">Digest</th>
          <th scope="col"><span class="unseen">Operations</span></th>
        </tr></thead>
        <tbody>${given.map((each) => html`<${GivenApproval} key=${each.position} model=${model} given=${each} isNewest=${isNewest(each)} />`)}</tbody>
      </table>
    <//>`;
}

function GivenApproval({ model, given: { version, digest, by, reason, at }, isNewest }) {
  const open = () => openDialog(WithdrawDialog, { model, version });
  return html`
    <${Row} heading="Version ${version}">
      <${Cell} label="By">${oneLine(by, 130)}<//><${Cell} label="Approved">${stamp(at)}<//>
      <${Cell} label="Reason" kind="reason">${oneLine(reason, 1000)}<//>
      <${Cell} label="Digest"><code title=${digest}>${digest.slice(0, HASH_DIGITS)}</code><//>
      <${ActionsCell}>
        ${session.value.approves && isNewest && html`<${Button} about="version ${version}" kind="danger" onClick=${open}>Withdraw…<//>`}
      <//>
    <//>`;
}

// How many have approved these bytes; nothing where no rule asks for it.
function givenText({ approvals = [], policy }, digest) {
  return policy?.approvals ? `${approvals.filter((each) => each.digest === digest).length} of ${policy.approvals} approved.` : "";
}

export const adderText = (by) => (by ? `Added by ${oneLine(by.join(", "), 400)}.` : "The ledger does not have who added these files.");

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

export const approvalText = ({ result, by }) => `${words(result)}${by.length ? ` by ${oneLine(by.join(", "), 400)}` : ""}`;

export function TrustBadges({ model: { signature, approval } }) {
  const { signer, problem, was_verified: wasVerified } = signature ?? {};
  const text = wasVerified ? "key exchanged" : signer ? "signed" : problem && "not signed";
  return html`
    ${text && html`<${Badge} title=${signatureText(signature)}>${text}<//>`}
    ${approval?.result === "bypassed" && html`<${Badge} title="Loaded without approval: ${approvalText(approval)}">bypassed<//>`}`;
}
