// The table of models: what each is, uses and does, and what may be done with it.

import { button, byId, el, keyed, setAttribute, setText, show, tell } from "./dom.js";
import { ago, broughtBack, bytes, clock, count, oneLine, plain, zone } from "./format.js";
import { href } from "./router.js";

const AT_FIRST = 100;
const ORDER = ["failed", "lost", "unloading", "loading", "loaded", "unloaded"];

// `offers` has what may be done, by name; what this token may not do is not in it.
export function modelsView(store, offers) {
  let most = AT_FIRST;
  const find = byId("models-find"), state = byId("models-state");
  const draw = () => {
    const all = [...store.models.values()];
    const wanted = all.filter((model) => (!state.value || model.state === state.value) && model.id.toLowerCase().includes(find.value.trim().toLowerCase()));
    wanted.sort((a, b) => ORDER.indexOf(a.state) - ORDER.indexOf(b.state) || (a.id < b.id ? -1 : 1));
    keyed(byId("models-rows"), wanted.slice(0, most), (model) => model.id, (model) => row(model, offers, store), (node, model) => node.update(model));
    const loaded = all.filter((model) => model.state === "loaded").length;
    setText(byId("models-count"), `${loaded} loaded of ${all.length}`);
    tell(byId("models-none"), wanted.length || !all.length ? "" : "No model matches.");
    show(byId("models-empty"), store.resources !== null && !all.length);
    show(byId("models-table"), wanted.length > 0);
    show(byId("models-node"), store.nodes.length > 0);
    show(byId("models-more"), wanted.length > most);
  };
  setText(byId("models-loaded"), `Loaded (${zone()})`);
  show(byId("models-do"), Boolean(offers.load || offers.predict));
  byId("models-more").addEventListener("click", () => ((most += AT_FIRST), draw()));
  find.addEventListener("input", draw);
  state.addEventListener("change", draw);
  store.watch(draw);
  setInterval(draw, 1000); // "3 s ago" goes on where nothing happens
}

function row(first, offers, store) {
  const cell = (label, kind = "") => el("td", { "data-label": label, class: kind || null, role: "cell" });
  const badges = { active: el("span", { class: "badge" }, "active"), pinned: el("span", { class: "badge" }, "pinned"), newer: el("span", { class: "badge", title: "The repository has newer files than those that are loaded: load the model again to use them." }, "newer files") };
  const pill = el("span", { class: "pill" }), error = el("span", { class: "error" });
  const cells = { version: cell("Version"), node: cell("Node"), memory: cell("Memory", "number"), used: cell("Last use"), flying: cell("In flight", "number"), loaded: cell("Loaded") };
  const state = cell("State");
  state.append(pill, error);
  const can = actionsOf(first, offers, store);
  const node = el("tr", { role: "row" }, el("th", { scope: "row", role: "rowheader" }, el("a", { class: "name", href: href("models", first.id) }, first.id), badges.active, badges.pinned, badges.newer), state, ...Object.values(cells));
  if (can.nodes.length) node.append(el("td", { role: "cell" }, el("div", { class: "do" }, ...can.nodes)));
  node.update = (model) => {
    const uses = store.usesOf(model.id), serving = uses.find((use) => use.job_id === model.job_id);
    show(badges.active, model.active);
    show(badges.pinned, serving?.pinned ?? false);
    show(badges.newer, model.repository_changed ?? false);
    setText(pill, model.state);
    setAttribute(pill, "class", `pill ${model.state}`);
    setText(error, model.error ? oneLine(model.error.code, 60) : "");
    setAttribute(error, "title", model.error ? plain(model.error.message) : null);
    setText(cells.version, versionText(model));
    setAttribute(cells.version, "title", model.threads ? `${count(model.threads, "thread")} in each worker` : null);
    show(cells.node, store.nodes.length > 0);
    setText(cells.node, oneLine(model.node ?? "–", 130));
    setText(cells.memory, memoryText(model, uses));
    setAttribute(cells.memory, "title", model.memory_at_load_bytes ? `${bytes(model.memory_at_load_bytes)} when it was loaded` : null);
    const last = uses.map((use) => use.last_used_at).filter(Boolean).sort().at(-1);
    setText(cells.used, serving ? ago(last) : "–");
    setAttribute(cells.used, "title", last ?? null);
    setText(cells.flying, uses.length ? String(uses.reduce((sum, use) => sum + use.in_flight, 0)) : "–");
    setText(cells.loaded, model.loaded_at ? `${clock(model.loaded_at)} by ${oneLine(model.loaded_by, 60)}${broughtBack(model)}` : "–");
    setAttribute(cells.loaded, "title", model.loaded_at);
    for (const each of Object.values(cells)) each.classList.toggle("none", each.textContent === "–");
    can.update(model, serving);
  };
  return node;
}

export function versionText(model) {
  const newest = Math.max(0, ...(model.versions ?? []));
  if (model.version == null) return "–";
  if (model.next_version != null) return `${model.version} → ${model.next_version}`;
  return newest > model.version ? `${model.version}, newest ${newest}` : String(model.version);
}

export function memoryText(model, uses) {
  const used = uses.reduce((sum, use) => sum + use.memory_bytes, 0), reserved = uses.reduce((sum, use) => sum + use.reserved_bytes, 0);
  if (!uses.length) return model.memory_bytes && model.state === "loaded" ? bytes(model.memory_bytes) : "–";
  return reserved ? `${used ? `${bytes(used)} + ` : ""}${bytes(reserved)} reserved` : bytes(used);
}

// The buttons of a model are made once, and shown where they make sense.
export function actionsOf(first, offers, store) {
  const now = () => store.models.get(first.id) ?? first;
  const cancel = () => {
    const job = store.loadOf(first.id);
    if (job) offers.cancel(job);
  };
  const made = {
    cancel: offers.cancel && button("Cancel", `the load of ${first.id}`, cancel),
    predict: offers.predict && button("Predict…", first.id, () => offers.predict(now())),
    load: offers.load && button("Load…", first.id, () => offers.load(now())),
    swap: offers.load && button("Swap…", first.id, () => offers.load(now())),
    pin: offers.pin && button("Pin", first.id, () => offers.pin(now(), true)),
    unpin: offers.pin && button("Unpin", first.id, () => offers.pin(now(), false)),
    unload: offers.unload && button("Unload…", first.id, () => offers.unload(now())),
    force: offers.unload && button("Force unload…", first.id, () => offers.unload(now()), "danger"),
  };
  const update = (model, serving) => {
    const serves = model.state === "loaded", idle = model.state === "unloaded" || model.state === "failed";
    const job = model.next_version != null || model.state === "loading" ? store.loadOf(model.id) : null;
    const sense = {
      cancel: job !== null && !job.cancel_requested, predict: serves, swap: serves, load: idle || model.state === "lost", unload: serves || model.state === "lost", force: model.state === "loading" || model.state === "unloading",
      pin: serves && serving !== undefined && !serving.pinned, unpin: serves && (serving?.pinned ?? false),
    };
    for (const [name, node] of Object.entries(made)) if (node) show(node, sense[name]);
  };
  return { nodes: Object.values(made).filter(Boolean), update };
}
