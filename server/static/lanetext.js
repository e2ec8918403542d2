// The timeline in words: what an item of a lane is, and the table for who does not see the drawing.

import { el } from "./dom.js";
import { count, duration, moment, oneLine } from "./format.js";
import { MARKS, ofServer, serverName } from "./lanes.js";

const DIGITS = 12; // of a hash: as the events have them
const MOST = 400; // rows of the table
const SERVER = {
  running: "ran", stopped: "was stopped", unknown: "ended unexpectedly",
  joined: "was there", draining: "was being drained", left: "had left", lost: "was lost",
};

// What an item is, as lines: the first is its title.
export function describe(lane, item) {
  return item.kind === "mark" ? describeMark(lane, item.mark) : ofServer(lane) ? describeServer(lane, item.segment) : describeSegment(lane, item.segment);
}

function times(segment) {
  return `${moment(segment.from)} to ${moment(segment.to)}, ${duration((Date.parse(segment.to) - Date.parse(segment.from)) / 1000)}`;
}

function describeServer(lane, segment) {
  const name = lane.node_id === undefined ? "The server" : oneLine(`Node ${lane.node_id}`, 130);
  const starts = segment.restarts > 1 ? `; ${count(segment.restarts, "start")}` : "";
  const state = segment.state === "unknown" && lane.node_id !== undefined ? "did not renew its lease" : SERVER[segment.state];
  const found = lane.node_id === undefined ? ", and was found ended at the next start" : "";
  const until = segment.state === "unknown" ? `It may have run for some of this time${found}.` : "";
  return [`${name} ${state}${starts}`, times(segment), until].filter(Boolean);
}

function describeSegment(lane, segment) {
  const version = segment.version == null ? "" : ` ${segment.version}`, load = loadOf(lane, segment);
  if (segment.waiting && !segment.summary) return describeWaiting(lane, segment);
  const title = segment.summary ? `${lane.model_id}: ${count(segment.events, "event")}, ${segment.state}${segment.state === "unloaded" ? "" : version} at the end` : `${lane.model_id}${version} ${segment.state}`;
  const cause = segment.cause && segment.cause !== "request" ? `, cause ${segment.cause}` : "";
  return [
    oneLine(title, 200),
    times(segment),
    segment.summary ? "Too short, or too many, to draw apart: zoom in." : segment.by ? `by ${oneLine(segment.by, 130)}${cause}` : "",
    segment.next_version == null ? "" : `version ${segment.next_version} loads beside it`,
    segment.degraded ? "degraded: some of its workers are gone" : "",
    segment.error ? `error ${segment.error}` : "",
    load && !segment.summary ? `bytes: ${bytesOf(load)}` : "",
    !segment.summary && segment.load_job_id ? `job ${segment.load_job_id}` : "",
  ].filter(Boolean);
}

function describeWaiting(lane, segment) {
  return [oneLine(`${lane.model_id} ${segment.next_version} waits to be loaded`, 200), times(segment),
    segment.by ? `requested by ${oneLine(segment.by, 130)}` : "", `job ${segment.load_job_id}`].filter(Boolean);
}

function describeMark(lane, mark) {
  const version = mark.version == null ? "" : ` ${mark.version}`;
  return [
    oneLine(`${lane.model_id}${version} ${MARKS[mark.kind][1]}${mark.code ? `: ${mark.code}` : ""}`, 200),
    `${moment(mark.at)}${mark.count > 1 ? `, the last of ${mark.count.toLocaleString("en")} nearby` : ""}`,
    mark.by ? `by ${oneLine(mark.by, 130)}` : "",
    `event ${mark.position}`,
  ].filter(Boolean);
}

export function loadOf(lane, segment) {
  return lane.loads.find((load) => load.job_id === segment.load_job_id);
}

export function bytesOf(load) {
  const more = load.file_count - load.files.length;
  return load.files.map((file) => `${oneLine(file.path, 80)} ${file.sha256.slice(0, DIGITS)}`).join(", ") + (more > 0 ? ` and ${more} more` : "");
}

export function fillTable(table, lanes) {
  const items = lanes.flatMap((lane) => lane.items.map((item) => ({ lane, item })));
  const rows = items.slice(0, MOST).map(({ lane, item }) => {
    const [title, when, ...rest] = describe(lane, item);
    return el("tr", { role: "row" }, el("th", { scope: "row", role: "rowheader" }, ofServer(lane) ? serverName(lane) : lane.model_id),
      ...[["State", title], ["When", when], ["By, bytes, job", rest.join("; ")]].map(([label, text]) => el("td", { "data-label": label, role: "cell" }, text)));
  });
  if (items.length > MOST) rows.push(el("tr", { role: "row" }, el("td", { colspan: 4, role: "cell" }, `And ${(items.length - MOST).toLocaleString("en")} more: zoom in.`)));
  table.replaceChildren(...rows);
}
