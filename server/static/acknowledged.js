// What somebody has acknowledged in this browser: each problem by its occurrence, so that a new one is shown again.

const KEPT = "loadledger.acknowledged";
const MOST = 1000; // the oldest are forgotten

export class Acknowledged {
  #known = new Map(read());

  // A problem without an occurrence cannot be acknowledged: it goes by itself.
  has(problem) {
    return problem.occurrence !== null && this.#known.get(problem.key) === problem.occurrence;
  }

  add(problem) {
    for (const each of [problem, ...problem.members]) {
      this.#known.delete(each.key);
      this.#known.set(each.key, each.occurrence);
    }
    this.#keep();
  }

  clear(problems) {
    for (const problem of problems) for (const each of [problem, ...problem.members]) this.#known.delete(each.key);
    this.#keep();
  }

  #keep() {
    const kept = [...this.#known].slice(-MOST);
    try {
      if (kept.length) localStorage.setItem(KEPT, JSON.stringify(kept));
      else localStorage.removeItem(KEPT);
    } catch {
      // storage is forbidden here: then it holds until the page is left
    }
  }
}

function read() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEPT) ?? "[]");
    return Array.isArray(kept) ? kept.filter((pair) => Array.isArray(pair) && pair.length === 2) : [];
  } catch {
    return [];
  }
}
