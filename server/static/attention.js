// Problems at the top of the page: what is wrong, why, what to do, and a button for it.

import { button, byId, el, keyed, setAttribute, setText, tell } from "./dom.js";
import { count } from "./format.js";
import { problems } from "./problems.js";

const MOST = 12;
const LABELS = { critical: "Failed", warning: "Warning", waiting: "Waiting" };

export function attentionView(store, offers) {
  let said = null;
  const draw = () => {
    tell(byId("confinement"), openConfinement(store.resources?.confinement));
    const all = problems(store), shown = all.slice(0, MOST);
    keyed(byId("attention-list"), shown, (problem) => problem.key, (problem) => item(problem, offers), (node, problem) => node.update(problem));
    const more = all.length - shown.length;
    tell(byId("attention-none"), all.length ? (more > 0 ? `And ${more} more.` : "") : well(store));
    const titles = all.filter((problem) => problem.level !== "waiting").map((problem) => problem.title).sort();
    const told = titles.slice(0, MOST).join("; ") + (titles.length > MOST ? `; and ${titles.length - MOST} more` : "");
    // Said when it changes, and not each second: nobody could listen to anything else.
    if (told !== said && store.resources) setText(byId("attention-said"), (said = told) || "Nothing needs attention.");
    document.title = `${all.some((each) => each.level === "critical") || store.connection.mode === "lost" ? "⚠ " : ""}loadledger: console`;
  };
  store.watch(draw);
  setInterval(draw, 1000);
}

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

function well(store) {
  if (!store.resources) return "Loading…";
  const loaded = [...store.models.values()].filter((model) => model.state === "loaded").length;
  return `Nothing: ${count(loaded, "model")} loaded, none failed or lost, no job waits.`;
}

function item(first, offers) {
  const label = el("span", { class: "level" }), title = el("strong"), why = el("p", { class: "why" }), todo = el("p", { class: "todo" });
  const names = { load: "Load…", swap: "Swap…", unload: "Unload…", cancel: "Cancel" };
  const node = el("li", {}, el("div", { class: "words" }, el("p", {}, label, " ", title), why, todo));
  const buttons = el("div", { class: "do" });
  for (const offer of first.offers) {
    const act = offers[offer.do === "swap" ? "load" : offer.do];
    const subject = offer.model ?? offer.job;
    if (act && subject) buttons.append(button(names[offer.do], offer.model?.id ?? offer.job.model_id, () => act(subject)));
  }
  if (buttons.children.length) node.append(buttons);
  node.update = (problem) => {
    setAttribute(node, "class", `problem ${problem.level}`);
    setText(label, LABELS[problem.level]);
    setText(title, problem.title);
    tell(why, problem.why);
    setText(todo, problem.todo);
  };
  return node;
}
