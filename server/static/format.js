// How values are written for people. Whatever others wrote passes through `plain` or `oneLine`.

const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

// Text without what could hide or turn it around: controls, and marks of direction; never endless.
export function plain(text, most = 4096) {
  const clean = String(text ?? "").slice(0, most + 1).replace(/\r\n?/g, "\n").replace(HIDDEN, "\ufffd");
  return clean.length > most ? `${clean.slice(0, most)}…` : clean;
}

// Text cut at what `plain` would replace: every second part is such a character.
export const cutAtHidden = (text) => text.split(new RegExp(`(${HIDDEN.source})`));

// The first line, with the one that it announces, of what is told as a whole elsewhere.
export const firstLine = (text, most = 120) => oneLine(plain(text).trim().replace(/:\n/, ": ").split("\n")[0], most);

// A model with its version, as commands take it.
export const named = (model, version) => oneLine(version == null ? model : `${model}/${version}`, 160);
// A value of an enumeration, such as a state, as words.
export const words = (value) => value.replaceAll("_", " ");
// What the server says, without the ids of jobs: links lead there.
export const withoutIds = (text) => text.replace(/\bjob [0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b/g, "another job");

export function oneLine(text, most = 600) {
  return plain(text, most).replace(/\s+/g, " ").trim();
}

// Bytes as people compare them: 54 MB, 1.2 GB; the same powers of ten as the command line has.
export function bytes(count) {
  if (count == null) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let size = Math.abs(count), unit = 0;
  while (size >= 999.5 && unit < units.length - 1) [size, unit] = [size / 1000, unit + 1];
  const digits = unit > 0 && size < 9.95 ? 1 : 0;
  return `${count < 0 ? "−" : ""}${size.toFixed(digits)} ${units[unit]}`;
}

export function duration(seconds) {
  if (seconds == null) return "–";
  if (seconds < 1) return `${Math.max(0, Math.round(seconds * 1000))} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 100) return `${Math.round(seconds)} s`;
  if (seconds < 6000) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172_800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86_400)} days`;
}

const APART_MS = 3000; // less is the way that an answer takes
let ahead = 0; // of the server's clock, before this one

// Learns from an answer's `Date`: by a clock that is wrong here, what began just now would take for an hour.
export function learnClock(date) {
  const apart = Date.parse(date) + 500 - Date.now(); // it says whole seconds
  if (!Number.isNaN(apart)) ahead = Math.abs(apart) > APART_MS ? apart : 0;
}

// The time of the server, whose stamps it is compared with.
export const serverNow = () => Date.now() + ahead;

export function secondsSince(stamp, now = serverNow()) {
  return stamp ? Math.max(0, (now - Date.parse(stamp)) / 1000) : null;
}

// How long something has been so, in whole seconds: a figure that changes with every look cannot be read.
export function age(seconds) {
  return seconds < 60 ? `${Math.floor(seconds)} s` : duration(seconds);
}

export function ago(stamp, now = serverNow()) {
  const seconds = secondsSince(stamp, now);
  if (seconds == null) return "never";
  if (seconds < 1.5) return "just now";
  return `${age(seconds)} ago`;
}

// The time of day here; with the day and the zone, unless that is today.
export function clock(stamp) {
  if (!stamp) return "–";
  const time = new Date(stamp);
  return time.toDateString() === new Date().toDateString() ? local(time).slice(11) : moment(stamp);
}

// The time here with its date and zone, as it can be quoted.
export function moment(stamp) {
  const time = new Date(stamp);
  return `${local(time).replace("T", " ")} ${zone(time)}`;
}

// The offset from UTC here at a time: UTC, UTC+1, UTC+5:30.
export function zone(time = new Date()) {
  const minutes = -time.getTimezoneOffset(), [hours, rest] = [Math.floor(Math.abs(minutes) / 60), Math.abs(minutes) % 60];
  return minutes === 0 ? "UTC" : `UTC${minutes < 0 ? "−" : "+"}${hours}${rest ? `:${String(rest).padStart(2, "0")}` : ""}`;
}

// The time here with its zone, for what is read later or elsewhere: a time of day alone says less than it seems.
export function stamp(text) {
  if (!text) return "at an unknown time";
  const time = new Date(text), day = time.toDateString() === new Date().toDateString() ? "" : `on ${local(time).slice(0, 10)} `;
  return `${day}at ${local(time).slice(11)} ${zone(time)}`;
}

// As `datetime-local` takes it: the time here, without an offset.
export function local(time) {
  const shifted = new Date(time.getTime() - time.getTimezoneOffset() * 60_000);
  return shifted.toISOString().slice(0, 19);
}

export function count(amount, one, many = `${one}s`) {
  return `${amount.toLocaleString("en")} ${amount === 1 ? one : many}`;
}

export const JOB_KINDS = { load: "Load", unload: "Unload" };

const CAUSES = { restart: "after a restart", recovery: "after its worker ended", swap: "after a replacement failed", drain: "at another node, because its own drains", copy: "as a copy, which serves in place of one that ended" };

// Where a model is loaded: its node, or those of its copies, with the version of a copy that has another one.
export function placesText(model) {
  const nameOf = ({ node, version }) => `${oneLine(node ?? "–", 130)}${version === model.version ? "" : ` (version ${version})`}`;
  return model.copies_at?.length ? model.copies_at.map(nameOf).join(", ") : oneLine(model.node ?? "–", 130);
}

// How many copies of a model are ready; empty if it is to have one.
export function copiesText({ copies, copies_ready: ready }) {
  return copies == null ? "" : `${ready} of ${count(copies, "copy", "copies")} ready`;
}

// Whether the system loaded again what somebody asked for.
export function broughtBack(model) {
  return model.brought_back ? `, brought back ${CAUSES[model.brought_back] ?? `(${oneLine(model.brought_back, 20)})`}` : "";
}
