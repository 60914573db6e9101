// The status view: health, models, and live charts from /metrics, read while the view is seen.

import { ask, askText, isAbort, Latest } from "./api.js";
import { makeChart } from "./charts.js";
import { byId, element, notice } from "./dom.js";
import { rate, seconds, whole } from "./format.js";
import * as metrics from "./metrics.js";
import { onService, service } from "./service.js";

const EVERY_S = 2;
const POINTS = 151; // five minutes
const HEALTH_EVERY = 5; // readings: each sends a text through the model, which the charts then show
const MODEL_COLUMNS = [
  "Model",
  "Fingerprint",
  "Objective",
  "Vector",
  "Picture",
  "Tokens",
  "Computes in",
  "Also",
  "Made",
];
const ANSWERS = ({ route }) => route.startsWith("/v1/");

const reading = new Latest();
const KEYS = ["images", "texts", "requests", "errors", "p50", "p95", "p99", "queue", "wait"];
const series = Object.fromEntries(KEYS.map((key) => [key, []]));
let charts = [];
let timer = 0;
let before = null; // the last reading: { at, samples }
let isOpen = false;
let readings = 0;

export function listenForStatus() {
  charts = [
    chart("Throughput, items per second", ["pictures", "texts"], ["images", "texts"], rate),
    chart("Latency of answers", ["p50", "p95", "p99"], ["p50", "p95", "p99"], seconds),
    chart("Requests per second", ["answered", "errors"], ["requests", "errors"], rate),
    chart("Waiting for the model", ["items in the queue"], ["queue"], rate),
  ];
  byId("charts").replaceChildren(...charts.map((one) => one.root));
  document.addEventListener("visibilitychange", () => poll());
  onService(showModels);
}

export function openStatus(open) {
  isOpen = open;
  poll();
}

function chart(title, names, keys, format) {
  const made = makeChart({ title, names, format, points: POINTS, everyS: EVERY_S });
  return { root: made.root, update: () => made.update(keys.map((key) => series[key])) };
}

// Reads, and reads again in a while; not while nobody looks.
async function poll() {
  clearTimeout(timer);
  if (!isOpen || document.hidden) {
    reading.stop();
    readings = 0;
    before = null; // a rate over a time not looked at would say little
    return;
  }
  const signal = reading.begin();
  const isHealthy = readings++ % HEALTH_EVERY ? null : showHealth(signal);
  try {
    take(metrics.parse(await askText("metrics", signal)));
    byId("status-notice").replaceChildren();
  } catch (error) {
    if (isAbort(error)) return;
    before = null;
    const title = "The metrics cannot be read.";
    byId("status-notice").replaceChildren(notice({ kind: "error", title, text: error.message }));
  }
  await isHealthy;
  if (!signal.aborted) timer = setTimeout(poll, 1000 * EVERY_S);
}

async function showHealth(signal) {
  let state = ["Ready", "good"];
  try {
    await ask("health/ready", { signal });
  } catch (error) {
    if (isAbort(error)) return;
    state = [error.status ? `Not ready: ${error.message}` : "Not reachable", "bad"];
  }
  const health = byId("health");
  if (health.textContent !== state[0]) health.textContent = state[0]; // else it is read out again
  health.className = `health ${state[1]}`;
}

function take(samples) {
  const at = performance.now() / 1000;
  if (before) {
    const now = measure(before.samples, samples, at - before.at);
    for (const [key, value] of Object.entries(now)) {
      series[key].push(value);
      if (series[key].length > POINTS) series[key].shift();
    }
    for (const one of charts) one.update();
  }
  before = { at, samples };
  showTiles(samples);
  showRoutes(samples);
}

