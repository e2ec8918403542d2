// Addresses within the page: each model, job, moment and range has a URL, which can be pasted into a ticket.
// They stand behind the #, so the server never sees them, and they survive signing in.
//
//   #/                                the overview
//   #/models/ID                       a model
//   #/jobs/ID                         a job
//   #/at/POSITION  or  #/at/TIME      a moment of the past
//   #/ledger?from=TIME&to=TIME        a range of the timeline; #/ledger?last=SECONDS ends now
//
// Any address may carry the query of the timeline (`from`, `to`, `last`, `find`), which stays as it is when
// the view changes.

import { callEach } from "./store.js";

const VIEWS = ["models", "jobs", "at", "ledger"];
const WITH_ID = ["models", "jobs", "at"];

// Reads an address: {view, id, query}. What is no address of the page is the overview, view "".
export function parse(hash) {
  const [path, search = ""] = hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const [view, ...rest] = path.split("/");
  const query = Object.fromEntries(new URLSearchParams(search));
  const id = decoded(rest.join("/"));
  if (!VIEWS.includes(view) || (WITH_ID.includes(view) ? !id : rest.length)) return { view: "", id: null, query };
  return { view, id, query };
}

function decoded(text) {
  try {
    return decodeURIComponent(text) || null;
  } catch {
    return null;
  }
}

// Writes an address, for links: href("models", "digits"). A query member that is null or empty is left out.
export function href(view = "", id = null, query = {}) {
  const kept = Object.entries(query).filter(([, value]) => value != null && value !== "");
  const search = kept.length ? `?${new URLSearchParams(kept)}` : "";
  return `#/${view}${id == null ? "" : `/${encodeURIComponent(id)}`}${search}`;
}

// The address of a page. A view that watches is called now and after each change.
export class Router {
  #watchers = [];
  #now = parse(location.hash);

  constructor() {
    addEventListener("hashchange", () => this.#changed());
  }

  get now() {
    return this.#now;
  }

  watch(view) {
    this.#watchers.push(view);
    view(this.#now);
  }

  // Changes the address in place, without a step for Back: for what moves all the time, such as a range.
  replace(view = "", id = null, query = {}) {
    history.replaceState(null, "", this.href(view, id, query));
    this.#changed();
  }

  // The address of a link, which keeps the present query, with these changes.
  href(view = "", id = null, query = {}) {
    return href(view, id, { ...this.#now.query, ...query });
  }

  #changed() {
    this.#now = parse(location.hash);
    callEach(this.#watchers, this.#now);
  }
}
