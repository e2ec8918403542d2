// The frame of all dialogs, and those in which a load, a swap or an unload is asked for.

import { api, errorText, requestErrorText } from "./api.js";
import { count, named, oneLine } from "./format.js";
import { load, unload } from "./operations.js";
import { models, nodes, resources, session, statusOf, useOf } from "./state.js";
import { html, notice, Refusal, signal, useLayoutEffect, useRef, useRequest, useState } from "./ui.js";

export const dialog = signal(null); // the open one: {component, props, key}
let opened = 0;

export function openDialog(component, props = {}) {
  dialog.value = { component, props, key: (opened += 1) };
}

export function closeDialog() {
  dialog.value = null;
}

// A dialog with a form. `ask(...about)` is called when it is sent, by its submit button or by `send` of `buttons(send,
// isBusy)`: it returns true to close the dialog, false to leave it open, or a text that says what is wrong. What the
// server refuses is said in the dialog, and outside where it was closed meanwhile.
export function Dialog({ name, title, kind, ask, buttons, close = "Close", closeIsDefault = false, refusal = "", hint, drops, children }) {
  const node = useRef(), isOpen = useRef(true), [refused, setRefused] = useState(""), [isBusy, setBusy] = useState(false);
  useLayoutEffect(() => {
    node.current.showModal();
    return () => {
      isOpen.current = false;
      node.current?.close();
    };
  }, []);
  const send = async (...about) => {
    setBusy(true);
    setRefused("");
    try {
      const said = await ask(...about);
      if (isOpen.current && said === true) node.current.close();
      else setRefused(said || "");
    } catch (error) {
      if (isOpen.current) setRefused(requestErrorText(error));
      else notice(requestErrorText(error), "bad");
    } finally {
      setBusy(false);
    }
  };
  const onClose = () => isOpen.current && closeDialog();
  return html`
    <dialog ref=${node} ...${drops} id="${name}-dialog" class="${kind ?? ""} ${drops?.class ?? ""}" aria-labelledby="${name}-title"
        onClose=${onClose}>
      <form autocomplete="off" onSubmit=${(event) => (event.preventDefault(), send())}>
        <h2 id="${name}-title">${title}</h2>
        ${children}
        <${Refusal} text=${refusal || refused} />
        <p class="buttons">
          ${buttons(send, isBusy)}
          <button type="button" class="close" autofocus=${closeIsDefault} onClick=${() => node.current.close()}>${close}</button>
        </p>
        ${hint}
      </form>
    </dialog>`;
}

const AS_CONFIGURED = ["", "as configured"]; // which sends nothing
const STRATEGIES = [AS_CONFIGURED, ["beside"], ["in_place", "in place"], ["auto"]];
const PINNED = [AS_CONFIGURED, ["true", "yes: never unloaded to make room"], ["false", "no"]];
const FALLBACKS = [AS_CONFIGURED, ["refuse", "refuse the load"], ["cpu", "run them on the CPU"]]; // for what a device does not support
const PRIORITIES = [AS_CONFIGURED, ["high"], ["normal"], ["low"]];

// A select of `choices`: [value, text] each; a value is its text without one.
function Choice({ id, label, choices, value, onChoice, describedBy }) {
  return html`
    <label for=${id}>${label}</label>
    <select id=${id} value=${value} aria-describedby=${describedBy} onChange=${(event) => onChoice(event.target.value)}>
      ${choices.map(([each, text = each]) => html`<option key=${each} value=${each}>${text}</option>`)}
    </select>`;
}

// A line of text, such as a reason: the server takes up to 1000 characters.
export function TextField({ id, label, value, onText, ...more }) {
  return html`
    <label for=${id}>${label}</label>
    <input id=${id} maxlength="1000" value=${value} onInput=${(event) => onText(event.target.value)} ...${more} />`;
}

// The devices of all servers: other nodes name theirs in attributes. None where there is only the CPU.
function deviceChoices() {
  const attributes = nodes.value.filter((node) => node.phase === "joined").flatMap((node) => node.attributes).filter((each) => each.startsWith("device."));
  const elsewhere = attributes.map((each) => each.slice("device.".length).replace("=", ":"));
  const names = [...new Set([...resources.value.devices.map(({ device }) => device), ...elsewhere])];
  return names.length > 1 ? [AS_CONFIGURED, ...names.map((name) => [name, oneLine(name, 80)])] : [];
}

