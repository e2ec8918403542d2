// The dialogs in which a load, a swap or an unload is asked for.

import { errorText, Latest, requestErrorText } from "./api.js";
import { byId, h, notice, setText, show, showText } from "./dom.js";
import { count, oneLine } from "./format.js";

// Has a dialog close by its buttons, and `ask` called by its form; what is refused is said in it, and it stays.
// Where it was closed meanwhile, or is about something else by now, what is refused is said outside. `complete` asks
// for what the open dialog lacks; what comes too late is dropped.
export function dialog(id, ask) {
  const node = byId(`${id}-dialog`), form = byId(`${id}-form`), refusal = node.querySelector(".refusal");
  const enable = (can) => node.querySelectorAll("button:not(.close)").forEach((each) => (each.disabled = !can));
  const latest = new Latest();
  let opened = 0; // how often: what was asked for at another time has no say
  const send = async (...about) => {
    const mine = opened, here = () => mine === opened && node.open;
    enable(false);
    try {
      showText(refusal, "");
      if ((await ask(...about)) !== false && here()) node.close();
    } catch (error) {
      if (here()) showText(refusal, requestErrorText(error));
      else notice(requestErrorText(error), "bad");
    } finally {
      if (mine === opened) enable(true);
    }
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  for (const close of node.querySelectorAll(".close")) close.addEventListener("click", () => node.close());
  const open = () => {
    opened += 1;
    latest.drop();
    enable(true);
    showText(refusal, "");
    node.showModal();
  };
  const complete = (ask, use) => latest.request(ask, use, (error) => showText(refusal, errorText(error)));
  return { node, open, send, complete, refuse: (text) => showText(refusal, text) };
}

export function loadDialog(api, store, operations) {
  let model = null;
  const about = dialog("load", () => {
    if (!byId("load-version").value) return about.refuse(`The repository has no version of it. Add one on the model's page, or as ${model.id}/VERSION/model.onnx in the repository's folder.`), false;
    const body = { version: Number(byId("load-version").value) };
    for (const name of ["strategy", "priority"]) {
      const chosen = byId(`load-${name}`);
      if (chosen.value && !chosen.hidden) body[name] = chosen.value;
    }
    if (byId("load-pinned").value) body.pinned = byId("load-pinned").value === "true";
    return operations.load(model.id, body);
  });
  return (asked, version = null) => {
    model = asked;
    byId("load-form").reset(); // what was chosen for another model is not meant for this one
    fill(model, store);
    if (version !== null) byId("load-version").value = version;
    about.open();
    about.complete((signal) => api.get(`/api/v1/models/${encodeURIComponent(asked.id)}`, { signal }), (fresh) => { // the repository may have more by now
      model = fresh;
      fill(model, store);
    });
  };
}

function fill(model, store) {
  const serves = model.state === "loaded", chosen = byId("load-version").value, versions = model.versions ?? [];
  setText(byId("load-title"), `${serves ? "Swap" : "Load"} ${model.id}`);
  const next = serves ? "Another version takes its place; the same one changes what is asked for, or loads it again where its files have changed." : "";
  setText(byId("load-text"), serves ? `Version ${model.version} is loaded. ${next}` : model.error ? `Last time: ${oneLine(model.error.message, 300)}` : `It is ${model.state}.`);
  setText(byId("load-go"), serves ? "Swap" : "Load");
  const options = [...versions].sort((a, b) => b - a).map((version) => h("option", { value: version }, `${version}${serves && version === model.version ? " (is loaded)" : ""}`));
  byId("load-version").replaceChildren(...options);
  if (byId("load-dialog").open && versions.includes(Number(chosen))) byId("load-version").value = chosen;
  else byId("load-pinned").value = store.useOf(model).serving?.pinned ? "true" : "";
  for (const node of byId("load-dialog").querySelectorAll(".of-swap")) show(node, serves);
}

export function unloadDialog(store, operations) {
  let model = null;
  const about = dialog("unload", (force = false) => operations.unload(model.id, force));
  byId("unload-force").addEventListener("click", () => about.send(true));
  return (asked) => {
    model = store.models.get(asked.id) ?? asked;
    const flying = store.useOf(model).in_flight;
    const under = { loading: "Only force ends a load that is under way.", unloading: "It is being unloaded: force has it not wait." }[model.state];
    setText(byId("unload-title"), `${under ? "Force unload" : "Unload"} ${model.id}`);
    show(byId("unload-go"), !under);
    const waits = flying ? `${count(flying, "request")} in flight: an unload waits for ${flying === 1 ? "it" : "them"}, for as long as the server's option --drain-timeout-s says.` : "No request is in flight.";
    const version = model.version == null ? "" : `, version ${model.version}`;
    setText(byId("unload-text"), `It is ${model.state ?? "being unloaded"}${version}. ${under ?? waits} Afterwards requests are refused with 503${model.state === "lost" ? ", and it is not wanted back any more" : ""}.`);
    about.open();
  };
}
