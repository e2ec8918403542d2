// Time travel: the models as of a position or a time, with who had loaded which bytes. The moment is in the address.

import { api, errorText } from "./api.js";
import { TrustBadges } from "./approvals.js";
import { summary } from "./eventtext.js";
import { broughtBack, clock, local, moment, named, oneLine, placesText, zone } from "./format.js";
import { address, replace } from "./router.js";
import { advance, head } from "./state.js";
import { Cell, Files, html, Pill, Refusal, Row, useEffect, useRequest, useState } from "./ui.js";

const MOST = 500; // models that are shown
const PAGE = 1000; // of one request
const REST_MS = 150; // what is being moved is committed where it rests for so long

// A value that may move for a while, such as a slider's: it is shown at once, and committed where it rests. The timer of
// one that has rested may be late, and fire when the value has moved on: then that goes on moving.
export function useResting(committed, commit) {
  const [moving, setMoving] = useState(null);
  useEffect(() => {
    if (moving === null) return undefined;
    const timer = setTimeout(() => (commit(moving), setMoving((latest) => (latest === moving ? null : latest))), REST_MS);
    return () => clearTimeout(timer);
  }, [moving]);
  return [moving ?? committed, setMoving];
}

// Asks for the models as of `id`, a position or a time, and for the event there; null is now.
export function useMoment(id) {
  return useRequest(async (signal) => {
    if (id === null) return null;
    const page = await fetchModels(id, signal);
    return { page, event: await fetchEvent(page.as_of, signal) };
  }, [id]);
}

// The moment in milliseconds; null is now, or not yet known.
export function timeOf(id, answer) {
  if (id === null) return null;
  const time = isPosition(id) ? answer?.page.as_of_time : id; // a time may be long after the event before it
  return Date.parse(time) || null;
}

const isPosition = (id) => /^\d+$/.test(id);

// All models of a moment, those first that were more than known of.
async function fetchModels(at, signal) {
  const ask = (when, cursor) => api.get(`/api/v1/models?${new URLSearchParams({ limit: PAGE, at: when, cursor })}`, { signal });
  const isBefore = ({ code }) => code === "before_first_event";
  const first = await ask(at, "").catch((problem) => (isBefore(problem) ? ask("0", "") : Promise.reject(problem)));
  const models = [...first.models];
  advance(first.as_of); // it may be later than what the page has heard of
  for (let cursor = first.next_cursor; cursor; ) {
    const page = await ask(first.as_of, cursor);
    models.push(...page.models);
    cursor = page.next_cursor;
  }
  models.sort((a, b) => (a.state === "unloaded") - (b.state === "unloaded"));
  return { ...first, models };
}

// The event at a position; null before all events.
async function fetchEvent(position, signal) {
  if (position === 0) return null;
  return (await api.get(`/api/v1/events?after=${position - 1}&limit=1`, { signal })).events[0];
}

export function AsOf({ id, past: { answer, error } }) {
  const { page, event } = (id !== null && answer) || {};
  const position = id === null ? head.value : isPosition(id) ? Number(id) : page?.as_of ?? head.value;
  const visit = (moment) => replace("timeline", moment, address.value.query);
  const visitPlace = (place) => visit(place === Infinity ? null : String(Math.max(0, Math.floor(place))));
  const [wanted, setWanted] = useResting(position, visitPlace);
  const move = (place, end = head.value) => setWanted(place >= end ? Infinity : place); // the end is now, even if it moves on
  const shown = Math.min(wanted, head.value), isNow = id === null;
  return html`
    <section id="past" class="panel past ${isNow ? "" : "then"}" aria-labelledby="past-title">
      <div class="head"><h3 id="past-title">As of</h3><p id="past-when" class="figures" aria-live="polite">${whenText(isNow, page, error)}</p></div>
      <div class="travel">
        <label for="past-slider" class="unseen">Position of the ledger</label>
        <input id="past-slider" type="range" min="0" max=${head.value} value=${shown}
          aria-valuetext="position ${shown} of ${head.value}" onInput=${({ target }) => move(Number(target.value), Number(target.max))} />
        <button type="button" disabled=${shown === 0} onClick=${() => move(shown - 1)}>◂ Before</button>
        <button type="button" disabled=${shown >= head.value} onClick=${() => move(shown + 1)}>After ▸</button>
        <span class="pair"><label for="past-position">Position</label>
          <${Field} id="past-position" type="number" min="0" max=${head.value} inputmode="numeric" value=${shown}
            enter=${(text) => visitPlace(Number(text))} /></span>
        <span class="pair"><label for="past-time">or time</label>
          <${Field} id="past-time" type="datetime-local" step="1" value=${page?.as_of_time ? local(new Date(page.as_of_time)) : ""}
            enter=${(text) => visit(new Date(text).toISOString())} />
          <span class="dim">${zone(new Date(page?.as_of_time ?? Date.now()))}</span></span>
        <button type="button" disabled=${isNow} onClick=${() => visit(null)}>Now</button>
      </div>
      <${Refusal} text=${!isNow && error && errorText(error)} />
      ${page && html`<${Then} page=${page} event=${event} />`}
    </section>`;
}

