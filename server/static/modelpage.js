// The page of one model: facts, charts, inputs and outputs, programs that call it, versions, jobs and events.

import { api, errorText, requestErrorText } from "./api.js";
import { adderText, Approvals, approvalText, ApproveButton, signatureText } from "./approvals.js";
import { Charts } from "./charts.js";
import { LoadDialog, openDialog } from "./dialogs.js";
import { broughtBack, bytes, clock, count, oneLine, plain, stamp } from "./format.js";
import { JobItem } from "./jobs.js";
import { EventList, useEvents } from "./ledger.js";
import { factsOf, ModelBadges, ModelButtons, Status } from "./models.js";
import { address, href } from "./router.js";
import { PLACEHOLDER, snippets } from "./snippets.js";
import { jobs, models, nodes, session, subscribe, useOf } from "./state.js";
import { guessText, shapeText } from "./tensors.js";
import { ActionsCell, Button, Cell, Files, Hint, html, Panel, Refusal, Row, useEffect, useKeptFocus, useRequest, useState } from "./ui.js";
import { addVersion, mayAdd, useDrops } from "./upload.js";

const JOBS = 10;
const NAMING = ["ModelLoaded", "VersionAdded"]; // events that name the bytes of a version
const LOADS = 100; // the last ones of them
const PAUSE_MS = 500; // between an event and the look at what it changed

export function ModelPage() {
  const { id } = address.value, path = `/api/v1/models/${encodeURIComponent(id)}`, { audits, manages } = session.value;
  const changes = useChanges(id), described = useRequest((signal) => describe(path, signal), [changes]);
  const { answer, error } = described, model = models.value.get(id) ?? answer, why = error ? errorText(error) : answer ? "" : "Loading…";
  const [isQuiet, setQuiet] = useState(false); // charts that show nothing come last
  const charts = html`<${Panel} key="traffic" kind="traffic" title="Requests and memory"><${Charts} modelId=${id} onQuiet=${setQuiet} /><//>`;
  if (error?.status === 404 && !model) return html`<${Head} id=${id} refusal=${why} />`;
  return html`
    <${Head} id=${id} model=${model} refusal=${error ? why : ""} />
    ${!isQuiet && charts}
    ${model?.copies != null && html`<${Copies} copies=${model.copies_at ?? []} />`}
    <div class="halves"><${Tensors} model=${answer} why=${why} /><${Calls} id=${id} model=${answer} why=${why} /></div>
    ${model && html`<${Versions} model=${model} sources=${answer?.sources ?? []} changes=${changes} />`}
    ${model && html`<${Approvals} model=${model} />`}
    <div class="halves"><${Jobs} id=${id} changes=${changes} />${audits && html`<${Events} id=${id} />`}</div>
    ${manages && html`<${Printed} path=${path} changes=${changes} />`}
    ${isQuiet && charts}`;
}

// Counts the bursts of events of a model: what is asked for anew with each.
function useChanges(id) {
  const [changes, setChanges] = useState(0);
  useEffect(() => {
    let due = null;
    const end = subscribe((events) => {
      if (!events.some((event) => event.model_id === id)) return;
      clearTimeout(due);
      due = setTimeout(() => setChanges((before) => before + 1), PAUSE_MS);
    });
    return () => (end(), clearTimeout(due));
  }, [id]);
  return changes;
}

// A model with its inputs and outputs, which the protocol's metadata has for a loaded one.
async function describe(path, signal) {
  const model = await api.get(path, { signal });
  if (model.inputs || model.state !== "loaded") return model;
  try {
    const { inputs, outputs } = await api.get(`/v2/models/${encodeURIComponent(model.id)}`, { signal });
    return { ...model, inputs, outputs };
  } catch {
    return model; // it is not loaded any more
  }
}

// Its name and state, what may be done, and the facts of the moment.
function Head({ id, model, refusal }) {
  useKeptFocus();
  return html`
    <section class="panel model-head" aria-label="Model ${id}">
      <p class="crumbs"><a href=${href()}>‹ All models</a></p>
      <div class="head">
        <div class="titles">
          <h2 class="name" tabindex="-1">${oneLine(id, 130)}</h2>
          ${model && html`<${Status} model=${{ ...model, error: null }} /><${ModelBadges} model=${model} />`}
        </div>
        ${model && html`<div class="do"><${ModelButtons} model=${model} /></div>`}
      </div>
      <${Refusal} text=${model ? errorOf(model) : refusal} />
      ${model && html`<${Facts} model=${model} />`}
    </section>`;
}

