// Keeps the page current: follows the stream of events, or polls where the role or the server allows no stream, and
// reconnects for as long as the page is open.

import { Refusal, Unreachable, errorText } from "./api.js";
import { STATUS_EVERY_MS } from "./refresher.js";

const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 5000;
const LONGEST_ASKED_MS = 60_000; // what `Retry-After` may ask for: somebody looks at this page, and what is far too long would pass for none
const SILENCE_MS = 40_000; // the server says something every 15 s: who says nothing for so long is not there
const POLL_MS = 3000;
const WITHOUT_STREAM_MS = 30_000; // how long it does without, where too many streams are open
const MOST_MISSED = 2000; // events that are caught up with; after more, the ledger is looked at anew
const ANEW = ["archived", "beyond_head"]; // what was heard last is no place to go on from any more
const RELIST_EVERY = 15; // looks: new versions in the repository are no events

export class LiveUpdates {
  #attempt = new AbortController();
  #wake = () => {};
  #polls = 0;
  #endReason = null; // why the present attempt was ended from outside
  #lastPosition = null; // the last position of the stream

  constructor(api, store, refresher, { follows, onSignedOut }) {
    Object.assign(this, { api, store, refresher, follows, onSignedOut });
    this.end = new AbortController();
    addEventListener("online", () => this.retryNow());
    document.addEventListener("visibilitychange", () => document.hidden || this.retryNow());
  }

  // Waits no longer for the next attempt.
  retryNow() {
    this.#wake();
  }

  stop() {
    this.end.abort();
    this.#attempt.abort();
  }

  async run() {
    let pause = FIRST_PAUSE_MS;
    while (!this.end.signal.aborted) {
      const began = Date.now();
      this.#attempt = new AbortController();
      this.#endReason = null;
      try {
        await this.#connectOnce(this.#attempt.signal);
      } catch (error) {
        const why = this.#endReason ?? error;
        if (this.end.signal.aborted || this.#isSignedOut(why)) return;
        if (Date.now() - began > LONGEST_PAUSE_MS) pause = FIRST_PAUSE_MS; // it had worked meanwhile
        const wait = Math.max(pause, Math.min(LONGEST_ASKED_MS, (why.retryAfterS ?? 0) * 1000));
        this.store.connect("lost", errorText(why), Date.now() + wait);
        await this.#sleep(wait).catch(() => {});
        pause = Math.min(LONGEST_PAUSE_MS, pause * 1.7);
      }
    }
  }

  // Shows everything, then what changes, until something goes wrong.
  async #connectOnce(signal) {
    const position = await this.refresher.fetchAll(signal);
    const looking = this.#pollStatus(signal);
    try {
      await Promise.race([this.#followOrPoll(position, signal), looking]);
    } finally {
      this.#attempt.abort();
      await looking.catch(() => {});
    }
  }

  async #followOrPoll(position, signal) {
    if (this.follows) await this.#follow(this.#resumePosition(position), signal);
    await this.#poll(signal);
  }

  // Where the stream goes on: after what was heard last, unless that is too long ago, or of another ledger.
  #resumePosition(position) {
    const missed = position - (this.#lastPosition ?? -Infinity);
    if (missed >= 0 && missed <= MOST_MISSED) return this.#lastPosition;
    this.store.head = position;
    this.store.epoch += 1;
    return position;
  }

  async #follow(position, signal) {
    try {
      for await (const line of linesAfter(this.api, position, signal)) this.#onLine(line);
    } catch (error) {
      if (ANEW.includes(error.code)) this.#lastPosition = null;
      if (!(error instanceof Refusal) || !["forbidden", "too_many_streams"].includes(error.code)) throw error;
      if (error.code === "forbidden") this.follows = false; // the token said more than the server grants
      return this.store.connect("polled", errorText(error));
    }
    throw new Unreachable(this.farewell ?? "the server ended the stream");
  }

  #onLine(line) {
    const said = JSON.parse(line);
    if (said.position !== undefined) this.#lastPosition = said.position;
    if (said.stream === undefined) {
      this.store.onEvent(said);
      this.refresher.schedule(said.model_id);
    } else if (said.stream === "live") {
      this.farewell = null;
      this.store.advance(said.position);
      this.store.connect("live");
    } else if (said.stream === "stage") {
      this.store.stages.set(said.job_id, { stage: said.stage, waiting_for: said.waiting_for });
      this.refresher.schedule(null);
    } else if (said.stream === "end") {
      this.farewell = said.reason;
    }
  }

  async #poll(signal) {
    const until = this.follows ? Date.now() + WITHOUT_STREAM_MS : Infinity;
    while (Date.now() < until) {
      this.store.connect("polled", this.store.connection.mode === "polled" ? this.store.connection.why : "");
      await this.#sleep(POLL_MS, signal);
      await this.refresher.fetchModels(signal);
      await this.refresher.fetchJobs(signal);
    }
  }

  async #pollStatus(signal) {
    for (;;) {
      await this.#sleep(STATUS_EVERY_MS, signal);
      await this.refresher.fetchStatus(signal);
      if (++this.#polls % RELIST_EVERY === 0) await this.refresher.fetchModels(signal);
    }
  }

  // What a look in the background met counts as much as what the stream does.
  endAttempt(error) {
    if (!(error instanceof Unreachable) && error.status !== 401) return;
    this.#endReason ??= error;
    this.#attempt.abort();
  }

  #isSignedOut(error) {
    if (!(error instanceof Refusal) || error.status !== 401) return false;
    this.stop();
    this.onSignedOut(`The server no longer accepts this token: ${error.message}.`);
    return true;
  }

  #sleep(ms, signal) {
    return new Promise((resolve, reject) => {
      const over = (settle, value) => {
        clearTimeout(timer);
        signal?.removeEventListener("abort", aborted);
        settle(value);
      };
      const aborted = () => over(reject, signal.reason);
      const timer = setTimeout(() => over(resolve), ms);
      if (signal) signal.addEventListener("abort", aborted);
      else this.#wake = () => over(resolve); // nobody hurries what is going well
    });
  }
}

// Yields each line of the stream of events, from after a position on; ends when the server ends it. The stream is
// fetched, so that the token travels in a header.
// Throws Refusal or Unreachable.
async function* linesAfter(api, position, signal) {
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
