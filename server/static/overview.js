// The overview: what needs attention with cause, advice and a button for each, then the models, then memory.

import { WaitingForYou } from "./approvals.js";
import { Charts } from "./charts.js";
import { LoadDialog, openDialog, UnloadDialog } from "./dialogs.js";
import { bytes, count, named, oneLine } from "./format.js";
import { ModelsList } from "./models.js";
import { cancel } from "./operations.js";
import { acknowledge, alarmingProblems, openProblems, problems, showAgain } from "./problems.js";
import { href } from "./router.js";
import { models, nodes, resources, session } from "./state.js";
import { Button, Hint, html, ModelLink, Panel, useKeptFocus, useState } from "./ui.js";

const MOST = 12; // problems that are shown
const MOST_MEMBERS = 100; // of one entry: more are found in the list of models
const MOST_PARTS = 7; // of the bar: models that have one of their own; the smaller ones are one
const LABELS = { critical: "Failed", warning: "Warning", waiting: "Waiting", note: "Note" };

export function OverviewPage() {
  return html`<${Attention} /><${ModelsList} /><${Memory} />`;
}

function Attention() {
  useKeptFocus();
  const open = openProblems.value, away = problems.value.length - open.length;
  const listed = open.filter((problem) => problem.level !== "asked"), more = listed.length - MOST; // what is asked has a list of its own
  return html`
    <section class="attention" aria-labelledby="attention-title">
      <div class="head page-head"><h2 id="attention-title" tabindex="-1">What needs you</h2>
        <${MemoryLink} />
        ${away > 0 && html`
          <button id="attention-away" type="button" class="quiet" onClick=${showAgain}>
            ${away} acknowledged: show ${away === 1 ? "it" : "them"} again
          </button>`}
      </div>
      <${WaitingForYou} />
      <ul id="attention-list" class="problems">
        ${listed.slice(0, MOST).map((problem) => html`<${Problem} key=${problem.key} problem=${problem} />`)}
      </ul>
      ${open.length === 0 && html`<p class="well">${allWellText(away)}</p>`}
      ${more > 0 && html`<p class="hint">And ${more} more.</p>`}
      <${Said} />
    </section>`;
}

// The figure that matters of memory, which stands below the models.
function MemoryLink() {
  const { used_bytes: used, budget_bytes: budget } = resources.value;
  const scroll = () => document.getElementById("memory-text").scrollIntoView({ block: "center" });
  return html`<button type="button" class="quiet" onClick=${scroll}>Memory: ${bytes(used)} of ${bytes(budget)} used</button>`;
}

// Said when it changes, and not each second: nobody could listen to anything else.
function Said() {
  const titles = alarmingProblems.value.map((problem) => problem.title).sort();
  const told = titles.slice(0, MOST).join("; ") + (titles.length > MOST ? `; and ${titles.length - MOST} more` : "");
  return html`<p class="unseen" aria-live="polite">${told || "Nothing needs you."}</p>`;
}

const ACTS = {
  read_files: "read this user's files", write_files: "write this user's files", use_network: "use the network",
  start_processes: "start processes", read_memory: "read other processes' memory", run_code: "run code of its own",
  call_drivers: "call drivers of devices",
  manage_server: "manage this server's tokens",
};

// A banner on every page if workers are not fully confined. Nobody can put it away: it is so until the server starts anew.
export function Confinement() {
  const { mode, not_prevented: acts } = resources.value?.confinement ?? { not_prevented: [] };
  if (!acts.length) return null;
  const could = acts.map((act) => ACTS[act] ?? act).join(", ");
  const todo = mode === "off" ? "start the server with --confine=auto" : "allow Landlock and seccomp on this machine and in its containers";
  return html`
    <aside id="confinement" class="banner" aria-label="Confinement">
      Workers are not fully confined: a model that takes over its worker could ${could}. To change that, ${todo}.
    </aside>`;
}

function allWellText(away) {
  if (away) return "Nothing new.";
  if (!models.value.size) return "Nothing yet: add a first model below.";
  const loaded = [...models.value.values()].filter((model) => model.state === "loaded").length;
  return `Nothing: ${count(loaded, "model")} loaded, none failed or lost, no job waits.`;
}

const NAMES = { load: "Load…", swap: "Swap…", unload: "Unload…", cancel: "Cancel" };
const ACTIONS = {
  load: ({ model }) => openDialog(LoadDialog, { model }),
  swap: ({ model }) => openDialog(LoadDialog, { model }),
  unload: ({ model }) => openDialog(UnloadDialog, { model }),
  cancel: ({ job }) => cancel(job),
};

function Actions({ problem }) {
  if (!session.value.manages) return null;
  const possible = problem.actions.filter(({ model, job }) => model ?? job);
  return possible.map((action) => html`
    <${Button} key=${action.do} about=${action.model?.id ?? action.job.model_id} onClick=${() => ACTIONS[action.do](action)}>
      ${NAMES[action.do]}
    <//>`);
}

