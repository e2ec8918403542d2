// What an event says, in a line: its type says most, its data the rest.

import { bytes, count, duration, oneLine } from "./format.js";

export const TYPES = [
  "LoadRequested", "LoadStarted", "ModelLoaded", "LoadFailed", "UnloadRequested", "UnloadStarted", "ModelUnloaded",
  "UnloadFailed", "CancelRequested", "JobCancelled", "WorkerExited", "AccessDenied", "ServerStarted", "ServerStopped",
];

const BAD = new Set(["LoadFailed", "UnloadFailed", "WorkerExited", "AccessDenied"]);
const GOOD = new Set(["ModelLoaded"]);

export const kindOf = (type) => (BAD.has(type) ? "bad" : GOOD.has(type) ? "good" : "plain");

const SAYS = {
  LoadRequested: (data) => [data.cause === "request" ? null : `cause ${data.cause}`, data.strategy === "beside" ? null : data.strategy, data.pinned ? "pinned" : null],
  LoadStarted: (data) => [data.attempt > 1 ? `attempt ${data.attempt}` : null],
  ModelLoaded: (data) => [`in ${duration((data.durations?.total_us ?? 0) / 1e6)}`, bytes(data.memory_bytes), data.files?.[0] ? `sha256 ${String(data.files[0].sha256).slice(0, 8)}…` : null],
  LoadFailed: (data) => [`${data.code}: ${data.message}`],
  UnloadFailed: (data) => [`${data.code}: ${data.message}`],
  UnloadRequested: (data) => [data.cause === "request" ? null : `cause ${data.cause}`, data.force ? "forced" : null],
  ModelUnloaded: (data) => [`${bytes(data.freed_bytes)} freed`, data.aborted_requests ? `${count(data.aborted_requests, "request")} aborted` : null],
  WorkerExited: (data) => [data.signal ? `signal ${data.signal}` : data.exit_code == null ? null : `exit code ${data.exit_code}`, data.stderr?.at(-1)],
  AccessDenied: (data) => [data.action, data.count > 1 ? `${data.count} times` : null],
  ServerStarted: (data) => [data.unclean ? "after an end that was not orderly" : null],
};

export function summary(event) {
  try {
    return oneLine((SAYS[event.type]?.(event.data) ?? []).filter(Boolean).join(", "), 300);
  } catch {
    return ""; // an event of a later schema: its text is there to be read
  }
}
