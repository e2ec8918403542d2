// Preact with htm and signals, and the components that all pages share. Text is only ever set as text.

import { Component, h, render } from "./vendor/preact.js";
import { useCallback, useEffect, useLayoutEffect, useMemo, useRef, useState } from "./vendor/hooks.js";
import { computed, effect, signal, untracked, useSignal } from "./vendor/signals.js";
import htm from "./vendor/htm.js";
import { Latest, Unreachable } from "./api.js";
import { bytes, clock, cutAtHidden, named, oneLine, stamp, words } from "./format.js";
import { href } from "./router.js";

export { render };
export { useEffect, useLayoutEffect, useMemo, useRef, useState };
export { computed, effect, signal, untracked, useSignal };

export const html = htm.bind(h);

// The head of a page. The shell moves the focus to its heading when the page changes.
export function PageHead({ title, count, children }) {
  return html`
    <div class="head page-head">
      <h2 tabindex="-1">${title}${count && html` <span class="count">${count}</span>`}</h2>${children}
    </div>`;
}

// Shows what its children fail with, instead of them: one part that fails must not blind the others.
export class Boundary extends Component {
  static getDerivedStateFromError = (error) => ({ error });

  componentDidCatch(error) {
    console.error(error);
  }

  render({ children }, { error }) {
    return error ? html`<${Refusal} text="This part of the page failed: ${oneLine(error.message)}. Reload the page." />` : children;
  }
}

// A part of a page with a heading, and controls beside it; `drops` are the properties of what takes dropped files.
export function Panel({ kind, title, controls, drops, children }) {
  const id = `panel-${kind}`;
  return html`
    <section aria-labelledby=${id} ...${drops} class="panel ${kind} ${drops?.class ?? ""}">
      <div class="head"><h3 id=${id}>${title}</h3>${controls}</div>
      <${Boundary}>${children}<//>
    </section>`;
}

// A button's name says what it is for: what the eye sees in its row is not there for the ear.
export function Button({ about, onClick, kind, children, ...more }) {
  return html`
    <button type="button" class=${kind} onClick=${onClick} ...${more}>
      ${children}${about && html`<span class="unseen"> ${about}</span>`}
    </button>`;
}

export const Badge = ({ title, children }) => html`<span class="badge" title=${title}>${children}</span>`;

// A state, such as of a model or a job, as a coloured word.
export const Pill = ({ state }) => html`<span class="pill ${state}">${words(state)}</span>`;

export const Time = ({ at }) => html`<time datetime=${at} title=${stamp(at)}>${clock(at)}</time>`;

export const Hint = ({ children }) => html`<p class="hint">${children}</p>`;

export const Refusal = ({ text }) => text && html`<p class="refusal" role="alert">${text}</p>`;

export const ModelLink = ({ id, version = null }) => html`<a class="name" href=${href("models", id)}>${named(id, version)}</a>`;

// A table's row and its cells, which a narrow screen shows as a card with the labels, without the cells that say nothing.
export function Row({ heading, children, ...more }) {
  return html`<tr role="row" ...${more}><th scope="row" role="rowheader">${heading}</th>${children}</tr>`;
}

export function Cell({ label, kind = "", title, children }) {
  return html`<td data-label=${label} class="${kind}${children === "–" ? " none" : ""}" title=${title} role="cell">${children}</td>`;
}

export const ActionsCell = ({ children }) => html`<td role="cell"><div class="do">${children}</div></td>`;

// Text, character for character: those that could hide or turn it around are named, and turn nothing beyond themselves.
export function Exact({ text }) {
  const mark = (part) => html`<span class="hidden-character" data-code="U+${part.charCodeAt(0).toString(16).padStart(4, "0")}">${part}</span>`;
  return cutAtHidden(text).map((part, number) => (number % 2 ? mark(part) : part));
}

// A version's files with their SHA-256.
export function Files({ files }) {
  return html`<ul class="files">${files.map((file) => html`<li key=${file.path}>
    <span>${oneLine(file.path, 200)}, ${bytes(file.bytes)} </span><code>${oneLine(file.sha256, 64)}</code></li>`)}</ul>`;
}

// Asks `ask(signal)` at first, when `deps` change, by `again`, and until an answer comes; the latest one wins, and stays until
// the next.
export function useRequest(ask, deps) {
  const [found, setFound] = useState({ answer: null, error: null });
  const latest = useMemo(() => new Latest(), []), asking = useRef(ask);
  asking.current = ask;
  const again = useCallback(() => latest.request((signal) => asking.current(signal),
    (answer) => setFound({ answer, error: null }), (error) => setFound((before) => ({ ...before, error }))), []);
  useEffect(() => void again(), deps);
  useRetry(found.error, again);
  useEffect(() => () => latest.drop(), []);
  return { ...found, again };
}

// Calls `again` a little after the server could not be reached.
export function useRetry(error, again) {
  useEffect(() => {
    const timer = error instanceof Unreachable ? setTimeout(again, RETRY_MS) : null;
    return () => clearTimeout(timer);
  }, [error]);
}

// Keeps the focus where it is when rows are put in another order: a node that moves loses it. From a button that is gone, it
// goes to the head of its row, to the last row of its list, or to the head of the page.
export function useKeptFocus() {
  const focused = document.activeElement, row = focused?.closest("tr, section");
  useLayoutEffect(() => {
    if (document.activeElement !== document.body || focused === document.body) return;
    const kept = focused?.isConnected ? focused : row?.isConnected && [...row.querySelectorAll("th a")].at(-1);
    (kept || document.querySelector("main h2"))?.focus({ preventScroll: true });
  });
}

const RETRY_MS = 3000;
const MOST_NOTICES = 4;
const STAYS_MS = 15_000; // what went well: the rest of the page shows it, too
let number = 0;

export const notices = signal([]);

// Says once, to the eye and to the ear, what came of a request. Returns what takes it away again.
export function notice(text, kind = "good") {
  const withdraw = () => (notices.value = notices.value.filter((each) => each !== mine));
  const mine = { text, kind, withdraw, number: (number += 1) };
  notices.value = [...notices.value, mine].slice(-MOST_NOTICES);
  if (kind === "good") setTimeout(withdraw, STAYS_MS);
  return withdraw;
}
