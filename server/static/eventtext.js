// Events as text, by the table that logs and the command line use too.

import { EVENT_TEXTS, HASH_DIGITS } from "./tables.js";
import { oneLine, withoutIds, words } from "./format.js";

export const TYPES = Object.keys(EVENT_TEXTS);

export function toneOf(event) {
  const text = EVENT_TEXTS[event.type];
  return text?.badIf && event.data?.[text.badIf] ? "bad" : text?.tone ?? "plain";
}

const FORMS = {
  undefined: String,
  ms: (microseconds) => `${Math.round(microseconds / 1000)} ms`,
  MB: (size) => `${(size / 1e6).toFixed(1)} MB`,
  list: (items) => items.join(", "),
  acts: (acts) => acts.map(words).join(", "),
  devices: (uses) => uses.map((use) => `${use.device} (${use.nodes} graph nodes)`).join(", "),
  plain: words,
  rules: (rules) => rules.map((rule) => `${rule.mode ?? "approval"} ${rule.models.join(", ")}`).join("; "),
  files: (files) => files.map((file) => `${file.path} ${file.sha256.slice(0, HASH_DIGITS)}`).join(", "),
};

const isEmpty = (value) => value == null || (Array.isArray(value) && !value.length);

const find = (data, path) => path.split(".").reduce((found, step) => (Array.isArray(found) ? found.at(Number(step)) : found?.[step]), data);

function fill(part, data) {
  const choice = /^(\w+)\?([^|]*)\|?(.*)$/.exec(part);
  if (choice) return data[choice[1]] ? choice[2] : choice[3];
  let isLeftOut = false;
  const text = part.replace(/\{([\w.-]+)\??(?::(\w+))?\}/g, (_, path, form) => {
    const value = find(data, path);
    isLeftOut ||= isEmpty(value);
    return isEmpty(value) ? "" : FORMS[form](value);
  });
  return isLeftOut ? "" : text;
}

export function summary(event) {
  try {
    const parts = EVENT_TEXTS[event.type]?.parts ?? [];
    return oneLine(withoutIds(parts.map((part) => fill(part, event.data)).filter(Boolean).join(", ")), 300);
  } catch {
    return ""; // an event of a later schema: its text is there to be read
  }
}
