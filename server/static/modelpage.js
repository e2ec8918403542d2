// The page of one model: what it takes, what it uses, where its bytes come from, what happened to it, and how to ask it.

import { told } from "./api.js";
import { byId, el, keyed, setAttribute, setText, show, tell } from "./dom.js";
import { TYPES } from "./eventtext.js";
import { ago, broughtBack, bytes, count, oneLine, plain, stamp } from "./format.js";
import { jobItem } from "./jobs.js";
import { callsPart, eventsPart, panel, printedPart, tensorsPart, versionsPart } from "./modelparts.js";
import { actionsOf, memoryText, versionText } from "./models.js";
import { href } from "./router.js";
import { rangeSwitch, trafficCharts } from "./traffic.js";

const JOBS = 10;
const NAMING = ["ModelLoaded", "VersionAdded"]; // events that name the bytes of a version
const LOADS = 100; // the last ones of them
const PAUSE_MS = 500; // between an event and the look at what it changed
const MEMORY = [{ kind: "plain", name: "memory", of: (point) => point.memory_bytes }];

export class ModelPage {
  #id = null;
  #opened = 0; // what was asked for another model, or at another time, has no say
  #due = null;
  #parts = null;

  // `offers` has what may be done, `session` who asks, and `histories` the charts.
  constructor({ api, store, router, histories, offers, session }) {
    Object.assign(this, { api, store, router, histories, offers, session });
    router.watch(({ view, id }) => this.#visit(view === "models" ? id : null));
    store.listeners.push((event) => this.#id !== null && event.model_id === this.#id && this.#soon());
    store.watch(() => this.#draw());
    setInterval(() => this.#draw(), 1000);
  }

  #visit(id) {
    if (id === this.#id) return;
    this.#id = id;
    this.#opened += 1;
    clearTimeout(this.#due);
    this.store.subject = id;
    this.store.changed();
    this.histories.choose({ modelId: id });
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
    const title = el("h2", { tabindex: "-1", class: "name" }, id);
    const head = headPart(id, title, this.offers, this.store);
    const charts = trafficCharts(MEMORY, () => this.#used()), range = rangeSwitch(this.histories, "model");
    const traffic = panel("traffic", "Requests and memory", [range.node], el("div", { class: "charts" }, ...charts.nodes));
    const tensors = tensorsPart(), calls = callsPart(id), versions = versionsPart(id, this.offers, this.store);
    const jobs = panel("its-jobs", "Jobs", [], el("ul", { class: "jobs-list" }), el("p", { class: "hint" }));
    const parts = { title, head, charts, range, tensors, calls, versions, jobs, path };
    parts.nodes = [head.node, traffic, el("div", { class: "halves" }, tensors.node, calls.node), versions.node];
    const past = [jobs];
    if (this.session.audits) past.push((parts.events = eventsPart(this.api, id)).node);
    parts.nodes.push(el("div", { class: "halves" }, ...past));
    if (this.session.manages) parts.nodes.push((parts.printed = printedPart(this.api, path)).node);
    return parts;
  }

  #soon() {
    clearTimeout(this.#due);
    this.#due = setTimeout(() => this.#fetch(), PAUSE_MS);
  }

  // Asks for what only this page shows. Each part says itself what went wrong with it.
  async #fetch() {
    if (!this.#parts) return; // the page was left meanwhile
    const opened = this.#opened, parts = this.#parts, { path } = parts;
    const isCurrent = () => opened === this.#opened;
    const jobs = this.api.get(`/api/v1/jobs?model=${encodeURIComponent(this.#id)}&limit=${JOBS}`);
    const found = await Promise.allSettled([
      this.#model(path), jobs, parts.events?.fetch(isCurrent), this.#loads(), parts.printed?.fetch(isCurrent),
    ]);
    if (!isCurrent()) return;
    const [model, its, , loads] = found.map(({ value, reason }) => value ?? { refusal: reason ? told(reason) : "" });
    parts.model = model;
    parts.loads = loads;
    parts.found = its;
    parts.tensors.draw(model);
    parts.calls.draw(model);
    this.#draw();
  }

  // Its memory now; nothing where it has no process.
  #used() {
    const uses = this.store.usesOf(this.#id);
    return uses.length ? uses.reduce((sum, use) => sum + use.memory_bytes, 0) : null;
  }

  // The model with its inputs and outputs, which the protocol's metadata has for a loaded one.
  async #model(path) {
    const model = await this.api.get(path);
    if (model.inputs || model.state !== "loaded") return model;
    try {
      return { ...model, ...only(await this.api.get(`/v2/models/${encodeURIComponent(model.id)}`), "inputs", "outputs") };
    } catch {
      return model; // it is not loaded any more
    }
  }

  // The events that name the bytes of its versions, newest first.
  async #loads() {
    if (!this.session.audits) return { events: [] };
    const query = new URLSearchParams({ model: this.#id, before: Number.MAX_SAFE_INTEGER, limit: LOADS });
    for (const type of NAMING) if (TYPES.includes(type)) query.append("type", type);
    return this.api.get(`/api/v1/events?${query}`);
  }

  #draw() {
    const parts = this.#parts;
    if (!parts) return;
    const known = this.store.models.get(this.#id), model = known ?? (parts.model?.id ? parts.model : null);
    parts.head.draw(model, parts.model?.refusal);
    parts.charts.draw(this.histories.model);
    parts.range.draw();
    if (model) parts.versions.draw(model, parts.loads?.events ?? []);
    this.#drawJobs(parts);
  }

  // Its jobs as they were asked for, with what the page has heard of them since.
  #drawJobs({ jobs, found }) {
    if (!found) return;
    const live = new Map(this.store.jobsNow().map((job) => [job.id, job]));
    const shown = (found.jobs ?? []).map((job) => live.get(job.id) ?? job);
    keyed(jobs.querySelector("ul"), shown, (job) => job.id, (job) => jobItem(job, { cancel: this.offers.cancel }), (node, job) => node.update(job));
    tell(jobs.querySelector(".hint"), found.refusal ?? (shown.length ? "" : "It was never loaded."));
  }
}

function only(value, ...names) {
  return Object.fromEntries(names.map((name) => [name, value[name]]));
}

// Its name and state, what may be done, and the facts of the moment.
function headPart(id, title, offers, store) {
  const pill = el("span", { class: "pill" }), refusal = el("p", { class: "refusal", hidden: true });
  const badges = { active: el("span", { class: "badge" }, "active"), pinned: el("span", { class: "badge" }, "pinned"), newer: el("span", { class: "badge" }, "newer files") };
  const can = actionsOf({ id }, offers, store);
  const facts = Object.fromEntries(["Version", "Node", "Memory now", "Loaded", "Last use", "In flight", "Workers"].map((name) => [name, el("dd")]));
  const list = el("dl", { class: "facts" }, ...Object.entries(facts).map(([name, value]) => el("div", {}, el("dt", {}, name), value)));
  const node = el("section", { class: "panel model-head", "aria-label": `Model ${id}` },
    el("p", { class: "crumbs" }, el("a", { href: href() }, "‹ All models")),
    el("div", { class: "head" }, el("div", { class: "titles" }, title, pill, ...Object.values(badges)), el("div", { class: "do" }, ...can.nodes)), refusal, list);
  const draw = (model, problem) => {
    for (const part of [pill, list]) show(part, model !== null);
    if (!model) {
      for (const part of [...Object.values(badges), ...can.nodes]) show(part, false);
      return tell(refusal, problem ?? "");
    }
    const uses = store.usesOf(id), serving = uses.find((use) => use.job_id === model.job_id);
    setText(pill, model.state);
    setAttribute(pill, "class", `pill ${model.state}`);
    show(badges.active, model.active);
    show(badges.pinned, serving?.pinned ?? false);
    show(badges.newer, model.repository_changed ?? false);
    tell(refusal, model.error ? `${model.error.code}: ${plain(model.error.message)}` : "");
    setText(facts.Version, versionText(model));
    show(facts.Node.parentNode, store.nodes.length > 0);
    setText(facts.Node, oneLine(model.node ?? "–", 130));
    const atLoad = model.memory_at_load_bytes && serving ? `, ${bytes(model.memory_at_load_bytes)} when it was loaded` : "";
    setText(facts["Memory now"], `${memoryText(model, uses)}${atLoad}`);
    setText(facts.Loaded, model.loaded_at ? `${stamp(model.loaded_at)} by ${oneLine(model.loaded_by, 130)}${broughtBack(model)}` : "–");
    setText(facts["Last use"], serving ? ago(uses.map((use) => use.last_used_at).filter(Boolean).sort().at(-1)) : "–");
    setText(facts["In flight"], uses.length ? String(uses.reduce((sum, use) => sum + use.in_flight, 0)) : "–");
    setText(facts.Workers, model.instances ? `${count(model.instances, "worker")}${model.threads ? ` of ${count(model.threads, "thread")}` : ""}` : "–");
    can.update(model, serving);
  };
  return { node, draw };
}