// A field whose text is the reader's while it has the focus: what is shown may change meanwhile. Enter counts also where
// the text is what was shown, which is no change for the browser.
function Field({ value, enter, ...more }) {
  const [typed, setTyped] = useState(null), send = (event) => event.target.value && enter(event.target.value);
  const keep = (event) => setTyped(event.target.value);
  return html`<input ...${more} value=${typed ?? value} onFocus=${keep} onInput=${keep}
    onChange=${send} onKeyDown=${(event) => event.key === "Enter" && send(event)} onBlur=${() => setTyped(null)} />`;
}

function whenText(isNow, page, error) {
  if (isNow) return `position ${head.value}, which is now`;
  if (!page) return error ? "" : "Loading…";
  if (page.as_of === 0) return "before everything";
  return `position ${page.as_of}${page.as_of_time ? `, ${moment(page.as_of_time)}` : ""}${absenceText(page.server)}`;
}

// What is to be said of the server, where it did not run or that is unknown.
function absenceText(server) {
  if (!server || server.state === "running") return "";
  const state = server.state === "unknown" ? "whether the server ran is unknown" : "the server was stopped";
  return `; ${state}${server.since ? ` since ${clock(server.since)}` : ""}`;
}

function Then({ page, event }) {
  const more = page.models.length - MOST;
  return html`
    ${event && html`<p id="past-event" class="figures">Here: ${eventText(event)}</p>`}
    ${page.nodes?.length > 0 && html`<p id="past-nodes" class="figures">${nodesText(page.nodes)}</p>`}
    <table class="cards">
      <caption class="unseen">Models at that time</caption>
      <thead><tr>${["Model", "State", "Version", "Loaded by", "Files (SHA-256)"].map((name) => html`<th scope="col">${name}</th>`)}</tr></thead>
      <tbody id="past-rows">${page.models.slice(0, MOST).map((model) => html`<${PastRow} key=${model.id} model=${model} />`)}</tbody>
    </table>
    ${page.models.length === 0 && html`<p class="hint">The ledger had no model at that time.</p>`}
    ${more > 0 && html`<p class="hint">And ${more} more.</p>`}`;
}

function eventText(event) {
  const words = [event.type, event.model_id && named(event.model_id, event.version), `by ${event.actor}`].filter(Boolean).join(" ");
  return [oneLine(words, 300), summary(event)].filter(Boolean).join(", ");
}

// The nodes that were there, and those that were lost.
function nodesText(nodes) {
  const there = nodes.filter((node) => node.state !== "left").map((node) => {
    const state = { joined: "", draining: " draining", lost: " lost", unknown: " not seen" }[node.state];
    return `${oneLine(node.id, 130)}${state}${state && node.since ? ` since ${clock(node.since)}` : ""}`;
  });
  return there.length ? `Nodes: ${there.join(", ")}` : "";
}

function PastRow({ model }) {
  const place = model.node ? ` at ${placesText(model)}` : "";
  const by = model.loaded_by ? `${oneLine(model.loaded_by, 130)}, ${clock(model.loaded_at)}${broughtBack(model)}${place}` : "–";
  return html`
    <${Row} heading=${html`<span class="name">${model.id}</span><${TrustBadges} model=${model} />`}>
      <${Cell} label="State"><${Pill} state=${model.state} /><//>
      <${Cell} label="Version">${model.version == null ? "–" : String(model.version)}<//>
      <${Cell} label="Loaded by">${by}<//>
      <${Cell} label="Files (SHA-256)" kind="hashes"><${Files} files=${model.files} /><//>
    <//>`;
}
