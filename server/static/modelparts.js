// The parts of a model's page, each with its element and a function that draws or fetches.

import { told, toldOfRequest } from "./api.js";
import { button, el, keyed, setAttribute, setText, show, tell } from "./dom.js";
import { summary, toneOf } from "./eventtext.js";
import { bytes, clock, oneLine, plain, stamp } from "./format.js";
import { href } from "./router.js";
import { snippets } from "./snippets.js";

const EVENTS = 20; // of a page

export function panel(kind, title, controls, ...children) {
  const heading = el("h3", { id: `page-${kind}` }, title);
  return el("section", { class: `panel ${kind}`, "aria-labelledby": `page-${kind}` }, el("div", { class: "head" }, heading, ...controls), ...children);
}

// Its inputs and outputs.
export function tensorsPart() {
  const rows = el("tbody"), none = el("p", { class: "hint" });
  const table = el("table", { class: "tensors" }, el("thead", {}, el("tr", {}, ...["", "Name", "Type", "Shape"].map((name) => el("th", { scope: "col" }, name || el("span", { class: "unseen" }, "Kind"))))), rows);
  const node = panel("its-tensors", "Inputs and outputs", [], table, none, el("p", { class: "hint" }, "A size that the model leaves open is written as −1: any length."));
  const draw = (model) => {
    const tensors = [...(model.inputs ?? []).map((tensor) => ["input", tensor]), ...(model.outputs ?? []).map((tensor) => ["output", tensor])];
    rows.replaceChildren(...tensors.map(([kind, { name, datatype, shape }]) =>
      el("tr", {}, el("td", { class: "dim" }, kind), el("th", { scope: "row" }, oneLine(name, 200)), el("td", {}, oneLine(datatype, 20)), el("td", {}, el("code", {}, `[${shape.join(", ").replaceAll("-", "−")}]`)))));
    for (const part of [table, node.lastChild]) show(part, tensors.length > 0);
    tell(none, tensors.length ? "" : model.refusal ?? "Its file does not say: they are known when it is loaded.");
  };
  return { node, draw };
}

// How to ask it from elsewhere, to be copied.
export function callsPart(id) {
  const text = el("pre", { tabindex: "0", role: "group", "aria-label": "The program" }), tabs = el("div", { class: "segmented", role: "group", "aria-label": "Language" });
  const copied = el("span", { class: "hint", role: "status" }), none = el("p", { class: "hint" });
  let written = [], chosen = 0;
  const choose = (number) => {
    chosen = number;
    setText(text, written[chosen]?.text ?? "");
    [...tabs.children].forEach((tab, at) => setAttribute(tab, "aria-pressed", String(at === chosen)));
    setText(copied, "");
  };
  const copy = button("Copy", "the program", () => copyText(text.textContent, copied));
  const node = panel("its-calls", "Ask it from elsewhere", [tabs], text,
    el("p", { class: "buttons" }, copy, copied), none,
    el("p", { class: "hint" }, "TOKEN is a token with the role predict. To make one, run on the server: ", el("code", {}, "loadledger token --data DATA --role predict --subject YOU")));
  const draw = (model) => {
    written = model.inputs ? snippets(location.origin, id, model.inputs) : [];
    tabs.replaceChildren(...written.map(({ name }, number) => el("button", { type: "button", onclick: () => choose(number) }, name)));
    for (const part of [text, tabs, copy]) show(part, written.length > 0);
    tell(none, !written.length ? "The programs name its inputs, which are known when it is loaded." : model.state === "loaded" ? "" : "It has to be loaded first.");
    choose(chosen);
  };
  return { node, draw };
}

async function copyText(text, told) {
  try {
    await navigator.clipboard.writeText(text);
    setText(told, "Copied.");
  } catch {
    setText(told, "The browser does not allow that: select the text and copy it."); // without TLS, for instance
  }
}

// Its versions, with the bytes that each had when it was loaded last.
export function versionsPart(id, offers, store) {
  const rows = el("tbody"), none = el("p", { class: "hint" });
  const head = ["Version", "State", "Files and their SHA-256", ""].map((name) => el("th", { scope: "col" }, name || el("span", { class: "unseen" }, "Actions")));
  const table = el("table", { class: "cards versions" }, el("thead", {}, el("tr", {}, ...head)), rows);
  const add = offers.add ? [button("Add a version…", `of ${id}`, () => offers.add({ modelId: id }))] : [];
  const node = panel("its-versions", "Versions and files", add, table, none);
  if (offers.add) offers.takeDrops(node, { modelId: id });
  const draw = (model, loads) => {
    const all = [...new Set([...(model.versions ?? []), ...(model.version === null ? [] : [model.version])])].sort((a, b) => b - a);
    const make = (version) => versionRow(version, offers, () => store.models.get(id) ?? model);
    keyed(rows, all, (version) => version, make, (row, version) => row.update(model, loads.find((event) => event.version === version)));
    show(table, all.length > 0);
    tell(none, all.length ? "" : `The repository has no version of it. ${offers.add ? "Drop an ONNX file here." : ""}`);
  };
  return { node, draw };
}