const errorOf = ({ error }) => (error ? `${error.code}: ${plain(error.message)}` : "");

function deviceText({ device, nodes: there, provider, version, memory_bytes: memory }) {
  const taken = memory == null ? "" : `, ${bytes(memory)} when it was loaded`;
  return `${count(there, "node")} of its graph on ${oneLine(device, 80)} (${oneLine(`${provider} ${version}`, 80)}${taken})`;
}

function batchingText({ verdict, reason, joined }) {
  if (verdict === "independent") return "Requests of several clients are joined: rows are independent";
  const how = joined ? "joined, as dependent_rows allows" : "not joined";
  return `Requests of several clients are ${how}: ${oneLine(reason ?? "", 600)}`;
}

function choiceText({ version, by, at }) {
  const effect = version === null ? "; no inference loads it" : "";
  return `${version === null ? "Unloaded" : `Version ${version}`} by ${oneLine(by, 130)}, ${stamp(at)}${effect}`;
}

function Facts({ model }) {
  const facts = factsOf(model), fact = (name, value, kind = null) => html`<div class=${kind}><dt>${name}</dt><dd>${value}</dd></div>`;
  const loaded = model.loaded_at ? `${stamp(model.loaded_at)} by ${oneLine(model.loaded_by, 130)}${broughtBack(model)}` : "–";
  const threads = model.threads ? ` of ${count(model.threads, "thread")}` : "";
  return html`
    <dl class="facts">
      ${fact("Version", facts.version)}
      ${model.not_served && fact("Not served", oneLine(model.not_served, 400))}
      ${nodes.value.length > 0 && !facts.copies && fact("Node", facts.node)}
      ${facts.copies && fact("Copies", [facts.copies, oneLine(model.copies_waiting_for ?? "", 300)].filter(Boolean).join(": "))}
      ${model.rows && fact("Batching", batchingText(model.rows), "wide")}
      ${fact("Memory now", [facts.memory, useOf(model).serving && facts.memoryAtLoad].filter(Boolean).join(", "))}
      ${model.devices && fact("Device", model.devices.map(deviceText).join(", "))}
      ${fact("Loaded", loaded)}
      ${model.chosen && fact("Chosen", choiceText(model.chosen))}
      ${model.signature && fact("Signature", signatureText(model.signature))}
      ${model.approval && fact("Approval", approvalText(model.approval))}
      ${model.files.length > 0 && fact("Files", adderText(model.added_by))}
      ${fact("Last use", facts.lastUse)}
      ${fact("In flight", facts.inFlight)}
      ${fact("Workers", model.instances ? `${count(model.instances, "worker")}${threads}` : "–")}
    </dl>`;
}

// Its copies, the first of which has the facts above.
function Copies({ copies }) {
  const row = ({ node, version, workers, memory_bytes: memory, loaded_at: at, job_id: job }) => html`
    <${Row} key=${job} heading=${oneLine(node ?? "–", 130)}>
      <${Cell} label="Version">${String(version)}<//><${Cell} label="Workers" kind="number">${String(workers)}<//>
      <${Cell} label="Memory" kind="number">${bytes(memory)}<//>
      <${Cell} label="Loaded"><a href=${href("jobs", job)} title=${at}>${clock(at)}</a><//>
    <//>`;
  return html`
    <${Panel} kind="its-copies" title="Copies">
      ${copies.length > 0 && html`
        <table class="cards">
          <thead><tr>
            <th scope="col">Node</th><th scope="col">Version</th><th scope="col" class="number">Workers</th>
            <th scope="col" class="number">Memory when loaded</th><th scope="col">Loaded</th>
          </tr></thead>
          <tbody>${copies.map(row)}</tbody>
        </table>`}
      ${copies.length === 0 && html`<${Hint}>None is loaded.<//>`}
    <//>`;
}

