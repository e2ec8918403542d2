// The list of models, and what their pages show, too: facts, badges and buttons of a model.

import { TrustBadges } from "./approvals.js";
import { LoadDialog, openDialog, UnloadDialog } from "./dialogs.js";
import { ago, broughtBack, bytes, clock, copiesText, count, oneLine, placesText, plain, zone } from "./format.js";
import { InferDialog } from "./infer.js";
import { CancelButton } from "./jobs.js";
import { pin } from "./operations.js";
import { models, nodes, now, session, statusOf, useOf } from "./state.js";
import { ActionsCell, Badge, Button, Cell, html, ModelLink, Panel, Pill, Row, useKeptFocus, useSignal } from "./ui.js";
import { addVersion, mayAdd, useDrops } from "./upload.js";

const PAGE = 100; // models that are shown at first, and more each time
const ORDER = ["failed", "lost", "waiting", "unloading", "loading", "loaded", "unloaded"]; // those that need attention first

export function ModelsList() {
  useKeptFocus();
  const find = useSignal(""), state = useSignal(""), most = useSignal(PAGE), drops = useDrops();
  const all = [...models.value.values()], text = find.value.trim().toLowerCase();
  const states = new Map(all.map((model) => [model, statusOf(model).state])), rank = (model) => ORDER.indexOf(states.get(model));
  const wanted = all.filter((model) => (!state.value || states.get(model) === state.value) && model.id.toLowerCase().includes(text));
  wanted.sort((a, b) => rank(a) - rank(b) || (a.id < b.id ? -1 : 1));
  const loaded = all.filter((model) => model.state === "loaded").length;
  const rest = wanted.length - most.value, found = wanted.length < all.length ? `, ${wanted.length} shown` : "";
  const title = html`Models <span class="count">${loaded} loaded of ${all.length}${found}</span>`;
  const controls = html`<div class="filters">
    <span class="pair"><label for="models-find">Find</label>
      <input id="models-find" type="search" autocomplete="off" spellcheck=${false} onInput=${(event) => (find.value = event.target.value)} />
    </span>
    <span class="pair"><label for="models-state">State</label>
      <select id="models-state" onChange=${(event) => (state.value = event.target.value)}>
        <option value="">any</option>${ORDER.map((each) => html`<option key=${each}>${each}</option>`)}
      </select>
    </span>
    ${mayAdd.value && html`<button type="button" onClick=${() => addVersion()}>Add a version…</button>`}
  </div>`;
  return html`
    <${Panel} kind="models" title=${title} controls=${controls} drops=${drops}>
      ${wanted.length > 0 && html`<${Table} shown=${wanted.slice(0, most.value)} />`}
      ${all.length > 0 && !wanted.length && html`<p class="hint">No model matches.</p>`}
      ${!all.length && html`<${Empty} />`}
      ${rest > 0 && html`<button type="button" class="more" onClick=${() => (most.value += PAGE)}>Show more of ${rest}</button>`}
    <//>`;
}

function Empty() {
  return html`
    <p class="hint empty-list"><strong>The repository has no models yet.</strong>
      ${mayAdd.value ? "Drop an ONNX file here, or put" : "Put"} one into the repository's folder as <code>MODEL/VERSION/model.onnx</code>.
    </p>`;
}

function Table({ shown }) {
  const acts = session.value.manages || session.value.infers;
  return html`
    <table class="cards">
      <caption class="unseen">Models, those that need attention first</caption>
      <thead><tr>
        <th scope="col">Model</th><th scope="col">State</th><th scope="col">Version</th>
        ${nodes.value.length > 0 && html`<th scope="col">Node</th>`}
        <th scope="col" class="number">Memory</th><th scope="col">Last use</th><th scope="col" class="number">In flight</th>
        <th scope="col">Loaded (${zone()})</th>
        ${acts && html`<th scope="col"><span class="unseen">Actions</span></th>`}
      </tr></thead>
      <tbody id="models-rows">${shown.map((model) => html`<${ModelRow} key=${model.id} model=${model} acts=${acts} />`)}</tbody>
    </table>`;
}