function versionRow(version, offers, model) {
  const cell = (label) => el("td", { "data-label": label, role: "cell" });
  const state = cell("State"), files = el("ul", { class: "files" }), since = el("p", { class: "hint" });
  const load = offers.load && button("Load…", `version ${version}`, () => offers.load(model(), version));
  const which = el("td", { class: "hashes", role: "cell" }, files, since);
  const row = el("tr", { role: "row" }, el("th", { scope: "row", role: "rowheader" }, `Version ${version}`), state, which, el("td", { role: "cell" }, el("div", { class: "do" }, load)));
  row.update = (now, event) => {
    const serves = now.version === version, found = serves && now.files.length ? now.files : event?.data.files ?? [];
    setText(state, serves ? now.state : now.next_version === version ? "is being loaded" : now.versions?.includes(version) ? "in the repository" : "gone from the repository");
    keyed(files, found, (file) => file.path, (file) => el("li", {}, el("span", {}), el("code", {})), (item, file) => {
      setText(item.firstChild, `${oneLine(file.path, 200)}, ${bytes(file.bytes)} `);
      setText(item.lastChild, oneLine(file.sha256, 64));
    });
    tell(since, found.length ? (serves || !event ? "" : `As it was ${event.type === "VersionAdded" ? "added" : "loaded"} ${stamp(event.recorded_at)}.`) : "Its hashes are recorded when it is loaded.");
    if (load) show(load, !serves || now.state !== "loaded");
  };
  return row;
}

// Its events, newest first, a page at a time.
export function eventsPart(api, id) {
  const list = el("ol", { class: "events" }), none = el("p", { class: "hint" });
  let events = [], cursor = null;
  const fetch = async (isCurrent, before = Number.MAX_SAFE_INTEGER) => {
    try {
      const page = await api.get(`/api/v1/events?${new URLSearchParams({ model: id, before, limit: EVENTS })}`);
      if (!isCurrent()) return;
      const kept = before === Number.MAX_SAFE_INTEGER ? [] : events;
      [events, cursor] = [[...kept, ...page.events], page.next_cursor];
      tell(none, events.length ? "" : "The ledger has no event of it.");
    } catch (error) {
      if (isCurrent()) tell(none, told(error));
    }
    keyed(list, events, (event) => event.position, eventLine, () => {});
    show(more, cursor !== null);
  };
  const more = el("button", { type: "button", onclick: () => fetch(() => true, cursor), hidden: true }, "Older");
  const scroll = el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Events of the model, newest first" }, list);
  return { node: panel("its-events", "Events", [], scroll, none, more), fetch };
}

function eventLine(event) {
  const what = [event.version == null ? "" : `version ${event.version}`, summary(event)].filter(Boolean).join(", ");
  return el("li", { class: "event" }, el("a", { href: href("at", event.position), title: "Show this moment" }, String(event.position)), " ",
    el("time", { datetime: event.recorded_at, title: stamp(event.recorded_at) }, clock(event.recorded_at)), " ",
    el("strong", { class: toneOf(event) }, oneLine(event.type, 60)), " ", el("span", { class: "dim" }, `by ${oneLine(event.actor, 130)}`), " ", el("span", { class: "says" }, what));
}

// What its workers printed last. It may hold what clients sent, so it is asked for only for admins.
export function printedPart(api, path) {
  const list = el("div"), note = el("p", { class: "hint" });
  const node = panel("its-lines", "Last lines of its workers", [button("Refresh", "the lines", () => fetch(() => true))], list, note);
  const fetch = async (isCurrent) => {
    try {
      const { workers, last_exited: exited, recorded } = await api.get(`${path}/stderr`);
      if (!isCurrent()) return;
      const shown = workers.map((worker) => [`Worker of version ${worker.version}, running`, worker]);
      if (exited) shown.push([`Worker of version ${exited.version}, ended unexpectedly ${stamp(exited.exited_at)}${endOf(exited)}`, exited]);
      list.replaceChildren(...shown.map(([name, { lines }]) => printedOf(name, lines)));
      tell(note, [shown.length ? "" : "No worker of it runs, and none has ended unexpectedly.", recorded ? "" : "The server was started with --ledger-stderr off: of a worker that has ended, the ledger keeps only why the server killed it."].filter(Boolean).join(" "));
    } catch (error) {
      if (isCurrent()) tell(note, toldOfRequest(error));
    }
  };
  return { node, fetch };
}

const endOf = ({ exit_code: code, signal }) => (signal != null ? `, by signal ${signal}` : code != null ? `, with exit code ${code}` : "");

function printedOf(name, lines) {
  const text = lines.length ? el("pre", { tabindex: "0", role: "group", "aria-label": name }, plain(lines.join("\n"), 20_000)) : el("p", { class: "hint" }, "It has printed nothing.");
  return el("div", { class: "printed" }, el("p", {}, name), text);
}
