// The nodes that share the ledger: which are there, what runs where, and draining one. A server alone has none.

import { Dialog, openDialog } from "./dialogs.js";
import { ago, bytes, clock, count, oneLine } from "./format.js";
import { drain } from "./operations.js";
import { nodes, now, session } from "./state.js";
import { ActionsCell, Badge, Button, Cell, Hint, html, ModelLink, PageHead, Pill, Row, useKeptFocus } from "./ui.js";

const ORDER = ["lost", "draining", "joined", "left"];
const MOST = 50; // nodes that are shown: more have left long ago
const MOST_MODELS = 20; // of a node; the list of models has all
const MOST_JOBS = 3;

const takesLoads = (node) => node.phase === "joined";
const hasEnded = (node) => node.phase === "left" || node.phase === "lost";

export function NodesPage() {
  useKeptFocus();
  const sorted = nodes.value.toSorted((a, b) => ORDER.indexOf(a.phase) - ORDER.indexOf(b.phase) || (a.id < b.id ? -1 : 1));
  const joined = sorted.filter(takesLoads).length, all = sorted.length;
  if (all === 0) {
    const alone = "This server is the only one: it shares its ledger with no other.";
    return html`<${PageHead} title="Nodes" /><section class="panel"><${Hint}>${alone}<//></section>`;
  }
  const columns = ["Node", "Phase", "Models", "Jobs", "Lease", "Memory", "Address, attributes, release"];
  return html`
    <${PageHead} title="Nodes" count="${joined} joined${joined === all ? "" : ` of ${all}`}" />
    <section id="nodes" class="panel nodes" aria-label="Nodes">
      <table class="cards">
        <caption class="unseen">Nodes, and what runs where</caption>
        <thead><tr>
          ${columns.map((name) => html`<th scope="col" class=${name === "Memory" ? "number" : ""}>${name}</th>`)}
          ${session.value.manages && html`<th scope="col"><span class="unseen">Actions</span></th>`}
        </tr></thead>
        <tbody id="nodes-rows">${sorted.slice(0, MOST).map((node) => html`<${NodeRow} key=${node.id} node=${node} />`)}</tbody>
      </table>
      ${all > MOST && html`<${Hint}>And ${all - MOST} more: <code>loadledger nodes</code> lists them.<//>`}
    </section>`;
}

function NodeRow({ node }) {
  const sick = [node.trusted === false && "not trusted", node.late && "late"].filter(Boolean).join(", ");
  const heading = html`
    <span class="name">${oneLine(node.id, 130)}</span>
    ${node.this && html`<${Badge} title="The server of this page.">this node<//>`}
    ${node.placer && html`<${Badge} title="It chooses the nodes of loads.">places loads<//>`}`;
  return html`
    <${Row} heading=${heading}>
      <${Cell} label="Phase"><${Pill} state=${node.phase} />${sick && html`<span class="error">${sick}</span>`}<//>
      <${Cell} label="Models">${node.models.length ? html`<${Models} models=${node.models} />` : "–"}<//>
      <${Cell} label="Jobs">${jobsText(node.jobs)}<//>
      <${Cell} label="Lease" title=${node.renewed_at}>${leaseText(node, now.value)}<//>
      <${Cell} label="Memory" kind="number" title="Used or reserved, as the node last said; and its budget">${memoryText(node)}<//>
      <${Cell} label="Address">
        <${Address} text=${node.address} />
        <div class="dim">${[...node.attributes, node.release].filter(Boolean).map((text) => oneLine(text, 130)).join(", ")}</div>
      <//>
      ${session.value.manages && html`
        <${ActionsCell}>${takesLoads(node) && html`
          <${Button} about=${node.id} onClick=${() => openDialog(DrainDialog, { node })}>Drain…<//>`}<//>`}
    <//>`;
}

function Models({ models }) {
  const more = models.length - MOST_MODELS, stateOf = ({ state }) => (state === "loaded" ? "" : `, ${state}`);
  return html`
    <ul class="at-node">${models.slice(0, MOST_MODELS).map((model) => html`
      <li key=${model.id}><${ModelLink} id=${model.id} version=${model.version} /><span class="dim">${stateOf(model)}</span></li>`)}
    </ul>
    ${more > 0 && html`<span class="dim">and ${more} more</span>`}`;
}

function jobsText(jobs) {
  if (!jobs.length) return "–";
  const shown = jobs.slice(0, MOST_JOBS).map((job) => `${job.kind} of ${job.model_id}`).join(", ");
  return jobs.length > MOST_JOBS ? `${shown} and ${jobs.length - MOST_JOBS} more` : shown;
}

function memoryText({ budget_bytes: budget, free_bytes: free }) {
  if (budget == null) return "–";
  return free == null ? `budget ${bytes(budget)}` : `${bytes(budget - free)} of ${bytes(budget)}`;
}

function leaseText(node, at) {
  if (hasEnded(node)) return `${node.phase} ${clock(node.ended_at)}`;
  return node.renewed_at ? `renewed ${ago(node.renewed_at, at)}` : "–";
}

// A node's own page, in a tab of its own; what is no address of one is text.
function Address({ text }) {
  const shown = oneLine(text, 300);
  if (!/^https?:\/\//.test(text) || !URL.canParse(text)) return html`<span>${shown}</span>`;
  return html`<a href=${new URL(text).href} target="_blank" rel="noopener noreferrer">${shown}<span class="unseen"> (opens in a new tab)</span></a>`;
}

function DrainDialog({ node }) {
  const others = nodes.value.filter((each) => each.id !== node.id && takesLoads(each)).map((each) => oneLine(each.id, 130));
  const names = `${others.slice(0, 5).join(", ")}${others.length > 5 ? ", …" : ""}`;
  const has = node.models.length ? `It has ${count(node.models.length, "model")}.` : "It has no model.";
  const goes = !others.length ? "No other node takes loads: its models stay here until one does."
    : node.models.length ? `Each is loaded at another node (${names}), and only then unloaded here.` : "";
  const ask = async () => {
    await drain(node);
    return true;
  };
  return html`
    <${Dialog} name="drain" title="Drain ${node.id}" ask=${ask} close="Keep it" closeIsDefault
      buttons=${(_, isBusy) => html`<button type="submit" class="primary" disabled=${isBusy}>Drain</button>`}
      hint=${html`<${Hint}>It takes no more loads until it is started again.<//>`}>
      <p id="drain-text">${has} ${goes}</p>
    <//>`;
}