function Tensors({ model: answer, why }) {
  const kinds = { input: answer?.inputs ?? [], output: answer?.outputs ?? [] };
  const tensors = Object.entries(kinds).flatMap(([kind, some]) => some.map((tensor) => ({ kind, ...tensor })));
  const row = ({ kind, name, datatype, ...tensor }) => html`
    <tr key="${kind} ${name}">
      <td class="dim">${kind}</td><th scope="row">${oneLine(name, 200)}</th><td>${oneLine(datatype, 20)}</td>
      <td><code>${shapeText(tensor)}</code></td>
    </tr>`;
  return html`
    <${Panel} kind="its-tensors" title="Inputs and outputs">
      ${tensors.length === 0 && html`<${Hint}>${why || "Its file does not say: they are known when it is loaded."}<//>`}
      ${tensors.length > 0 && html`
        <table class="tensors">
          <thead><tr>
            <th scope="col"><span class="unseen">Kind</span></th><th scope="col">Name</th><th scope="col">Type</th><th scope="col">Shape</th>
          </tr></thead>
          <tbody>${tensors.map(row)}</tbody>
        </table>
        <${Hint}>A name, or -1 where it has none, is a size that the model leaves open.<//>`}
    <//>`;
}

// How to ask it from elsewhere, to be copied.
function Calls({ id, model, why }) {
  const [chosen, setChosen] = useState(0), [copied, setCopied] = useState("");
  const written = model?.inputs ? snippets(location.origin, id, model.inputs, model.outputs) : [], guess = guessText(model?.inputs ?? []);
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(written[chosen].text);
      setCopied("Copied.");
    } catch {
      setCopied("The browser does not allow that: select the text and copy it."); // without TLS, for instance
    }
  };
  const tab = ({ name }, number) => html`
    <button key=${name} type="button" aria-pressed=${String(number === chosen)} onClick=${() => (setChosen(number), setCopied(""))}>
      ${name}
    </button>`;
  const tabs = written.length > 0 && html`<div class="segmented" role="group" aria-label="Language">${written.map(tab)}</div>`;
  return html`
    <${Panel} kind="its-calls" title="Ask it from elsewhere" controls=${tabs}>
      ${written.length > 0 && html`
        <pre tabindex="0" role="group" aria-label="The program">${written[chosen].text}</pre>
        <p class="buttons">
          <${Button} about="the program" onClick=${copy}>Copy<//><span class="hint" role="status">${copied}</span>
        </p>
        <${Hint}>
          Replace <code>${PLACEHOLDER}</code> by a token with the role infer. To make one, run on the server:
          ${" "}<code>loadledger token --data DATA --role infer --subject YOU</code>
        <//>
        ${guess && html`<${Hint}>${guess}<//>`}`}
      ${written.length > 0 && model.state !== "loaded" && html`<${Hint}>It has to be loaded first.<//>`}
      ${written.length === 0 && html`<${Hint}>${why || "The programs name its inputs, which are known when it is loaded."}<//>`}
    <//>`;
}

// Its versions, with the bytes that each had when it was loaded or added last.
function Versions({ model, sources, changes }) {
  const drops = useDrops(model.id), { audits } = session.value;
  const { answer: events } = useRequest((signal) => (audits ? fetchNamings(model.id, signal) : []), [changes]);
  const all = [...new Set([...(model.versions ?? []), ...(model.version === null ? [] : [model.version])])].sort((a, b) => b - a);
  const add = mayAdd.value && html`<${Button} about="of ${model.id}" onClick=${() => addVersion(model.id)}>Add a version…<//>`;
  const row = (version) => html`
    <${Version} key=${version} version=${version} model=${model} event=${events?.find((event) => event.version === version)}
      source=${sources.find((source) => source.version === version)} />`;
  return html`
    <${Panel} kind="its-versions" title="Versions and files" controls=${add} drops=${drops}>
      ${all.length > 0 && html`
        <table class="cards versions">
          <thead><tr>
            <th scope="col">Version</th><th scope="col">State</th><th scope="col">Files and their SHA-256</th>
            <th scope="col"><span class="unseen">Operations</span></th>
          </tr></thead>
          <tbody>${all.map(row)}</tbody>
        </table>`}
      ${all.length === 0 && html`<${Hint}>The repository has no version of it. ${mayAdd.value ? "Drop an ONNX file here." : ""}<//>`}
    <//>`;
}

async function fetchNamings(modelId, signal) {
  const query = new URLSearchParams({ model: modelId, before: Number.MAX_SAFE_INTEGER, limit: LOADS });
  for (const type of NAMING) query.append("type", type);
  return (await api.get(`/api/v1/events?${query}`, { signal })).events;
}

