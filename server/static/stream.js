// The stream of events, as JSON lines: fetched, so that the token travels in a header.

import { Unreachable } from "./api.js";

const SILENCE_MS = 40_000; // the server says something every 15 s: who says nothing for so long is not there

// Yields each line of the stream as text, from after a position on; ends when the server ends it.
// Throws Refusal or Unreachable.
export async function* linesAfter(api, position, signal) {
  const quiet = new AbortController();
  const both = AbortSignal.any([signal, quiet.signal]);
  let timer = setTimeout(() => quiet.abort(), SILENCE_MS);
  try {
    const headers = { Accept: "application/x-ndjson" };
    const response = await api.send(`/api/v1/events/stream?after=${position}`, { headers, signal: both, limitMs: null });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return; // an unfinished line says nothing
      clearTimeout(timer);
      timer = setTimeout(() => quiet.abort(), SILENCE_MS);
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      yield* lines.filter((line) => line !== "");
    }
  } catch (error) {
    if (signal.aborted) throw error;
    if (quiet.signal.aborted) throw new Unreachable(`nothing was heard for ${SILENCE_MS / 1000} s`);
    throw error.status || error instanceof Unreachable ? error : new Unreachable("the connection broke");
  } finally {
    clearTimeout(timer);
    quiet.abort(); // whoever stops listening hangs up
  }
}
