// The table of models, and what their pages show, too: facts, badges, files and buttons of a model.

import { actionsCell, badge, button, byId, cell, h, markEmpty, reconcile, setAttribute, setText, show, showText, statePill, tableRow } from "./dom.js";
import { ago, broughtBack, bytes, clock, count, oneLine, plain, zone } from "./format.js";
import { href } from "./router.js";

const AT_FIRST = 100;
const ORDER = ["failed", "lost", "unloading", "loading", "loaded", "unloaded"];

// `actions` has what may be done, by name; what this token may not do is not in it.
export function modelsView(store, actions) {
  let most = AT_FIRST;
  const find = byId("models-find"), state = byId("models-state");
  const draw = () => {
    const all = [...store.models.values()];
    const wanted = all.filter((model) => (!state.value || model.state === state.value) && model.id.toLowerCase().includes(find.value.trim().toLowerCase()));
    wanted.sort((a, b) => ORDER.indexOf(a.state) - ORDER.indexOf(b.state) || (a.id < b.id ? -1 : 1));
    reconcile(byId("models-rows"), wanted.slice(0, most), (model) => modelRow(model, actions, store));
    const loaded = all.filter((model) => model.state === "loaded").length;
    setText(byId("models-count"), `${loaded} loaded of ${all.length}`);
    showText(byId("models-none"), wanted.length || !all.length ? "" : "No model matches.");
    show(byId("models-empty"), store.resources !== null && !all.length);
    show(byId("models-table"), wanted.length > 0);
    show(byId("models-node"), store.nodes.length > 0);
    show(byId("models-more"), wanted.length > most);
  };
  setText(byId("models-loaded"), `Loaded (${zone()})`);
  show(byId("models-do"), Boolean(actions.load || actions.predict));
  byId("models-more").addEventListener("click", () => ((most += AT_FIRST), draw()));
  find.addEventListener("input", draw);
  state.addEventListener("change", draw);
  store.watch(draw);
}

function modelRow(first, actions, store) {
  const badges = modelBadges(), pill = statePill(), error = h("span", { class: "error" }), buttons = modelButtons(first, actions, store);
  const cells = { version: cell("Version"), node: cell("Node"), memory: cell("Memory", "number"), lastUse: cell("Last use"), inFlight: cell("In flight", "number"), loaded: cell("Loaded") };
  const row = tableRow([h("a", { class: "name", href: href("models", first.id) }, first.id), ...badges.nodes], cell("State", null, pill, error), ...Object.values(cells));
  if (buttons.nodes.length) row.append(actionsCell(...buttons.nodes));
  row.update = (model) => {
    const { memoryAtLoad, lastUsedAt, ...facts } = factsOf(model, store);
    badges.update(model, store);
    pill.update(model.state);
    setText(error, model.error ? oneLine(model.error.code, 60) : "");
    setAttribute(error, "title", model.error ? plain(model.error.message) : null);
    for (const [name, text] of Object.entries(facts)) setText(cells[name], text);
    setText(cells.loaded, model.loaded_at ? `${clock(model.loaded_at)} by ${oneLine(model.loaded_by, 60)}${broughtBack(model)}` : "–");
    setAttribute(cells.version, "title", model.threads ? `${count(model.threads, "thread")} in each worker` : null);
    setAttribute(cells.memory, "title", memoryAtLoad);
    setAttribute(cells.lastUse, "title", lastUsedAt);
    setAttribute(cells.loaded, "title", model.loaded_at);
    show(cells.node, store.nodes.length > 0);
    markEmpty(Object.values(cells));
    buttons.update(model);
  };
  return row;
}

// The facts of the moment about a model, as text.
export function factsOf(model, store) {
  const use = store.useOf(model);
  return {
    version: versionText(model),
    node: oneLine(model.node ?? "–", 130),
    memory: memoryText(model, use),
    memoryAtLoad: model.memory_at_load_bytes ? `${bytes(model.memory_at_load_bytes)} when it was loaded` : null,
    lastUse: use.serving ? ago(use.last_used_at) : "–",
    lastUsedAt: use.last_used_at,
    inFlight: use.processes ? String(use.in_flight) : "–",
  };
}

function versionText(model) {
  const newest = Math.max(0, ...(model.versions ?? []));
  if (model.version == null) return "–";
  if (model.next_version != null) return `${model.version} → ${model.next_version}`;
  return newest > model.version ? `${model.version}, newest ${newest}` : String(model.version);
}

function memoryText(model, { processes, memory_bytes: used, reserved_bytes: reserved }) {
  if (!processes) return model.memory_bytes && model.state === "loaded" ? bytes(model.memory_bytes) : "–";
  return reserved ? `${used ? `${bytes(used)} + ` : ""}${bytes(reserved)} reserved` : bytes(used);
}

export function modelBadges() {
  const active = badge("active"), pinned = badge("pinned");
  const newer = badge("newer files", "The repository has newer files than those that are loaded: load the model again to use them.");
  const update = (model, store) => {
    show(active, model.active);
    show(pinned, store.useOf(model).serving?.pinned ?? false);
    show(newer, model.repository_changed ?? false);
  };
  return { nodes: [active, pinned, newer], update };
}

// A version's files with their SHA-256.
export function fileList() {
  const list = h("ul", { class: "files" });
  const make = () => {
    const name = h("span", {}), hash = h("code", {}), item = h("li", {}, name, hash);
    item.update = (file) => {
      setText(name, `${oneLine(file.path, 200)}, ${bytes(file.bytes)} `);
      setText(hash, oneLine(file.sha256, 64));
    };
    return item;
  };
  list.update = (files) => reconcile(list, files, make, (file) => file.path);
  return list;
}

// The buttons of a model are made once, and shown where they make sense.
export function modelButtons(first, actions, store) {
  const now = () => store.models.get(first.id) ?? first;
  const cancel = () => {
    const job = store.loadOf(first.id);
    if (job) actions.cancel(job);
  };
  const made = {
    cancel: actions.cancel && button("Cancel", `the load of ${first.id}`, cancel),
    predict: actions.predict && button("Predict…", first.id, () => actions.predict(now())),
    load: actions.load && button("Load…", first.id, () => actions.load(now())),
    swap: actions.load && button("Swap…", first.id, () => actions.load(now())),
    pin: actions.pin && button("Pin", first.id, () => actions.pin(now(), true)),
    unpin: actions.pin && button("Unpin", first.id, () => actions.pin(now(), false)),
    unload: actions.unload && button("Unload…", first.id, () => actions.unload(now())),
    force: actions.unload && button("Force unload…", first.id, () => actions.unload(now()), "danger"),
  };
  const update = (model) => {
    const { serving } = store.useOf(model);
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
