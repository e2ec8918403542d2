// What needs somebody, at the top of the page: what is wrong, why, what to do, and a button for it.

import { Acknowledged } from "./acknowledged.js";
import { button, byId, el, keyed, setAttribute, setText, show, tell } from "./dom.js";
import { count } from "./format.js";
import { problems } from "./problems.js";
import { href } from "./router.js";

const MOST = 12;
const MOST_MEMBERS = 100; // of one entry: more are found in the list of models
const LABELS = { critical: "Failed", warning: "Warning", waiting: "Waiting" };

export function attentionView(store, offers) {
  const acknowledged = new Acknowledged();
  let said = null;
  const draw = () => {
    tell(byId("confinement"), openConfinement(store.resources?.confinement));
    const all = problems(store), open = all.filter((problem) => !acknowledged.has(problem)), shown = open.slice(0, MOST);
    const put = { offers, acknowledge: (problem) => (acknowledged.add(problem), draw()) };
    keyed(byId("attention-list"), shown, identity, (problem) => item(problem, put), (node, problem) => node.update(problem));
    const more = open.length - shown.length, away = all.length - open.length;
    tell(byId("attention-none"), open.length ? (more > 0 ? `And ${more} more.` : "") : well(store, away));
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
  setInterval(draw, 1000);
}

// An entry of several is another one when it has other members' buttons.
const identity = (problem) => (problem.members.length ? `${problem.key} of several` : problem.key);

const ACTS = {
  read_files: "read this user's files", write_files: "write this user's files", use_network: "use the network",
  start_processes: "start processes", read_memory: "read other processes' memory",
};

// Nobody can put this line away: it is so until the server starts anew.
function openConfinement(confinement) {
  if (!confinement?.not_prevented.length) return "";
  const acts = confinement.not_prevented.map((act) => ACTS[act] ?? act).join(", ");
  const todo = confinement.mode === "off" ? "start the server with --confine=auto" : "allow Landlock and seccomp on this machine and in its containers";
  return `Workers are not fully confined: a model that takes over its worker could ${acts}. To change that, ${todo}.`;
}

function well(store, away) {
  if (!store.resources) return "Loading…";
  if (away) return "Nothing new.";
  if (!store.models.size) return "Nothing yet: add a first model below.";
  const loaded = [...store.models.values()].filter((model) => model.state === "loaded").length;
  return `Nothing: ${count(loaded, "model")} loaded, none failed or lost, no job waits.`;
}

const NAMES = { load: "Load…", swap: "Swap…", unload: "Unload…", cancel: "Cancel" };

function buttonsOf(problem, offers) {
  const made = [];
  for (const offer of problem.offers) {
    const act = offers[offer.do === "swap" ? "load" : offer.do];
    const subject = offer.model ?? offer.job;
    if (act && subject) made.push(button(NAMES[offer.do], offer.model?.id ?? offer.job.model_id, () => act(subject)));
  }
  return made;
}

function item(first, { offers, acknowledge }) {
  let now = first;
  const label = el("span", { class: "level" }), title = el("strong"), why = el("p", { class: "why" }), todo = el("p", { class: "todo" });
  const members = first.members.length ? el("details", {}, el("summary"), el("ul", { class: "members" }), el("p", { class: "hint" })) : null;
  const put = button("Acknowledge", first.title, () => acknowledge(now));
  const buttons = el("div", { class: "do" }, ...buttonsOf(first, offers), put);
  const node = el("li", {}, el("div", { class: "words" }, el("p", {}, label, " ", title), why, todo, members), buttons);
  const drawMembers = () => {
    const [line, list, more] = members.children;
    setText(line, members.open ? "Hide them" : "Show them");
    if (!members.open) return;
    const make = (each) => memberOf(each, offers);
    keyed(list, now.members.slice(0, MOST_MEMBERS), (each) => each.key, make, (part, each) => setText(part.querySelector(".why"), each.why));
    tell(more, now.members.length > MOST_MEMBERS ? `And ${now.members.length - MOST_MEMBERS} more: choose their state in the list of models.` : "");
  };
  members?.addEventListener("toggle", drawMembers);
  node.update = (problem) => {
    now = problem;
    setAttribute(node, "class", `problem ${problem.level}`);
    setText(label, LABELS[problem.level]);
    setText(title, problem.title);
    tell(why, problem.why);
    setText(todo, problem.todo);
    show(put, problem.occurrence !== null);
    if (members) drawMembers();
  };
  return node;
}

function memberOf(problem, offers) {
  const name = el("a", { href: href("models", problem.model) }, problem.model);
  return el("li", {}, el("div", { class: "words" }, name, el("p", { class: "why" }, problem.why)), el("div", { class: "do" }, ...buttonsOf(problem, offers)));
}