function Problem({ problem }) {
  const { level, title, why, todo, members, occurrence, model } = problem;
  const shown = model && !members.length ? html`<a href=${href("models", model)}>${title}</a>` : title;
  return html`
    <li class="problem ${level}">
      <div class="words">
        <p><span class="level">${LABELS[level]}</span> <strong>${shown}</strong></p>
        ${why && html`<p class="why">${why}</p>`}
        <p class="todo">${todo}</p>
        ${members.length > 0 && html`<${Members} members=${members} />`}
      </div>
      <div class="do">
        <${Actions} problem=${problem} />
        ${occurrence !== null && html`<${Button} about=${title} onClick=${() => acknowledge(problem)}>Acknowledge<//>`}
      </div>
    </li>`;
}

function Members({ members }) {
  const [isOpen, setOpen] = useState(false), more = members.length - MOST_MEMBERS;
  const item = (each) => html`
    <li key=${each.key}>
      <div class="words"><${ModelLink} id=${each.model} /><p class="why">${each.why}</p></div>
      <div class="do"><${Actions} problem=${each} /></div>
    </li>`;
  return html`
    <details onToggle=${(event) => setOpen(event.target.open)}>
      <summary>${isOpen ? "Hide them" : "Show them"}</summary>
      ${isOpen && html`<ul class="members">${members.slice(0, MOST_MEMBERS).map(item)}</ul>`}
      ${isOpen && more > 0 && html`<p class="hint">And ${more} more: choose their state in the list of models.</p>`}
    </details>`;
}

// The memory budget as a bar: who uses how much of it, what is reserved, what is free. A part's colour is its state. The
// charts stand below it.
function Memory() {
  const { budget_bytes: budget, used_bytes: used, reserved_bytes: reserved, free_bytes: free } = resources.value;
  const level = free < 0 ? "over" : free < budget / 10 ? "tight" : "fine", whole = Math.max(budget, used + reserved, 1);
  const parts = partsOf(resources.value), text = memoryText(resources.value);
  const { devices, device_problems: troubles, memory } = resources.value;
  return html`
    <${Panel} kind="memory" title="Memory" controls=${html`<p id="memory-text" class="figures">${text}</p>`}>
      <div class="bar ${level}" role="img" aria-label="Memory: ${text}">
        ${parts.map(({ kind, name, bytes: size }) => html`
          <span class="part ${kind}" style=${{ width: `${(100 * size) / whole}%` }}>${name}</span>`)}
      </div>
      <ul class="legend">
        ${parts.map((part) => html`
          <li><span class="swatch ${part.kind}" aria-hidden="true"></span>${partText(part)}</li>`)}
      </ul>
      ${devices.length > 1 && html`<ul id="devices" class="legend">${devices.slice(1).map((each) => html`<li key=${each.device}>${deviceText(each)}</li>`)}</ul>`}
      ${memory && !memory.excess_bytes && html`<${Hint}>${oneLine(memory.summary, 1000)}<//>`}
      ${troubles.map((text) => html`<${Hint}>${oneLine(text, 400)}<//>`)}
      <${Charts} />
    <//>`;
}

function deviceText({ device, provider, version, hardware, models: there, ...of }) {
  const memory = [`${bytes(of.used_bytes)} used`, of.reserved_bytes ? `${bytes(of.reserved_bytes)} reserved` : null];
  memory.push(of.budget_bytes == null ? null : `budget ${bytes(of.budget_bytes)}`, of.free_bytes == null ? null : `${bytes(of.free_bytes)} free`);
  const about = oneLine([hardware, `${provider} ${version}`].filter(Boolean).join(", "), 160);
  return `${oneLine(device, 80)} (${about}): ${memory.filter(Boolean).join(", ")}; ${count(there, "model")}`;
}

const partText = ({ name, bytes: size, note }) => `${name}: ${bytes(size)}${note ? `, ${note}` : ""}`;

// Of one node, where there are nodes.
function memoryText({ budget_bytes: budget, used_bytes: used, reserved_bytes: reserved, free_bytes: free, max_loaded: most }) {
  const here = nodes.value.find((node) => node.this), limit = most ? `; ${count(most, "model")} may be loaded at once` : "";
  const rest = free < 0 ? `${bytes(-free)} over budget` : `${bytes(free)} free`;
  const taken = [`${bytes(used)} used`, reserved ? `${bytes(reserved)} reserved` : null, rest].filter(Boolean).join(", ");
  return `${here ? `Of ${oneLine(here.id, 130)}: ` : ""}${taken}, of a budget of ${bytes(budget)}${limit}.`;
}

function partsOf({ models: all }) {
  const uses = [...all].sort((a, b) => b.memory_bytes - a.memory_bytes || (a.job_id < b.job_id ? -1 : 1));
  const own = uses.slice(0, MOST_PARTS), others = uses.slice(MOST_PARTS), reserving = uses.filter((use) => use.reserved_bytes > 0);
  const nameOf = (use) => named(use.model_id, use.version);
  const sum = (rest, name) => rest.reduce((total, use) => total + use[name], 0);
  const used = (use) => ({ kind: use.phase, name: nameOf(use), bytes: use.memory_bytes, note: use.phase === "serving" ? "" : use.phase });
  const reserved = (use) => ({ kind: "reserved", name: nameOf(use), bytes: use.reserved_bytes, note: "reserved" });
  const parts = [
    ...own.map(used),
    { kind: "serving", name: count(others.length, "other"), bytes: sum(others, "memory_bytes"), note: "" },
    ...reserving.slice(0, MOST_PARTS).map(reserved),
    { kind: "reserved", name: "others", bytes: sum(reserving.slice(MOST_PARTS), "reserved_bytes"), note: "reserved" },
  ];
  return parts.filter((part) => part.bytes > 0);
}
