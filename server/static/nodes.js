// The nodes that share the ledger: which are there, what runs where, and draining one. A server alone has none.

import { dialog } from "./dialogs.js";
import { actionsCell, badge, button, byId, cell, h, markEmpty, reconcile, setAttribute, setText, show, showText, statePill, tableRow } from "./dom.js";
import { ago, bytes, clock, count, oneLine } from "./format.js";
import { href } from "./router.js";

const ORDER = ["lost", "draining", "joined", "left"];
const MOST = 50; // nodes that are shown: more have left long ago
const MOST_MODELS = 20; // of a node; the list of models has all

const takesLoads = (node) => node.phase === "joined";
const hasEnded = (node) => node.phase === "left" || node.phase === "lost";

export function nodesView(store, actions) {
  const draw = () => {
    const nodes = [...store.nodes].sort((a, b) => ORDER.indexOf(a.phase) - ORDER.indexOf(b.phase) || (a.id < b.id ? -1 : 1));
    show(byId("nodes"), nodes.length > 0);
    reconcile(byId("nodes-rows"), nodes.slice(0, MOST), (node) => nodeRow(node, actions, store));
    const joined = nodes.filter(takesLoads).length;
    setText(byId("nodes-count"), `${joined} joined${joined === nodes.length ? "" : ` of ${nodes.length}`}`);
    showText(byId("nodes-more"), nodes.length > MOST ? `And ${nodes.length - MOST} more: loadledger nodes lists them.` : "");
  };
  show(byId("nodes-do"), Boolean(actions.drain));
  store.watch(draw);
}

function nodeRow(first, actions, store) {
  const isThis = badge("this node", "The server of this page."), placer = badge("places loads", "It chooses the nodes of loads.");
  const pill = statePill(), late = h("span", { class: "error" }), list = h("ul", { class: "at-node" }), more = h("span", { class: "dim" });
  const cells = { models: cell("Models", null, list, more), jobs: cell("Jobs"), lease: cell("Lease"), budget: cell("Budget", "number") };
  let shown = null;
  const address = h("span"), labels = h("div", { class: "dim" });
  const row = tableRow([h("span", { class: "name" }, oneLine(first.id, 130)), isThis, placer], cell("Phase", null, pill, late), ...Object.values(cells), cell("Address", null, address, labels));
  const drain = actions.drain && button("Drain…", first.id, () => actions.drain(store.nodes.find((node) => node.id === first.id) ?? first));
  if (drain) row.append(actionsCell(drain));
  row.update = (node) => {
    const { models, jobs } = node;
    show(isThis, node.this);
    show(placer, node.placer);
    pill.update(node.phase);
    setText(late, [node.trusted === false ? "not trusted" : "", node.late ? "late" : ""].filter(Boolean).join(", "));
    reconcile(list, models.slice(0, MOST_MODELS), modelItem);
    setText(more, models.length > MOST_MODELS ? `and ${models.length - MOST_MODELS} more` : models.length ? "" : "–");
    setText(cells.jobs, jobs.length ? jobs.slice(0, 3).map((job) => `${job.kind} of ${job.model_id}`).join(", ") + (jobs.length > 3 ? ` and ${jobs.length - 3} more` : "") : "–");
    setText(cells.lease, leaseText(node));
    setAttribute(cells.lease, "title", node.renewed_at);
    setText(cells.budget, bytes(node.budget_bytes));
    if (shown !== node.address) address.replaceChildren(addressOf((shown = node.address)));
    setText(labels, [...node.labels, node.release].filter(Boolean).map((text) => oneLine(text, 130)).join(", "));
    markEmpty(Object.values(cells));
    if (drain) show(drain, takesLoads(node));
  };
  return row;
}

function modelItem(first) {
  const about = h("span", { class: "dim" }), item = h("li", {}, h("a", { href: href("models", first.id) }, first.id), about);
  item.update = (model) => setText(about, ` ${model.version}${model.state === "loaded" ? "" : `, ${model.state}`}`);
  return item;
}

// A node's own page, in a tab of its own; what is no address of one is text.
function addressOf(text) {
  const shown = oneLine(text, 300);
  if (!/^https?:\/\//.test(text) || !URL.canParse(text)) return h("span", {}, shown);
  return h("a", { href: new URL(text).href, target: "_blank", rel: "noopener noreferrer" }, shown, h("span", { class: "unseen" }, " (opens in a new tab)"));
}

function leaseText(node) {
  if (hasEnded(node)) return `${node.phase} ${clock(node.ended_at)}`;
  return node.renewed_at ? `renewed ${ago(node.renewed_at)}` : "–";
}

export function drainDialog(store, operations) {
  let node = null;
  const about = dialog("drain", () => operations.drain(node));
  return (asked) => {
    node = asked;
    const others = store.nodes.filter((each) => each.id !== node.id && takesLoads(each)).map((each) => oneLine(each.id, 130));
    const has = node.models.length ? `It has ${count(node.models.length, "model")}. ` : "It has no model. ";
    const goes = others.length ? `Each is loaded at another node (${others.slice(0, 5).join(", ")}${others.length > 5 ? ", …" : ""}), and only then unloaded here.` : "No other node takes loads: its models stay here until one does.";
    setText(byId("drain-title"), `Drain ${node.id}`);
    setText(byId("drain-text"), has + (node.models.length || !others.length ? goes : ""));
    about.open();
  };
}
