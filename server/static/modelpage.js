// The page of one model: facts, charts, inputs and outputs, programs that call it, versions, jobs and events.

import { errorText, requestErrorText } from "./api.js";
import { actionsCell, button, byId, cell, h, reconcile, setAttribute, setText, show, showText, statePill, tableRow } from "./dom.js";
import { summary, toneOf } from "./eventtext.js";
import { broughtBack, clock, count, oneLine, plain, stamp } from "./format.js";
import { jobItem } from "./jobs.js";
import { factsOf, fileList, modelBadges, modelButtons } from "./models.js";
import { href } from "./router.js";
import { snippets } from "./snippets.js";
import { rangeSwitch, trafficCharts } from "./charts.js";

const JOBS = 10;
const EVENTS = 20; // of a page
const NAMING = ["ModelLoaded", "VersionAdded"]; // events that name the bytes of a version
const LOADS = 100; // the last ones of them
const PAUSE_MS = 500; // between an event and the look at what it changed
const MEMORY = [{ kind: "plain", name: "memory", of: (point) => point.memory_bytes }];

export class ModelPage {
  #id = null;
  #due = null;
  #parts = null;

  // `actions` has what may be done, `session` who asks, and `series` the charts.
  constructor({ api, store, router, series, actions, session }) {
    Object.assign(this, { api, store, router, series, actions, session });
    router.watch(({ view, id }) => this.#open(view === "models" ? id : null));
    store.listeners.push((event) => this.#id !== null && event.model_id === this.#id && this.#schedule());
    store.watch(() => this.#draw());
  }

  #open(id) {
    if (id === this.#id) return;
    this.#id = id;
    clearTimeout(this.#due);
    this.store.subject = id;
    this.store.notify();
    this.series.choose({ modelId: id });
    this.#parts = id === null ? null : this.#build(id);
    byId("model-page").replaceChildren(...(this.#parts ? this.#parts.nodes : []));
    if (id === null) return;
    this.#draw();
    this.#fetch();
    scrollTo(0, 0);
    this.#parts.title.focus({ preventScroll: true });
  }

  #build(id) {
    const path = `/api/v1/models/${encodeURIComponent(id)}`;
    const title = h("h2", { tabindex: "-1", class: "name" }, id);
    const head = headPart(id, title, this.actions, this.store);
    const charts = trafficCharts(MEMORY, () => this.#used()), range = rangeSwitch(this.series, "model");
    const traffic = panel("traffic", "Requests and memory", [range.node], h("div", { class: "charts" }, ...charts.nodes));
    const tensors = tensorsPart(), calls = callsPart(id), versions = versionsPart(id, this.actions, this.store);
    const jobs = panel("its-jobs", "Jobs", [], h("ul", { class: "jobs-list" }), h("p", { class: "hint" }));
    const parts = { title, head, charts, range, tensors, calls, versions, jobs, path };
    parts.nodes = [head.node, traffic, h("div", { class: "halves" }, tensors.node, calls.node), versions.node];
    const past = [jobs];
    if (this.session.audits) past.push((parts.events = eventsPart(this.api, id)).node);
    parts.nodes.push(h("div", { class: "halves" }, ...past));
    if (this.session.manages) parts.nodes.push((parts.printed = printedPart(this.api, path)).node);
    return parts;
  }

  #schedule() {
    clearTimeout(this.#due);
    this.#due = setTimeout(() => this.#fetch(), PAUSE_MS);
  }

  // Asks for what only this page shows. Each part says itself what went wrong with it.
  async #fetch() {
    if (!this.#parts) return; // the page was left meanwhile
    const parts = this.#parts, { path } = parts; // of this model, even if the page shows another one by then
    const jobs = this.api.get(`/api/v1/jobs?model=${encodeURIComponent(this.#id)}&limit=${JOBS}`);
    const found = await Promise.allSettled([
      this.#fetchModel(path), jobs, parts.events?.fetch(), this.#fetchLoads(), parts.printed?.fetch(),
    ]);
    const [model, its, , loads] = found.map(({ value, reason }) => value ?? { refusal: reason ? errorText(reason) : "" });
    parts.model = model;
    parts.loads = loads;
    parts.found = its;
    parts.tensors.draw(model);
    parts.calls.draw(model);
    this.#draw();
  }

  // Its memory now; nothing where it has no process.
  #used() {
    const use = this.store.useOf({ id: this.#id });
    return use.processes ? use.memory_bytes : null;
  }

  // The model with its inputs and outputs, which the protocol's metadata has for a loaded one.
  async #fetchModel(path) {
    const model = await this.api.get(path);
    if (model.inputs || model.state !== "loaded") return model;
    try {
      const { inputs, outputs } = await this.api.get(`/v2/models/${encodeURIComponent(model.id)}`);
      return { ...model, inputs, outputs };
    } catch {
      return model; // it is not loaded any more
    }
  }

  // The events that name the bytes of its versions, newest first.
  async #fetchLoads() {
    if (!this.session.audits) return { events: [] };
    const query = new URLSearchParams({ model: this.#id, before: Number.MAX_SAFE_INTEGER, limit: LOADS });
    for (const type of NAMING) query.append("type", type);
    return this.api.get(`/api/v1/events?${query}`);
  }

  #draw() {
    const parts = this.#parts;
    if (!parts) return;
    const known = this.store.models.get(this.#id), model = known ?? (parts.model?.id ? parts.model : null);
    parts.head.draw(model, parts.model?.refusal);
    parts.charts.draw(this.series.model);
    parts.range.draw();
    if (model) parts.versions.draw(model, parts.loads?.events ?? []);
    this.#drawJobs(parts);
  }

  // Its jobs as they were asked for, with what the page has heard of them since.
  #drawJobs({ jobs, found }) {
    if (!found) return;
    const live = new Map(this.store.jobsNow().map((job) => [job.id, job]));
    const shown = (found.jobs ?? []).map((job) => live.get(job.id) ?? job);
    reconcile(jobs.querySelector("ul"), shown, (job) => jobItem(job, { cancel: this.actions.cancel }));
    showText(jobs.querySelector(".hint"), found.refusal ?? (shown.length ? "" : "It was never loaded."));
  }
}

// Its name and state, what may be done, and the facts of the moment.
function headPart(id, title, actions, store) {
  const pill = statePill(), refusal = h("p", { class: "refusal", hidden: true }), badges = modelBadges(), buttons = modelButtons({ id }, actions, store);
  const values = Object.fromEntries(["Version", "Node", "Memory now", "Loaded", "Last use", "In flight", "Workers"].map((name) => [name, h("dd")]));
  const list = h("dl", { class: "facts" }, ...Object.entries(values).map(([name, value]) => h("div", {}, h("dt", {}, name), value)));
  const node = h("section", { class: "panel model-head", "aria-label": `Model ${id}` },
    h("p", { class: "crumbs" }, h("a", { href: href() }, "‹ All models")),
    h("div", { class: "head" }, h("div", { class: "titles" }, title, pill, ...badges.nodes), h("div", { class: "do" }, ...buttons.nodes)), refusal, list);
  const draw = (model, problem) => {
    for (const part of [pill, list]) show(part, model !== null);
    if (!model) {
      for (const part of [...badges.nodes, ...buttons.nodes]) show(part, false);
      return showText(refusal, problem ?? "");
    }
    const facts = factsOf(model, store);
    pill.update(model.state);
    badges.update(model, store);
    showText(refusal, model.error ? `${model.error.code}: ${plain(model.error.message)}` : "");
    setText(values.Version, facts.version);
    show(values.Node.parentNode, store.nodes.length > 0);
    setText(values.Node, facts.node);
    setText(values["Memory now"], [facts.memory, store.useOf(model).serving && facts.memoryAtLoad].filter(Boolean).join(", "));
    setText(values.Loaded, model.loaded_at ? `${stamp(model.loaded_at)} by ${oneLine(model.loaded_by, 130)}${broughtBack(model)}` : "–");
    setText(values["Last use"], facts.lastUse);
    setText(values["In flight"], facts.inFlight);
    setText(values.Workers, model.instances ? `${count(model.instances, "worker")}${model.threads ? ` of ${count(model.threads, "thread")}` : ""}` : "–");
    buttons.update(model);
  };
  return { node, draw };
}

function panel(kind, title, controls, ...children) {
  const heading = h("h3", { id: `page-${kind}` }, title);
  return h("section", { class: `panel ${kind}`, "aria-labelledby": `page-${kind}` }, h("div", { class: "head" }, heading, ...controls), ...children);
}

// Its inputs and outputs.
function tensorsPart() {
  const rows = h("tbody"), none = h("p", { class: "hint" });
  const table = h("table", { class: "tensors" }, h("thead", {}, h("tr", {}, ...["", "Name", "Type", "Shape"].map((name) => h("th", { scope: "col" }, name || h("span", { class: "unseen" }, "Kind"))))), rows);
  const node = panel("its-tensors", "Inputs and outputs", [], table, none, h("p", { class: "hint" }, "A size that the model leaves open is written as −1: any length."));
  const draw = (model) => {
    const tensors = [...(model.inputs ?? []).map((tensor) => ["input", tensor]), ...(model.outputs ?? []).map((tensor) => ["output", tensor])];
    rows.replaceChildren(...tensors.map(([kind, { name, datatype, shape }]) =>
      h("tr", {}, h("td", { class: "dim" }, kind), h("th", { scope: "row" }, oneLine(name, 200)), h("td", {}, oneLine(datatype, 20)), h("td", {}, h("code", {}, `[${shape.join(", ").replaceAll("-", "−")}]`)))));
    for (const part of [table, node.lastChild]) show(part, tensors.length > 0);
    showText(none, tensors.length ? "" : model.refusal ?? "Its file does not say: they are known when it is loaded.");
  };
  return { node, draw };
}

// How to ask it from elsewhere, to be copied.
function callsPart(id) {
  const text = h("pre", { tabindex: "0", role: "group", "aria-label": "The program" }), tabs = h("div", { class: "segmented", role: "group", "aria-label": "Language" });
  const copied = h("span", { class: "hint", role: "status" }), none = h("p", { class: "hint" });
  let written = [], chosen = 0;
  const choose = (number) => {
    chosen = number;
    setText(text, written[chosen]?.text ?? "");
    [...tabs.children].forEach((tab, at) => setAttribute(tab, "aria-pressed", String(at === chosen)));
    setText(copied, "");
  };
  const copy = button("Copy", "the program", () => copyText(text.textContent, copied));
  const node = panel("its-calls", "Ask it from elsewhere", [tabs], text,
    h("p", { class: "buttons" }, copy, copied), none,
    h("p", { class: "hint" }, "TOKEN is a token with the role predict. To make one, run on the server: ", h("code", {}, "loadledger token --data DATA --role predict --subject YOU")));
  const draw = (model) => {
    written = model.inputs ? snippets(location.origin, id, model.inputs) : [];
    tabs.replaceChildren(...written.map(({ name }, number) => h("button", { type: "button", onclick: () => choose(number) }, name)));
    for (const part of [text, tabs, copy]) show(part, written.length > 0);
    showText(none, !written.length ? "The programs name its inputs, which are known when it is loaded." : model.state === "loaded" ? "" : "It has to be loaded first.");
    choose(chosen);
  };
  return { node, draw };
}

async function copyText(text, status) {
  try {
    await navigator.clipboard.writeText(text);
    setText(status, "Copied.");
  } catch {
    setText(status, "The browser does not allow that: select the text and copy it."); // without TLS, for instance
  }
}

// Its versions, with the bytes that each had when it was loaded last.
function versionsPart(id, actions, store) {
  const rows = h("tbody"), none = h("p", { class: "hint" });
  const head = ["Version", "State", "Files and their SHA-256", ""].map((name) => h("th", { scope: "col" }, name || h("span", { class: "unseen" }, "Operations")));
  const table = h("table", { class: "cards versions" }, h("thead", {}, h("tr", {}, ...head)), rows);
  const add = actions.add ? [button("Add a version…", `of ${id}`, () => actions.add({ modelId: id }))] : [];
  const node = panel("its-versions", "Versions and files", add, table, none);
  if (actions.add) actions.takeDrops(node, { modelId: id });
  const draw = (model, loads) => {
    const all = [...new Set([...(model.versions ?? []), ...(model.version === null ? [] : [model.version])])].sort((a, b) => b - a);
    const items = all.map((version) => ({ version, model, event: loads.find((event) => event.version === version) }));
    reconcile(rows, items, ({ version }) => versionRow(version, actions, () => store.models.get(id) ?? model), ({ version }) => version);
    show(table, all.length > 0);
    showText(none, all.length ? "" : `The repository has no version of it. ${actions.add ? "Drop an ONNX file here." : ""}`);
  };
  return { node, draw };
}

function versionRow(version, actions, current) {
  const state = cell("State"), files = fileList(), since = h("p", { class: "hint" });
  const load = actions.load && button("Load…", `version ${version}`, () => actions.load(current(), version));
  const row = tableRow([`Version ${version}`], state, h("td", { class: "hashes", role: "cell" }, files, since), actionsCell(load));
  row.update = ({ model, event }) => {
    const serves = model.version === version, found = serves && model.files.length ? model.files : event?.data.files ?? [];
    setText(state, serves ? model.state : model.next_version === version ? "is being loaded" : model.versions?.includes(version) ? "in the repository" : "gone from the repository");
    files.update(found);
    showText(since, found.length ? (serves || !event ? "" : `As it was ${event.type === "VersionAdded" ? "added" : "loaded"} ${stamp(event.recorded_at)}.`) : "Its hashes are recorded when it is loaded.");
    if (load) show(load, !serves || model.state !== "loaded");
  };
  return row;
}

// Its events, newest first, a page at a time.
function eventsPart(api, id) {
  const list = h("ol", { class: "events" }), none = h("p", { class: "hint" });
  let events = [], cursor = null;
  const fetch = async (before = Number.MAX_SAFE_INTEGER) => {
    try {
      const page = await api.get(`/api/v1/events?${new URLSearchParams({ model: id, before, limit: EVENTS })}`);
      const kept = before === Number.MAX_SAFE_INTEGER ? [] : events;
      [events, cursor] = [[...kept, ...page.events], page.next_cursor];
      showText(none, events.length ? "" : "The ledger has no event of it.");
    } catch (error) {
      showText(none, errorText(error));
    }
    reconcile(list, events, eventLine, (event) => event.position);
    show(more, cursor !== null);
  };
  const more = h("button", { type: "button", onclick: () => fetch(cursor), hidden: true }, "Older");
  const scroll = h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Events of the model, newest first" }, list);
  return { node: panel("its-events", "Events", [], scroll, none, more), fetch };
}

function eventLine(event) {
  const what = [event.version == null ? "" : `version ${event.version}`, summary(event)].filter(Boolean).join(", ");
  return h("li", { class: "event" }, h("a", { href: href("at", event.position), title: "Show this moment" }, String(event.position)), " ",
    h("time", { datetime: event.recorded_at, title: stamp(event.recorded_at) }, clock(event.recorded_at)), " ",
    h("strong", { class: toneOf(event) }, oneLine(event.type, 60)), " ", h("span", { class: "dim" }, `by ${oneLine(event.actor, 130)}`), " ", h("span", { class: "says" }, what));
}

// What its workers printed last. It may hold what clients sent, so it is asked for only for admins.
function printedPart(api, path) {
  const list = h("div"), note = h("p", { class: "hint" });
  const node = panel("its-lines", "Last lines of its workers", [button("Refresh", "the lines", () => fetch())], list, note);
  const fetch = async () => {
    try {
      const { workers, last_exited: exited, recorded } = await api.get(`${path}/stderr`);
      const shown = workers.map((worker) => [`Worker of version ${worker.version}, running`, worker]);
      if (exited) shown.push([`Worker of version ${exited.version}, ended unexpectedly ${stamp(exited.exited_at)}${endOf(exited)}`, exited]);
      list.replaceChildren(...shown.map(([name, { lines }]) => printedOf(name, lines)));
      showText(note, [shown.length ? "" : "No worker of it runs, and none has ended unexpectedly.", recorded ? "" : "The server was started with --ledger-stderr off: of a worker that has ended, the ledger keeps only why the server killed it."].filter(Boolean).join(" "));
    } catch (error) {
      showText(note, requestErrorText(error));
    }
  };
  return { node, fetch };
}

const endOf = ({ exit_code: code, signal }) => (signal != null ? `, by signal ${signal}` : code != null ? `, with exit code ${code}` : "");

function printedOf(name, lines) {
  const text = lines.length ? h("pre", { tabindex: "0", role: "group", "aria-label": name }, plain(lines.join("\n"), 20_000)) : h("p", { class: "hint" }, "It has printed nothing.");
  return h("div", { class: "printed" }, h("p", {}, name), text);
}
