// Requests to the server that this page came from, with the token in their header, and what it answers.

import { learnClock, plain } from "./format.js";

const LIMIT_MS = 10_000; // of what is answered at once

// The server answered, and not with what was asked for.
export class Refusal extends Error {
  constructor(status, problem, retryAfterS) {
    super(plain(problem.detail ?? problem.error ?? problem.title ?? `the server answered ${status}`));
    this.status = status;
    this.code = problem.code ?? "";
    this.title = plain(problem.title);
    this.retryAfterS = retryAfterS;
  }
}

// No answer came.
export class Unreachable extends Error {}

class Api {
  token = null; // of who is signed in

  // Sends a request; throws Refusal, Unreachable, or AbortError for the caller's own signal.
  async send(path, { method = "GET", body, headers = {}, signal, limitMs = LIMIT_MS } = {}) {
    const signals = [signal, limitMs ? AbortSignal.timeout(limitMs) : null].filter(Boolean);
    let response;
    try {
      response = await fetch(path, {
        method,
        body,
        headers: { ...(this.token ? { Authorization: `Bearer ${this.token}` } : {}), ...(body ? { "Content-Type": "application/json" } : {}), ...headers },
        signal: signals.length ? AbortSignal.any(signals) : undefined,
        cache: "no-store",
        credentials: "omit",
        redirect: "error",
      });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new Unreachable(error.name === "TimeoutError" ? `no answer within ${limitMs / 1000} s` : "no connection");
    }
    learnClock(response.headers.get("Date"));
    if (!response.ok) throw await refusal(response);
    return response;
  }

  // The text of an answer, whose connection may break on the way.
  async text(path, options) {
    const response = await this.send(path, options);
    try {
      return await response.text();
    } catch (error) {
      if (options?.signal?.aborted) throw error;
      throw new Unreachable("the connection broke");
    }
  }

  async get(path, options) {
    return JSON.parse(await this.text(path, options));
  }

  // Puts a file, and tells how much of it has been sent, which only this older interface does.
  async upload(path, file, { headers = {}, onProgress, signal }) {
    signal.throwIfAborted();
    const request = new XMLHttpRequest();
    return new Promise((resolve, reject) => {
      request.open("PUT", path);
      for (const [name, value] of Object.entries({ Authorization: `Bearer ${this.token}`, ...headers })) request.setRequestHeader(name, value);
      request.upload.addEventListener("progress", (event) => onProgress(event.loaded));
      request.addEventListener("load", () => resolve(new Response(request.responseText, { status: request.status })));
      request.addEventListener("error", () => reject(new Unreachable("the connection broke")));
      request.addEventListener("abort", () => reject(signal.reason));
      signal.addEventListener("abort", () => request.abort());
      request.send(file);
    }).then(async (response) => {
      if (!response.ok) throw await refusal(response);
      return response.json();
    });
  }

  // Posts, and returns the status with the answer: 200 and 202 say different things.
  async post(path, value, options) {
    const response = await this.send(path, { method: "POST", body: value === undefined ? undefined : JSON.stringify(value), ...options });
    return { status: response.status, answer: await response.json(), headers: response.headers };
  }
}

export const api = new Api();

// One request at a time, the latest: an earlier one is aborted, and its answer dropped.
export class Latest {
  #current = null;

  drop() {
    this.#current?.abort();
    this.#current = null;
  }

  // Passes the answer of `ask(signal)` to `use`, or what it fails with to `refuse`.
  async request(ask, use, refuse) {
    this.#current?.abort();
    const mine = (this.#current = new AbortController());
    try {
      const answer = await ask(mine.signal);
      if (mine === this.#current) use(answer);
    } catch (error) {
      if (mine === this.#current) refuse(error);
    } finally {
      if (mine === this.#current) this.#current = null;
    }
  }
}

async function refusal(response) {
  const after = Number(response.headers.get("Retry-After")) || null;
  try {
    return new Refusal(response.status, await response.json(), after);
  } catch {
    return new Refusal(response.status, {}, after);
  }
}

// What to say where something was asked for, and it is not known whether that arrived.
export function requestErrorText(error) {
  return error instanceof Unreachable ? `${errorText(error)} What you asked for may have arrived all the same: look at the jobs when it is back.` : errorText(error);
}

// What to say of an error, for people: what the server said, and what to do about it.
export function errorText(error) {
  if (error instanceof Unreachable) return `The server cannot be reached: ${error.message}.`;
  if (!(error instanceof Refusal)) return String(error.message ?? error);
  if (error.code === "forbidden") return `Not allowed: ${error.message}. Ask whoever gives out tokens for one with that role; the ledger counts this refusal.`;
  if (error.status === 429) return `${error.title}: ${error.message}`;
  return error.title && !error.message.startsWith(error.title) ? `${error.title}: ${error.message}` : error.message;
}
