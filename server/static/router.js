// Addresses within the page: each page, model, job, moment and range has a URL, which can be pasted into a ticket.
// They stand behind the #, so the server never sees them, and they survive signing in.
//
//   #/                                        the overview
//   #/models/ID                               a model
//   #/timeline  or  #/timeline?from=&to=      the timeline and a range of it; ?last=SECONDS ends now
//   #/at/POSITION  or  #/at/TIME              a moment of the past, on the page of the timeline
//   #/ledger  or  #/ledger?type=&model=       the events
//   #/jobs  or  #/jobs/ID                     the jobs, or one
//   #/nodes                                   the nodes

import { signal } from "./vendor/signals.js";

const PAGES = ["timeline", "ledger", "jobs", "nodes", "models"];

// Reads an address: {page, id, query}. What is no address of the page is the overview, page "".
export function parse(hash) {
  const [path, search = ""] = hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const [first, ...rest] = path.split("/");
  const query = Object.fromEntries(new URLSearchParams(search)), id = decoded(rest.join("/"));
  if (first === "at" && id) return { page: "timeline", id, query };
  if (!PAGES.includes(first) || (first === "models" && !id)) return { page: "", id: null, query };
  return { page: first, id: first === "models" || first === "jobs" ? id : null, query };
}

function decoded(text) {
  try {
    return decodeURIComponent(text) || null;
  } catch {
    return null;
  }
}

export const address = signal(parse(location.hash));
addEventListener("hashchange", () => (address.value = parse(location.hash)));

// Writes an address, for links: href("models", "digits"). A query member that is null or empty is left out.
export function href(page = "", id = null, query = {}) {
  const kept = Object.entries(query).filter(([, value]) => value != null && value !== "");
  const search = kept.length ? `?${new URLSearchParams(kept)}` : "", path = page === "timeline" && id != null ? "at" : page;
  return `#/${path}${id == null ? "" : `/${encodeURIComponent(id)}`}${search}`;
}

// Changes the address in place, without a step for Back: for what moves all the time, such as a range.
export function replace(page, id, query) {
  history.replaceState(null, "", href(page, id, query));
  address.value = parse(location.hash);
}