function ModelRow({ model, acts }) {
  const facts = factsOf(model), threads = model.threads ? `${count(model.threads, "thread")} in each worker` : null;
  const loaded = model.loaded_at ? `${clock(model.loaded_at)} by ${oneLine(model.loaded_by, 60)}` : "–";
  return html`
    <${Row} heading=${html`<${ModelLink} id=${model.id} /><${ModelBadges} model=${model} />`}>
      <${Cell} label="State"><${Status} model=${model} /><//>
      <${Cell} label="Version" title=${threads}>${facts.version}<//>
      ${nodes.value.length > 0 && html`<${Cell} label="Node" title=${facts.copies && facts.node}>${facts.copies || facts.node}<//>`}
      <${Cell} label="Memory" kind="number" title=${facts.memoryAtLoad}>${facts.memory}<//>
      <${Cell} label="Last use" title=${facts.lastUsedAt}>${facts.lastUse}<//>
      <${Cell} label="In flight" kind="number">${facts.inFlight}<//>
      <${Cell} label="Loaded" title=${model.loaded_at && `${model.loaded_at}${broughtBack(model)}`}>${loaded}<//>
      ${acts && html`<${ActionsCell}><${ModelButtons} model=${model} /><//>`}
    <//>`;
}

// A model's state, with what its load waits for or does, or why it failed.
export function Status({ model }) {
  const { state, detail } = statusOf(model), { error } = model, isError = error && !model.open_load;
  return html`<${Pill} state=${state} />${detail && html` <span class=${isError ? "error" : "doing"} title=${isError ? plain(error.message) : null}>${detail}</span>`}`;
}

// The facts of the moment about a model, as text.
export function factsOf(model) {
  const use = useOf(model);
  return {
    version: versionText(model),
    node: placesText(model),
    copies: copiesText(model),
    memory: memoryText(model, use),
    memoryAtLoad: model.memory_at_load_bytes ? `${bytes(model.memory_at_load_bytes)} when it was loaded` : null,
    lastUse: use.serving ? ago(use.last_used_at, now.value) : "–",
    lastUsedAt: use.last_used_at,
    inFlight: use.processes ? String(use.in_flight) : "–",
  };
}

const MOST_VERSIONS = 4; // that are named

function versionText({ version, next_version: next, versions: known }) {
  const versions = [...(known ?? [])].sort((a, b) => b - a), newest = versions[0] ?? 0;
  const some = versions.slice(0, MOST_VERSIONS).join(", "), more = versions.length > MOST_VERSIONS ? ", …" : "";
  if (version == null) return versions.length ? `${some}${more} on disk` : "–";
  if (next != null) return `${version} → ${next}`;
  return newest > version ? `${version}, newest ${newest}` : String(version);
}

function memoryText(model, { processes, memory_bytes: used, reserved_bytes: reserved }) {
  if (!processes) return model.memory_bytes && model.state === "loaded" ? bytes(model.memory_bytes) : "–";
  return reserved ? `${used ? `${bytes(used)} + ` : ""}${bytes(reserved)} reserved` : bytes(used);
}

export function ModelBadges({ model }) {
  const labels = Object.entries(model.labels ?? {}).map((each) => each.join(" ")).join(", ");
  const newer = "The repository has newer files than those that were loaded: load the model again to use them.";
  return html`
    ${model.active && html`<${Badge}>active<//>`}
    ${useOf(model).serving?.pinned && html`<${Badge}>pinned<//>`}
    ${labels && html`<${Badge} title="Versions that labels name: ${labels}">${oneLine(labels, 60)}<//>`}
    ${model.repository_changed && html`<${Badge} title=${newer}>newer files<//>`}
    ${model.not_served && html`<${Badge} title=${oneLine(model.not_served, 400)}>not served<//>`}
    <${TrustBadges} model=${model} />`;
}

// What may be done with a model now, for those who may.
export function ModelButtons({ model }) {
  const { id, state } = model, { manages, infers } = session.value, { serving } = useOf(model);
  const serves = state === "loaded", job = model.open_load;
  const load = () => openDialog(LoadDialog, { model }), unload = () => openDialog(UnloadDialog, { model });
  const offer = (may, text, onClick, kind) => may && html`<${Button} about=${id} kind=${kind} onClick=${onClick}>${text}<//>`;
  return html`
    ${job && html`<${CancelButton} job=${job} />`}
    ${offer(infers && serves, "Infer…", () => openDialog(InferDialog, { model }))}
    ${offer(manages && ["unloaded", "failed", "lost"].includes(state), "Load…", load)}
    ${offer(manages && serves, "Swap…", load)}
    ${offer(manages && serves && serving, serving?.pinned ? "Unpin" : "Pin", () => pin(model, !serving.pinned))}
    ${offer(manages && (serves || state === "lost" || model.error?.code === "bytes_gone"), "Unload…", unload)}
    ${offer(manages && ["loading", "unloading"].includes(state), "Force unload…", unload, "danger")}`;
}