// Asks for a load of a model, or for a swap where it serves; `version` is the one that is chosen at first.
export function LoadDialog({ model: known, version = null }) {
  const { answer, error } = useRequest((signal) => api.get(`/api/v1/models/${encodeURIComponent(known.id)}`, { signal }), []);
  const model = answer ?? known, serves = model.state === "loaded"; // the repository may have more by now
  const [wanted, setWanted] = useState(version), [strategy, setStrategy] = useState(""), [priority, setPriority] = useState("");
  const [reason, setReason] = useState(""), [emergency, setEmergency] = useState(""), approvals = model.policy?.approvals ?? 0;
  const [pinned, setPinned] = useState(useOf(known).serving?.pinned ? "true" : ""), [copies, setCopies] = useState("");
  const [device, setDevice] = useState(""), [fallback, setFallback] = useState(""), devices = deviceChoices();
  const versions = [...(model.versions ?? [])].sort((a, b) => b - a), chosen = versions.includes(wanted) ? wanted : versions[0];
  const shown = versions.map((each) => [each, `${each}${serves && each === model.version ? " (is loaded)" : ""}`]);
  const ask = async () => {
    if (!versions.length) return NO_VERSION.replace("MODEL", model.id);
    const body = { version: chosen };
    if (serves && strategy) body.strategy = strategy;
    if (priority) body.priority = priority;
    if (pinned) body.pinned = pinned === "true";
    if (copies) body.copies = Number(copies);
    if (device) body.devices = [device];
    if (fallback) body.fallback = fallback;
    if (reason.trim()) body.reason = reason.trim();
    if (emergency.trim()) {
      body.emergency = emergency.trim(); // for the files that the version has now
      body.digest = (await api.get(`/api/v1/models/${encodeURIComponent(model.id)}/verify?version=${chosen}`, { limitMs: 600_000 })).digest;
    }
    await load(model.id, body);
    return true;
  };
  const buttons = (send, isBusy) => html`<button type="submit" class="primary" disabled=${isBusy}>${serves ? "Swap" : "Load"}</button>`;
  return html`
    <${Dialog} name="load" title="${serves ? "Swap" : "Load"} ${model.id}" ask=${ask} buttons=${buttons} close="Keep as it is"
        refusal=${error ? errorText(error) : ""}>
      <p id="load-text">${aboutLoad(model)}</p>
      <${Choice} id="load-version" label="Version" choices=${shown} value=${chosen} onChoice=${(text) => setWanted(Number(text))} />
      ${serves && html`
        <${Choice} id="load-strategy" label="Strategy" choices=${STRATEGIES} value=${strategy} onChoice=${setStrategy}
          describedBy="load-strategy-help" />
        <p id="load-strategy-help" class="hint">
          beside: no request is refused, both take memory meanwhile. in place: no second copy, requests get 503 until the new one
          serves. auto: beside where both fit.
        </p>`}
      <${Choice} id="load-pinned" label="Pinned" choices=${PINNED} value=${pinned} onChoice=${setPinned} />
      ${nodes.value.length > 0 && html`
        <${TextField} id="load-copies" label="Copies" type="number" min="1" max="64" placeholder=${model.copies ?? 1}
          value=${copies} onText=${setCopies} aria-describedby="load-copies-help" />
        <p id="load-copies-help" class="hint">At how many nodes it is to be loaded, one copy at each.</p>`}
      ${devices.length > 0 && html`
        <${Choice} id="load-device" label="Device" choices=${devices} value=${device} onChoice=${setDevice} />
        <${Choice} id="load-fallback" label="Nodes of the graph that the device does not support" choices=${FALLBACKS} value=${fallback}
          onChoice=${setFallback} />`}
      <${Choice} id="load-priority" label="Priority" choices=${PRIORITIES} value=${priority} onChoice=${setPriority} />
      <${TextField} id="load-reason" label="Reason" value=${reason} onText=${setReason} />
      ${approvals > 0 && html`<p class="hint">These files need the approval of ${count(approvals, "other person", "other people")}, or the load is refused.</p>`}
      ${session.value.bypasses && html`
        <${TextField} id="load-emergency" label="Emergency: why it must not wait for others" value=${emergency} onText=${setEmergency} />`}
    <//>`;
}

const NO_VERSION = "The repository has no version of it. Add one on the model's page, or as MODEL/VERSION/model.onnx in the repository's folder.";

function aboutLoad(model) {
  const { id, state, version, error } = model, shown = statusOf(model);
  if (state !== "loaded") return error ? `Last time: ${oneLine(error.message, 300)}` : `It is ${oneLine(`${shown.state} ${shown.detail}`, 300)}.`;
  const next = "Another version takes its place; the same one changes what is asked for, or loads it again where its files have changed.";
  return `${named(id, version)} is loaded. ${next}`;
}

const FORCED = { loading: "Only force ends a load that is under way.", unloading: "It is being unloaded: force has it not wait." };

export function UnloadDialog({ model: asked }) {
  const model = models.value.get(asked.id) ?? asked, forced = FORCED[model.state];
  const afterwards = `Afterwards requests are refused with 503${model.state === "lost" ? ", and it is not wanted back any more" : ""}.`;
  const ask = async (force = false) => {
    await unload(model.id, force);
    return true;
  };
  const buttons = (send, isBusy) => html`
    ${!forced && html`<button type="submit" class="primary" disabled=${isBusy}>Unload</button>`}
    <button type="button" class="danger" disabled=${isBusy} onClick=${() => send(true)}>Force unload</button>`;
  const hint = html`
    <p class="hint">
      Force does not wait: it aborts running requests, ends a load or swap that is under way, and kills a worker that does not answer.
    </p>`;
  return html`
    <${Dialog} name="unload" title="${forced ? "Force unload" : "Unload"} ${model.id}" ask=${ask} buttons=${buttons} close="Keep it"
        closeIsDefault hint=${hint}>
      <p id="unload-text">${named(model.id, model.version)} is ${model.state ?? "being unloaded"}. ${forced ?? waitText(useOf(model).in_flight)} ${afterwards}</p>
    <//>`;
}

function waitText(flying) {
  if (!flying) return "No request is in flight.";
  const them = flying === 1 ? "it" : "them";
  return `${count(flying, "request")} in flight: an unload waits for ${them}, ${resources.value.drain_timeout_s ?? 0} s at most (--drain-timeout-s).`;
}
