// The nodes that share the ledger: which are there, what runs where, and draining one. A server alone has none.

import { dialog } from "./dialogs.js";
import { button, byId, el, keyed, setAttribute, setText, show, tell } from "./dom.js";
import { ago, bytes, clock, count, oneLine } from "./format.js";
import { href } from "./router.js";

const ORDER = ["lost", "draining", "joined", "left"];
const MOST = 50; // nodes that are shown: more have left long ago
const MOST_MODELS = 20; // of a node; the list of models has all

const takesLoads = (node) => node.phase === "joined";
const hasEnded = (node) => node.phase === "left" || node.phase === "lost";

export function nodesView(store, offers) {
  const draw = () => {
    const nodes = [...store.nodes].sort((a, b) => ORDER.indexOf(a.phase) - ORDER.indexOf(b.phase) || (a.id < b.id ? -1 : 1));
    show(byId("nodes"), nodes.length > 0);
    keyed(byId("nodes-rows"), nodes.slice(0, MOST), (node) => node.id, (node) => row(node, offers, store), (made, node) => made.update(node));
    const joined = nodes.filter(takesLoads).length;
    setText(byId("nodes-count"), `${joined} joined${joined === nodes.length ? "" : ` of ${nodes.length}`}`);
    tell(byId("nodes-more"), nodes.length > MOST ? `And ${nodes.length - MOST} more: loadledger nodes lists them.` : "");
  };
  show(byId("nodes-do"), Boolean(offers.drain));
  store.watch(draw);
  setInterval(draw, 1000);
}

function row(first, offers, store) {
  const cell = (label, kind = null) => el("td", { "data-label": label, class: kind, role: "cell" });
  const badges = { this: el("span", { class: "badge", title: "The server of this page." }, "this node"), placer: el("span", { class: "badge", title: "It chooses the nodes of loads." }, "places loads") };
  const pill = el("span", { class: "pill" }), late = el("span", { class: "error" }), models = el("ul", { class: "at-node" }), more = el("span", { class: "dim" });
  const phase = cell("Phase"), what = cell("Models"), cells = { jobs: cell("Jobs"), lease: cell("Lease"), budget: cell("Budget", "number") };
  const about = cell("Address"), address = addressOf(first.address), labels = el("div", { class: "dim" });
  phase.append(pill, late);
  what.append(models, more);
  about.append(address, labels);
  const drain = offers.drain && button("Drain…", first.id, () => offers.drain(store.nodes.find((node) => node.id === first.id) ?? first));
  const made = el("tr", { role: "row" }, el("th", { scope: "row", role: "rowheader" }, el("span", { class: "name" }, oneLine(first.id, 130)), badges.this, badges.placer), phase, what, ...Object.values(cells), about);
  if (drain) made.append(el("td", { role: "cell" }, el("div", { class: "do" }, drain)));
  made.update = (node) => {
    show(badges.this, node.this);
    show(badges.placer, node.placer);
    setText(pill, node.phase);
    setAttribute(pill, "class", `pill ${node.phase}`);
    setText(late, [node.trusted === false ? "not trusted" : "", node.late ? "late" : ""].filter(Boolean).join(", "));
    keyed(models, node.models.slice(0, MOST_MODELS), (model) => model.id, modelItem, (item, model) => setText(item.lastChild, ` ${model.version}${model.state === "loaded" ? "" : `, ${model.state}`}`));
    setText(more, node.models.length > MOST_MODELS ? `and ${node.models.length - MOST_MODELS} more` : node.models.length ? "" : "–");
    setText(cells.jobs, node.jobs.length ? node.jobs.slice(0, 3).map((job) => `${job.kind} of ${job.model_id}`).join(", ") + (node.jobs.length > 3 ? ` and ${node.jobs.length - 3} more` : "") : "–");
    setText(cells.lease, leaseText(node));
    setAttribute(cells.lease, "title", node.renewed_at);
    setText(cells.budget, bytes(node.budget_bytes));
    if (address.textContent !== node.address) address.replaceWith(addressOf(node.address));
    setText(labels, [...node.labels, node.release].filter(Boolean).map((text) => oneLine(text, 130)).join(", "));
    for (const each of Object.values(cells)) each.classList.toggle("none", each.textContent === "–");
    what.classList.toggle("none", !node.models.length);
    if (drain) show(drain, takesLoads(node));
  };
  return made;
}

function modelItem(model) {
  return el("li", {}, el("a", { href: href("models", model.id) }, model.id), el("span", { class: "dim" }));
}

// A node's own page, in a tab of its own; what is no address of one is text.
function addressOf(text) {
  const shown = oneLine(text, 300);
  if (!/^https?:\/\//.test(text) || !URL.canParse(text)) return el("span", {}, shown);
  return el("a", { href: new URL(text).href, target: "_blank", rel: "noopener noreferrer" }, shown, el("span", { class: "unseen" }, " (opens in a new tab)"));
}

function leaseText(node) {
  if (hasEnded(node)) return `${node.phase} ${clock(node.ended_at)}`;
  return node.renewed_at ? `renewed ${ago(node.renewed_at)}` : "–";
}

export function drainDialog(store, actions) {
  let node = null;
  const about = dialog("drain", () => actions.drain(node));
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
