// Models that do not answer: loads that have requests in flight, and have answered none since a look before.

export const EVERY_MS = 2000;

// A look: the counts of each load that serves, and since when those without an answer have been so, by job.
export function look(before, resources, statistics, now = Date.now()) {
  const counts = new Map(statistics.map((entry) => [`${entry.name}/${entry.version}`, countOf(entry)]));
  const since = new Map();
  for (const use of resources.models) {
    const key = `${use.model_id}/${use.version}`;
    const answered = counts.has(key) && before?.counts.has(key) && counts.get(key) !== before.counts.get(key);
    if (use.in_flight > 0 && use.phase === "serving" && !answered) since.set(use.job_id, before?.since.get(use.job_id) ?? now);
  }
  return { counts, since };
}

// Whether a look is worth its request for the statistics: without requests in flight, nothing can be stuck.
export const isWorthwhile = (resources) => resources.models.some((use) => use.in_flight > 0);

const countOf = ({ inference_stats: { success, fail } }) => success.count + fail.count;
