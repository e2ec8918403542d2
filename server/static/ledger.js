// The ledger: its newest events, those that are asked for, and each as it was hashed; live while it follows. The filters
// are in the page's address.

import { api, errorText, Latest } from "./api.js";
import { summary, toneOf, TYPES } from "./eventtext.js";
import { count, named, oneLine } from "./format.js";
import { address, href, replace } from "./router.js";
import { advance, connection, epoch, head, subscribe } from "./state.js";
import { Exact, Hint, html, PageHead, Refusal, Time, useEffect, useMemo, useRef, useRequest, useRetry, useState } from "./ui.js";

const PAGE = 50;
const MOST = 400; // events that are kept on the page, before older ones are asked for
const MOST_ASKED = 4000;
const FILTERS = { type: "Type", model: "Model", actor: "By", job: "Job" };
const NONE = { events: [], cursor: null, most: MOST, asOf: 0, error: null };

export function LedgerPage() {
  const filters = filtersOf(address.value.query), [isFollowing, setFollowing] = useState(true);
  const { events, cursor, error, isEmpty, fetchOlder } = useEvents(filters, isFollowing);
  return html`
    <${PageHead} title="Ledger" count=${head.value ? count(head.value, "event") : ""}>
      <label class="check"><input type="checkbox" checked=${isFollowing} onChange=${(event) => setFollowing(event.target.checked)} /> Follow</label>
    <//>
    <section id="ledger" class="panel ledger" aria-label="Events">
      <${Filters} filters=${filters} />
      <${Refusal} text=${error && errorText(error)} />
      <${EventList} events=${events} />
      ${isEmpty && html`<${Hint}>No event matches.<//>`}
      ${cursor !== null && events.length < MOST_ASKED && html`<button id="ledger-older" type="button" onClick=${fetchOlder}>Older</button>`}
    </section>`;
}

const filtersOf = (query) => Object.fromEntries(Object.keys(FILTERS).map((name) => [name, query[name] ?? ""]));

function Filters({ filters }) {
  const show = (form) => {
    const asked = [...new FormData(form)].map(([name, value]) => [name, value.trim()]);
    replace("ledger", null, Object.fromEntries(asked));
  };
  return html`
    <form id="ledger-filters" class="filters" autocomplete="off" aria-label="Filters of events"
      onSubmit=${(event) => (event.preventDefault(), show(event.currentTarget))}>
      ${Object.entries(FILTERS).map(([name, label]) => html`
        <span class="pair"><label for="ledger-${name}">${label}</label>
          ${name === "type" ? html`
            <select id="ledger-type" name="type" value=${filters.type} onChange=${(event) => show(event.currentTarget.form)}>
              <option value="">any</option>${TYPES.map((type) => html`<option value=${type}>${type}</option>`)}
            </select>`
            : html`<input id="ledger-${name}" name=${name} defaultValue=${filters[name]} autocomplete="off" maxlength="128" spellcheck=${false} />`}
        </span>`)}
      <button type="submit">Show</button>
      <button type="button" onClick=${(event) => (event.currentTarget.form.reset(), replace("ledger"))}>Clear</button>
    </form>`;
}

// The newest events that match, with those of the stream while it follows, and older ones as they are asked for.
export function useEvents(filters, isFollowing = true) {
  const [shown, setShown] = useState(NONE), latest = useMemo(() => new Latest(), []), followed = useRef(isFollowing);
  const key = JSON.stringify(filters);
  const fetchPage = (before) => {
    const query = new URLSearchParams({ before: before ?? Number.MAX_SAFE_INTEGER, limit: PAGE });
    for (const [name, value] of Object.entries(filters)) if (value) query.set(name, value);
    latest.request((signal) => api.get(`/api/v1/events?${query}`, { signal }), (page) => {
      advance(page.as_of);
      setShown((present) => (before === null ? withNewest(present, page, filters) : withOlder(present, page)));
    }, (error) => setShown((present) => ({ ...present, error })));
  };
  useEffect(() => {
    const isHeld = followed.current && !isFollowing; // what is shown stays when it stops to follow
    followed.current = isFollowing;
    if (!isHeld) fetchPage(null);
  }, [key, isFollowing, epoch.value]);
  useEffect(() => subscribe((events) => {
    const found = isFollowing ? events.filter((event) => matches(event, filters)) : [];
    if (found.length) setShown((present) => merge(present, found));
  }), [key, isFollowing]);
  const isUnheard = connection.value.mode === "polled" && isFollowing && head.value > shown.asOf; // no stream says it
  useEffect(() => {
    if (isUnheard) fetchPage(null);
  }, [isUnheard && head.value]);
  useEffect(() => () => latest.drop(), []);
  useRetry(shown.error, () => fetchPage(null));
  return { ...shown, isEmpty: shown.asOf > 0 && !shown.events.length, fetchOlder: () => fetchPage(shown.cursor) };
}

function matches(event, { type, model, actor, job }) {
  return (!type || event.type === type) && (!model || event.model_id === model) && (!actor || event.actor === actor)
    && (!job || event.job_id === job);
}

function withNewest({ events }, page, filters) {
  const since = events.filter((event) => event.position > page.as_of && matches(event, filters));
  return merge({ ...NONE, events: page.events, cursor: page.next_cursor, asOf: page.as_of }, since);
}

function withOlder(present, page) {
  const most = Math.max(MOST, Math.min(MOST_ASKED, present.events.length + PAGE));
  return merge({ ...present, most, cursor: page.next_cursor, error: null }, page.events);
}

// Adds events, newest first, and drops the oldest beyond the most that are kept.
function merge(present, more) {
  const all = new Map([...present.events, ...more].map((event) => [event.position, event]));
  const sorted = [...all.values()].sort((a, b) => b.position - a.position), events = sorted.slice(0, present.most);
  return { ...present, events, cursor: events.length < sorted.length ? events.at(-1).position : present.cursor };
}

export function EventList({ events }) {
  const lines = events.map((event) => html`<${EventLine} key=${event.position} event=${event} />`);
  return html`<ol id="ledger-list" class="events" aria-label="Events, newest first">${lines}</ol>`;
}

// An event in a line, which opens to its exact text.
function EventLine({ event }) {
  const [isOpen, setOpen] = useState(false);
  const subject = event.model_id ? named(event.model_id, event.version) : "";
  return html`
    <li class="event" data-position=${event.position}>
      <details onToggle=${(toggle) => setOpen(toggle.currentTarget.open)}>
        <summary><span class="position">${event.position}</span> <${Time} at=${event.recorded_at} />${" "}
          <strong class=${toneOf(event)}>${oneLine(event.type, 60)}</strong> <span>${subject}</span>${" "}
          <span class="dim">by ${oneLine(event.actor, 130)}</span> <span class="says">${summary(event)}</span></summary>
        ${isOpen && html`<${EventText} position=${event.position} />
          <p class="links"><a href=${href("timeline", event.position)}>Look at this moment</a>
            ${event.job_id && html`<a href=${href("jobs", event.job_id)}>Job</a>`}</p>`}
      </details>
    </li>`;
}

// An event's body, as it was hashed, with its hash: read into numbers and written again, some would be rounded.
export function splitEvent(answer) {
  const line = answer.slice('{"events":['.length, answer.lastIndexOf('],"as_of"')), end = line.lastIndexOf(',"hash":"');
  return { body: `${line.slice(0, end)}}`, hash: line.slice(end + ',"hash":"'.length, -2) };
}

function EventText({ position }) {
  const ask = (after, signal) => api.text(`/api/v1/events?after=${after}&limit=1`, { signal }).then(splitEvent);
  const { answer, error } = useRequest((signal) => Promise.all([
    ask(position - 1, signal), position > 1 ? ask(position - 2, signal) : { hash: "0".repeat(64) },
  ]), [position]);
  if (!answer) return html`<${Refusal} text=${error && errorText(error)} />`;
  const [{ body, hash }, before] = answer;
  return html`
    <pre tabindex="0" role="group" aria-label="Event ${position}, as it was hashed"><${Exact} text=${body} /></pre>
    <${Hint}>The SHA-256 of the hash before, as 32 bytes, and this text is the event's hash.
      Before: <code>${before.hash}</code>, hash: <code>${hash}</code><//>`;
}
