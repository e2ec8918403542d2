// Elements of the document, keyed lists, rows of tables, and notices. Text is only ever set as text.

export const byId = (id) => document.getElementById(id);

// Makes an element. `about` has attributes, and `onclick` and the like as functions; null leaves one out.
export function h(tag, about = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(about)) {
    if (value == null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

export function svg(tag, about = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(about)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Changes nothing that is so already: what is focused, selected or being read aloud stays so.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setAttribute(node, name, value) {
  if (value == null || value === false) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

export function show(node, visible) {
  if (node.hidden === visible) node.hidden = !visible;
}

// Shows a text, or hides the element of an empty one.
export function showText(node, text) {
  setText(node, text);
  show(node, text !== "");
}

// Has a parent show `items` in order, each by the node that was made for its key; nodes are kept, not remade. A node
// with a method `update` is given its item, at first and each time.
export function reconcile(parent, items, make, keyOf = (item) => item.id) {
  const known = parent.shown ?? (parent.shown = new Map());
  const wanted = new Set(items.map(keyOf));
  for (const [key, node] of known) {
    if (!wanted.has(key)) {
      node.remove();
      known.delete(key);
    }
  }
  let place = parent.firstChild;
  for (const item of items) {
    const key = keyOf(item);
    let node = known.get(key);
    if (node === undefined) known.set(key, (node = make(item)));
    node.update?.(item);
    if (node === place) place = place.nextSibling;
    else moveBefore(parent, node, place);
  }
}

// A node that has the focus stays where it is, and others go around it: a move would take the focus away.
function moveBefore(parent, node, place) {
  const focused = node.contains(document.activeElement) ? document.activeElement : null;
  parent.insertBefore(node, place);
  if (focused) focused.focus({ preventScroll: true });
}

// A button's name says what it is for: what the eye sees in its row is not there for the ear.
export function button(text, about, onclick, kind = null) {
  return h("button", { type: "button", class: kind, onclick }, text, h("span", { class: "unseen" }, ` ${about}`));
}

export const badge = (text, title = null) => h("span", { class: "badge", title }, text);

// A state, such as of a model or a job, as a coloured word.
export function statePill() {
  const pill = h("span", { class: "pill" });
  pill.update = (state) => {
    setText(pill, state.replace("_", " "));
    setAttribute(pill, "class", `pill ${state}`);
  };
  return pill;
}

// A table's row and its cells, which a narrow screen shows as a card with the labels.
export function tableRow(heading, ...cells) {
  return h("tr", { role: "row" }, h("th", { scope: "row", role: "rowheader" }, ...heading), ...cells);
}

export function cell(label, kind = null, ...children) {
  return h("td", { "data-label": label, class: kind, role: "cell" }, ...children);
}

// The last cell of a row, with its buttons.
export const actionsCell = (...buttons) => h("td", { role: "cell" }, h("div", { class: "do" }, ...buttons));

// Has a narrow screen leave out the cells that say nothing.
export function markEmpty(cells) {
  for (const each of cells) each.classList.toggle("none", each.textContent === "–");
}

const MOST_NOTICES = 4;
const STAYS_MS = 15_000; // what went well: the rest of the page shows it, too

// Says once, to the eye and to the ear, what came of a request. Returns what takes it away again.
export function notice(text, kind = "good") {
  const list = byId("notices");
  const item = h("li", { class: `notice ${kind}` }, h("span", {}, text), h("button", { type: "button", onclick: () => item.remove(), "aria-label": "Dismiss" }, "×"));
  list.append(item);
  while (list.children.length > MOST_NOTICES) list.firstChild.remove();
  if (kind === "good") setTimeout(() => item.remove(), STAYS_MS);
  return () => item.remove();
}