function measure(then, now, took) {
  const perSecond = (name, where) => metrics.growth(then, now, name, where) / took;
  const ofKind = (kind) => (labels) => labels.kind === kind;
  const items = (kind) =>
    perSecond("clipserve_batch_size_sum", ofKind(kind)) +
    perSecond("clipserve_cache_hits_total", ofKind(kind));
  const isError = (labels) => ANSWERS(labels) && labels.status >= "400";
  const latency = metrics.bucketGrowth(then, now, "clipserve_request_seconds", ANSWERS);
  const wait = metrics.bucketGrowth(then, now, "clipserve_queue_seconds");
  return {
    images: items("image"),
    texts: items("text"),
    requests: perSecond(
      "clipserve_requests_total",
      (labels) => ANSWERS(labels) && !isError(labels),
    ),
    errors: perSecond("clipserve_requests_total", isError),
    p50: metrics.quantile(0.5, latency),
    p95: metrics.quantile(0.95, latency),
    p99: metrics.quantile(0.99, latency),
    queue: metrics.total(now, "clipserve_queue_items"),
    wait: metrics.quantile(0.95, wait),
  };
}

function showTiles(samples) {
  const last = (key) => series[key].at(-1) ?? null;
  const hits = metrics.total(samples, "clipserve_cache_hits_total");
  const asked = hits + metrics.total(samples, "clipserve_cache_misses_total");
  const batches = metrics.total(samples, "clipserve_batch_size_count");
  const restarts = metrics.total(samples, "clipserve_model_restarts_total");
  const tiles = [
    ["Pictures per second", rate(last("images"))],
    ["Texts per second", rate(last("texts"))],
    ["Latency, p95", seconds(last("p95"))],
    ["Wait for the model, p95", seconds(last("wait"))],
    ["Requests being served", whole(metrics.total(samples, "clipserve_inflight_requests"))],
    [
      "Items a batch",
      batches ? rate(metrics.total(samples, "clipserve_batch_size_sum") / batches) : "\u2013",
    ],
    ["From the caches", asked ? `${Math.round((100 * hits) / asked)} %` : "\u2013"],
    ["Model restarts", whole(restarts)],
  ];
  byId("tiles").replaceChildren(
    ...tiles.map(([name, value]) =>
      element("div", { class: "tile" }, element("dt", {}, name), element("dd", {}, value)),
    ),
  );
}

function showModels() {
  const rows = service.models.map((one) => [
    one.id,
    element("code", { title: one.fingerprint }, one.fingerprint.slice(0, 12)),
    (one.objective ?? []).join(", "),
    `${one.embed_dim}`,
    (one.image_size ?? []).join(" x "),
    `${one.context_length}`,
    one.precision,
    [one.can_match && "matching", one.multi_label && "several labels"].filter(Boolean).join(", ") ||
      "\u2013",
    new Date(1000 * one.created).toISOString().slice(0, 10),
  ]);
  fill("models-table", MODEL_COLUMNS, rows);
}

function showRoutes(samples) {
  const rows = metrics.labelValues(samples, "clipserve_requests_total", "route").map((route) => {
    const own = (labels) => labels.route === route;
    const ownError = (labels) => own(labels) && labels.status >= "400";
    const count = metrics.total(samples, "clipserve_requests_total", own);
    const failed = metrics.total(samples, "clipserve_requests_total", ownError);
    const latency = metrics.buckets(samples, "clipserve_request_seconds", own);
    const times = [0.5, 0.95].map((q) => seconds(metrics.quantile(q, latency)));
    return { count, cells: [route, whole(count), whole(failed), ...times] };
  });
  rows.sort((a, b) => b.count - a.count);
  const cells = rows.map((row) => row.cells);
  fill("routes-table", ["Route", "Requests", "Errors", "p50", "p95"], cells);
}

function fill(id, names, rows) {
  const head = element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name)));
  const lines = rows.map(([first, ...others]) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, first),
      ...others.map((cell) => element("td", {}, cell)),
    ),
  );
  byId(id).replaceChildren(element("thead", {}, head), element("tbody", {}, ...lines));
}
