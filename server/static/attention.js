// Problems at the top of the page, with cause, advice and a button for each, and those that were acknowledged.

import { button, byId, h, reconcile, setAttribute, setText, show, showText } from "./dom.js";
import { count } from "./format.js";
import { problems } from "./problems.js";
import { href } from "./router.js";
import { keep, recall } from "./session.js";

const KEPT = "loadledger.acknowledged";
const MOST_KEPT = 1000; // acknowledgements; the oldest are forgotten
const MOST = 12;
const MOST_MEMBERS = 100; // of one entry: more are found in the list of models
const LABELS = { critical: "Failed", warning: "Warning", waiting: "Waiting" };

export function attentionView(store, actions) {
  const acknowledged = new Acknowledged();
  let said = null;
  const draw = () => {
    showText(byId("confinement"), confinementWarning(store.resources?.confinement));
    const all = problems(store), open = all.filter((problem) => !acknowledged.has(problem)), shown = open.slice(0, MOST);
    const put = { actions, acknowledge: (problem) => (acknowledged.add(problem), draw()) };
    reconcile(byId("attention-list"), shown, (problem) => problemItem(problem, put), identity);
    const more = open.length - shown.length, away = all.length - open.length;
    showText(byId("attention-none"), open.length ? (more > 0 ? `And ${more} more.` : "") : allWellText(store, away));
    show(byId("attention-away"), away > 0);
    setText(byId("attention-away"), `${away} acknowledged: show ${away === 1 ? "it" : "them"} again`);
    const titles = open.filter((problem) => problem.level !== "waiting").map((problem) => problem.title).sort();
    const told = titles.slice(0, MOST).join("; ") + (titles.length > MOST ? `; and ${titles.length - MOST} more` : "");
    // Said when it changes, and not each second: nobody could listen to anything else.
    if (told !== said && store.resources) setText(byId("attention-said"), (said = told) || "Nothing needs you.");
    document.title = `${open.some((each) => each.level === "critical") || store.connection.mode === "lost" ? "⚠ " : ""}loadledger: ${store.subject ?? "console"}`;
  };
  byId("attention-away").addEventListener("click", () => {
    acknowledged.clear(problems(store));
    draw();
  });
  store.watch(draw);
}

// An entry of several is another one when it has other members' buttons.
const identity = (problem) => (problem.members.length ? `${problem.key} of several` : problem.key);

const ACTS = {
  read_files: "read this user's files", write_files: "write this user's files", use_network: "use the network",
  start_processes: "start processes", read_memory: "read other processes' memory",
};

// Nobody can put this line away: it is so until the server starts anew.
function confinementWarning(confinement) {
  if (!confinement?.not_prevented.length) return "";
  const acts = confinement.not_prevented.map((act) => ACTS[act] ?? act).join(", ");
  const todo = confinement.mode === "off" ? "start the server with --confine=auto" : "allow Landlock and seccomp on this machine and in its containers";
  return `Workers are not fully confined: a model that takes over its worker could ${acts}. To change that, ${todo}.`;
}

function allWellText(store, away) {
  if (!store.resources) return "Loading…";
  if (away) return "Nothing new.";
  if (!store.models.size) return "Nothing yet: add a first model below.";
  const loaded = [...store.models.values()].filter((model) => model.state === "loaded").length;
  return `Nothing: ${count(loaded, "model")} loaded, none failed or lost, no job waits.`;
}

const NAMES = { load: "Load…", swap: "Swap…", unload: "Unload…", cancel: "Cancel" };

function buttonsOf(problem, actions) {
  const made = [];
  for (const action of problem.actions) {
    const act = actions[action.do === "swap" ? "load" : action.do];
    const subject = action.model ?? action.job;
    if (act && subject) made.push(button(NAMES[action.do], action.model?.id ?? action.job.model_id, () => act(subject)));
  }
  return made;
}

function problemItem(first, { actions, acknowledge }) {
  let now = first;
  const label = h("span", { class: "level" }), title = h("strong"), why = h("p", { class: "why" }), todo = h("p", { class: "todo" });
  const members = first.members.length ? h("details", {}, h("summary"), h("ul", { class: "members" }), h("p", { class: "hint" })) : null;
  const put = button("Acknowledge", first.title, () => acknowledge(now));
  const buttons = h("div", { class: "do" }, ...buttonsOf(first, actions), put);
  const node = h("li", {}, h("div", { class: "words" }, h("p", {}, label, " ", title), why, todo, members), buttons);
  const drawMembers = () => {
    const [line, list, more] = members.children;
    setText(line, members.open ? "Hide them" : "Show them");
    if (!members.open) return;
    reconcile(list, now.members.slice(0, MOST_MEMBERS), (each) => memberItem(each, actions), (each) => each.key);
    showText(more, now.members.length > MOST_MEMBERS ? `And ${now.members.length - MOST_MEMBERS} more: choose their state in the list of models.` : "");
  };
  members?.addEventListener("toggle", drawMembers);
  node.update = (problem) => {
    now = problem;
    setAttribute(node, "class", `problem ${problem.level}`);
    setText(label, LABELS[problem.level]);
    setText(title, problem.title);
    showText(why, problem.why);
    setText(todo, problem.todo);
    show(put, problem.occurrence !== null);
    if (members) drawMembers();
  };
  return node;
}

function memberItem(first, actions) {
  const name = h("a", { href: href("models", first.model) }, first.model), why = h("p", { class: "why" });
  const item = h("li", {}, h("div", { class: "words" }, name, why), h("div", { class: "do" }, ...buttonsOf(first, actions)));
  item.update = (problem) => setText(why, problem.why);
  return item;
}

// What somebody has acknowledged in this browser: each problem by its occurrence, so that a new one is shown again.
class Acknowledged {
  #known = new Map(readKept());

  // A problem without an occurrence cannot be acknowledged: it goes by itself.
  has(problem) {
    return problem.occurrence !== null && this.#known.get(problem.key) === problem.occurrence;
  }

  add(problem) {
    for (const each of [problem, ...problem.members]) {
      this.#known.delete(each.key);
      this.#known.set(each.key, each.occurrence);
    }
    this.#keep();
  }

  clear(problems) {
    for (const problem of problems) for (const each of [problem, ...problem.members]) this.#known.delete(each.key);
    this.#keep();
  }

  #keep() {
    const kept = [...this.#known].slice(-MOST_KEPT);
    keep("localStorage", KEPT, kept.length ? JSON.stringify(kept) : null);
  }
}

function readKept() {
  try {
    const kept = JSON.parse(recall("localStorage", KEPT) ?? "[]");
    return Array.isArray(kept) ? kept.filter((pair) => Array.isArray(pair) && pair.length === 2) : [];
  } catch {
    return []; // nothing of this page
  }
}
