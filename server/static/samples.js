// What the charts show: looks at the statistics and the memory, some seconds apart, and what lies between two.

export const EVERY_MS = 2000;
const MOST = 150; // five minutes

// Adds a look to `samples`, with rates since the one before.
export function sample(samples, resources, statistics, now = Date.now()) {
  const before = samples.at(-1);
  const counts = new Map(statistics.map((entry) => [`${entry.name}/${entry.version}`, countsOf(entry)]));
  const between = { requests: 0, failures: 0, ns: 0 };
  for (const [key, count] of counts) add(between, count, before?.counts.get(key), before !== undefined);
  const seconds = before ? (now - before.at) / 1000 : 0;
  const look = {
    at: now,
    counts,
    perSecond: seconds > 0 ? between.requests / seconds : null,
    failedPerSecond: seconds > 0 ? between.failures / seconds : null,
    latencyMs: between.requests > 0 ? between.ns / between.requests / 1e6 : null,
    usedBytes: resources.used_bytes,
    reservedBytes: resources.reserved_bytes,
    stuck: stuckOnes(before, resources, counts, now),
  };
  return [...samples, look].slice(-MOST);
}

function countsOf(entry) {
  const { success, fail } = entry.inference_stats;
  return { requests: success.count, failures: fail.count, ns: success.ns };
}

// A load begins to count at 0: less than before is another load.
function add(between, count, earlier, known) {
  if (!known) return;
  const base = earlier && earlier.requests <= count.requests && earlier.failures <= count.failures ? earlier : { requests: 0, failures: 0, ns: 0 };
  for (const name of Object.keys(between)) between[name] += count[name] - base[name];
}

// By load: since when it has had requests in flight, and answered none.
function stuckOnes(before, resources, counts, now) {
  const found = new Map();
  for (const use of resources.models) {
    const key = `${use.model_id}/${use.version}`;
    const count = counts.get(key), earlier = before?.counts.get(key);
    const answered = count && earlier ? count.requests + count.failures !== earlier.requests + earlier.failures : false;
    if (use.in_flight > 0 && use.phase === "serving" && !answered) found.set(use.job_id, before?.stuck.get(use.job_id) ?? now);
  }
  return found;
}
