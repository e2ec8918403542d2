// What came of what was asked for here, said once, to the eye and to the ear.

import { byId, el } from "./dom.js";

const MOST = 4;
const STAYS_MS = 15_000; // what went well: the rest of the page shows it, too

// Returns what takes it away again.
export function notice(text, kind = "good") {
  const list = byId("notices");
  const item = el("li", { class: `notice ${kind}` }, el("span", {}, text), el("button", { type: "button", onclick: () => item.remove(), "aria-label": "Dismiss" }, "×"));
  list.append(item);
  while (list.children.length > MOST) list.firstChild.remove();
  if (kind === "good") setTimeout(() => item.remove(), STAYS_MS);
  return () => item.remove();
}
