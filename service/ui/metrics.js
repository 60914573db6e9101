// Prometheus' text format -> numbers: sums and quantiles over what changed between two readings.

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { n: "\n", '"': '"', "\\": "\\" };

// [{ name, labels, value }], in the order of the text.
export function parse(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const found = line.startsWith("#") ? null : SAMPLE.exec(line);
    if (found)
      samples.push({
        name: found[1],
        labels: parseLabels(found[2] ?? ""),
        value: toNumber(found[3]),
      });
  }
  return samples;
}

// The sum of a metric's samples, of those that `where` holds for.
export function total(samples, name, where = () => true) {
  let sum = 0;
  for (const sample of samples)
    if (sample.name === name && where(sample.labels)) sum += sample.value;
  return sum;
}

// How much a counter grew; after a restart all that it has now.
export function growth(before, after, name, where) {
  const now = total(after, name, where);
  const then = total(before, name, where);
  return now >= then ? now - then : now;
}

// A histogram's buckets, [upper bound, how many at or below], by bound.
export function buckets(samples, name, where = () => true) {
  const counts = new Map();
  for (const { name: own, labels, value } of samples) {
    if (own !== `${name}_bucket` || !where(labels)) continue;
    const bound = toNumber(labels.le);
    counts.set(bound, (counts.get(bound) ?? 0) + value);
  }
  return [...counts].sort(([a], [b]) => a - b);
}

export function bucketGrowth(before, after, name, where) {
  const then = new Map(buckets(before, name, where));
  const now = buckets(after, name, where);
  const restarted = now.some(([bound, count]) => count < (then.get(bound) ?? 0));
  return restarted ? now : now.map(([bound, count]) => [bound, count - (then.get(bound) ?? 0)]);
}

// As Prometheus' histogram_quantile: evenly spread within a bucket; null of no observations.
export function quantile(q, counts) {
  const all = counts.at(-1)?.[1] ?? 0;
  if (!all) return null;
  const rank = q * all;
  const at = counts.findIndex(([, count]) => count >= rank);
  const [bound, count] = counts[at];
  const [below, countBelow] = at ? counts[at - 1] : [0, 0];
  if (!Number.isFinite(bound)) return below;
  return below + ((bound - below) * (rank - countBelow)) / (count - countBelow);
}

export function labelValues(samples, name, label) {
  return [...new Set(samples.filter((s) => s.name === name).map((s) => s.labels[label]))].sort();
}

function parseLabels(text) {
  const labels = {};
  for (const [, name, value] of text.matchAll(LABEL)) {
    labels[name] = value.replace(/\\(.)/g, (whole, letter) => ESCAPES[letter] ?? whole);
  }
  return labels;
}

function toNumber(text) {
  if (text === "+Inf") return Infinity;
  return text === "-Inf" ? -Infinity : Number(text);
}