function Version({ version, model, event, source }) {
  const serves = model.version === version, files = serves && model.files.length ? model.files : event?.data.files ?? [];
  const lies = model.versions?.includes(version) ? "in the repository" : "gone from the repository";
  const state = serves ? model.state : model.next_version === version ? "is being loaded" : lies;
  const isPast = files.length > 0 && !serves && event, what = event?.type === "VersionAdded" ? "added" : "loaded";
  return html`
    <${Row} heading="Version ${version}">
      <${Cell} label="State">${state}<//>
      <td class="hashes" role="cell">
        <${Files} files=${files} />
        ${files.length === 0 && html`<${Hint}>Its hashes are recorded when it is loaded.<//>`}
        ${isPast && html`<${Hint}>As it was ${what} ${stamp(event.recorded_at)}.<//>`}
        ${source && html`<${Hint}>${originText(source)}<//>`}
      </td>
      <${ActionsCell}>
        ${session.value.manages && !(serves && model.state === "loaded") && html`
          <${Button} about="version ${version}" onClick=${() => openDialog(LoadDialog, { model, version })}>Load…<//>`}
        ${model.versions?.includes(version) && html`<${ApproveButton} model=${model} version=${version} />`}
      <//>
    <//>`;
}

// A statement of the caller who added the version: the server has not looked. Never a link: it may lead anywhere.
function originText({ source, resolved, added_by: by, added_at: at }) {
  const named = source === resolved ? "" : ` (named ${oneLine(source, 400)})`;
  return `Added ${stamp(at)} by ${oneLine(by, 130)}, who said that it came from ${oneLine(resolved, 400)}${named}.`;
}

// Its jobs as they were asked for, with what the page has heard of them since.
function Jobs({ id, changes }) {
  const path = `/api/v1/jobs?model=${encodeURIComponent(id)}&limit=${JOBS}`;
  const { answer, error } = useRequest((signal) => api.get(path, { signal }), [changes]);
  const live = new Map(jobs.value.map((job) => [job.id, job]));
  const shown = (answer?.jobs ?? []).map((job) => live.get(job.id) ?? job);
  return html`
    <${Panel} kind="its-jobs" title="Jobs">
      <ul class="jobs-list">${shown.map((job) => html`<${JobItem} key=${job.id} job=${job} />`)}</ul>
      ${error && html`<${Hint}>${errorText(error)}<//>`}
      ${answer?.jobs.length === 0 && html`<${Hint}>It was never loaded.<//>`}
    <//>`;
}

function Events({ id }) {
  const { events, cursor, error, isEmpty, fetchOlder } = useEvents({ model: id });
  return html`
    <${Panel} kind="its-events" title="Events">
      <div class="scroll" tabindex="0" role="group" aria-label="Events of the model"><${EventList} events=${events} /></div>
      ${isEmpty && html`<${Hint}>The ledger has no event of it.<//>`}
      ${error && html`<${Hint}>${errorText(error)}<//>`}
      ${cursor !== null && html`<button type="button" onClick=${fetchOlder}>Older</button>`}
    <//>`;
}

// What its workers printed last. It may hold what clients sent, so it is asked for only for admins.
function Printed({ path, changes }) {
  const { answer, error, again } = useRequest((signal) => api.get(`${path}/stderr`, { signal }), [changes]);
  const refresh = html`<${Button} about="the lines" onClick=${again}>Refresh<//>`, exited = answer?.last_exited;
  return html`
    <${Panel} kind="its-lines" title="Last lines of its workers" controls=${refresh}>
      ${answer?.workers.map(({ version, lines }, number) => html`
        <${Lines} key=${number} title="Worker of version ${version}, running" lines=${lines} />`)}
      ${exited && html`
        <${Lines} title="Worker of version ${exited.version}, ended unexpectedly ${stamp(exited.exited_at)}${endOf(exited)}" lines=${exited.lines} />`}
      ${error && html`<${Hint}>${requestErrorText(error)}<//>`}
      ${answer && !exited && answer.workers.length === 0 && html`<${Hint}>No worker of it runs, and none has ended unexpectedly.<//>`}
      ${answer && !answer.recorded && html`
        <${Hint}>The server was started with --ledger-stderr off: of a worker that has ended, the ledger keeps only why the server killed it.<//>`}
    <//>`;
}

function Lines({ title, lines }) {
  return html`
    <div class="printed"><p>${title}</p>
      ${lines.length > 0 && html`<pre tabindex="0" role="group" aria-label=${title}>${plain(lines.join("\n"), 20_000)}</pre>`}
      ${lines.length === 0 && html`<${Hint}>It has printed nothing.<//>`}
    </div>`;
}

const endOf = ({ exit_code: code, signal }) => (signal != null ? `, by signal ${signal}` : code != null ? `, with exit code ${code}` : "");
