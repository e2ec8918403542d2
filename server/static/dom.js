// The few things that the page does to its document. Text is only ever set as text.

export const byId = (id) => document.getElementById(id);

// A new element. `about` has attributes, and `onclick` and the like as functions; null leaves one out.
export function el(tag, about = {}, ...children) {
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

export function tell(node, text) {
  setText(node, text);
  show(node, text !== "");
}

// Has a parent show `items` in order, each by the node that was made for its key; nodes are kept, not remade.
export function keyed(parent, items, keyOf, make, update) {
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
    update(node, item);
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
export function button(text, about, onclick, kind = "") {
  return el("button", { type: "button", class: kind || null, onclick }, text, el("span", { class: "unseen" }, ` ${about}`));
}
