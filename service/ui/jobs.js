// The jobs' view: how far each is, asked for again and again while the view is seen.

import { ask, isAbort, Latest } from "./api.js";
import { button, byId, element, notice, refusal } from "./dom.js";
import { duration, plural, rate, whole } from "./format.js";
import { listenForSending } from "./sending.js";
import { refresh } from "./service.js";

const BUSY_MS = 1000;
const IDLE_MS = 5000; // another client may start one
const MOST_FAILED = 1000; // that the service names
const STATES = {
  open: "Being sent",
  queued: "Waiting",
  running: "Running",
  done: "Done",
  failed: "Failed",
  cancelled: "Cancelled",
};
const ENDED = ["done", "failed", "cancelled"];
const WAITING = "Reading the jobs ...";

const reading = new Latest();
let isOpen = false;
let timer = 0;
let cards = new Map(); // job's id -> { root, update(job), state }

export function listenForJobs(goTo) {
  listenForSending(goTo, (job) => {
    const card = makeCard(job);
    card.update(job);
    cards.set(job.id, card);
    say(told(job));
    poll();
  });
  say(WAITING);
  document.addEventListener("visibilitychange", () => poll());
}

export function openJobs(open) {
  if (isOpen === open) return;
  isOpen = open;
  poll();
}

// Reads, and reads again in a while; not while nobody looks.
async function poll() {
  clearTimeout(timer);
  if (!isOpen || document.hidden) return reading.stop();
  const signal = reading.begin();
  let isBusy = false;
  try {
    const { data } = await ask("v1/jobs", { signal });
    show(data.reverse());
    isBusy = data.some((job) => !ENDED.includes(job.state));
  } catch (error) {
    if (isAbort(error)) return undefined;
    showProblem(error.message);
  }
  if (!signal.aborted) timer = setTimeout(poll, isBusy ? BUSY_MS : IDLE_MS);
  return undefined;
}

// Once, and not at every reading, for it is read out.
function showProblem(text) {
  if (byId("jobs-notice").textContent.includes(text)) return;
  if (byId("jobs-status").textContent === WAITING) say("");
  const action = { name: "Try again", run: poll };
  byId("jobs-notice").replaceChildren(
    notice({ kind: "error", title: "The jobs cannot be read.", text, action }),
  );
}

const say = (text) => {
  byId("jobs-status").textContent = text;
};

// Cards stay the same elements, so that the focus stays where it is.
function show(jobs) {
  const before = cards;
  cards = new Map(jobs.map((job) => [job.id, before.get(job.id) ?? makeCard(job)]));
  for (const [id, card] of before) if (!cards.has(id)) card.root.remove();
  const list = byId("job-list");
  const ended = jobs.filter((job) => hasEnded(cards.get(job.id), job));
  jobs.forEach((job, i) => {
    const { root, update } = cards.get(job.id);
    if (list.children[i] !== root) list.insertBefore(root, list.children[i] ?? null);
    update(job);
  });
  byId("jobs-notice").replaceChildren(...(jobs.length ? [] : [none()]));
  if (ended.length || byId("jobs-status").textContent === WAITING) say(ended.map(told).join(" "));
  if (ended.length) refresh().catch(() => {}); // the counts of the collections
}

const hasEnded = (card, job) =>
  card.state && !ENDED.includes(card.state) && ENDED.includes(job.state);

const told = (job) => `The job into ${job.collection}: ${STATES[job.state]}, ${counts(job)}.`;

const none = () =>
  notice({
    title: "No jobs yet.",
    text: "A job stores any number of items while nobody waits, and goes on after a restart.",
  });

function makeCard(job) {
  const title = element("h2", {}, job.collection);
  const state = element("span", { class: "state" });
  const name = `Progress of the job into ${job.collection}`;
  const bar = element("progress", { "aria-label": name, max: 1, value: 0 });
  const text = element("p", { class: "note" });
  const problem = element("p", { class: "bad" });
  const failed = makeFailed(job.id);
  const row = element("div", { class: "row" });
  const notes = element("div", { class: "card-notice" });
  const head = element("div", { class: "job-head" }, title, state);
  const root = element(
    "li",
    { class: "panel job" },
    ...[head, bar, text, problem, failed.root, row, notes],
  );
  const card = { root, update, state: null };

  function update(now) {
    state.textContent = STATES[now.state];
    state.className = `state ${now.state}`;
    bar.value = now.total ? now.done / now.total : 0;
    text.textContent = `${counts(now)}${speed(now)}. Made ${when(now.created)}.`;
    problem.textContent = now.error ?? "";
    problem.hidden = !now.error;
    failed.update(now);
    if (!card.state || ENDED.includes(card.state) !== ENDED.includes(now.state)) {
      row.replaceChildren(...buttons(now, row, notes));
    }
    card.state = now.state;
  }

  return card;
}

function counts(job) {
  const failed = job.num_failed ? `, ${whole(job.num_failed)} failed` : "";
  return `${whole(job.done)} of ${plural(job.total, "item")}${failed}`;
}

function speed(job) {
  if (job.state !== "running" || !job.items_per_second) return "";
  const left = job.eta_s === null ? "" : `, ${duration(job.eta_s)} left`;
  return `, ${rate(job.items_per_second)} a second${left}`;
}

const when = (created) =>
  new Date(1000 * created).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });

// Which items failed and why; read when it is opened.
function makeFailed(id) {
  const list = element("ul", {});
  const summary = element("summary", {});
  const root = element("details", { class: "failed" }, summary, list);
  root.addEventListener("toggle", async () => {
    if (!root.open) return;
    try {
      const { failed } = await ask(`v1/jobs/${id}?failed=20`);
      list.replaceChildren(
        ...failed.map((one) =>
          element("li", {}, element("b", {}, `Item ${one.index}`), ` ${one.error.message}`),
        ),
      );
    } catch (error) {
      list.replaceChildren(element("li", { class: "bad" }, error.message));
    }
  });
  const update = (job) => {
    root.hidden = !job.num_failed;
    summary.textContent = `What failed${job.num_failed > 20 ? ", the first 20" : ""}`;
  };
  return { root, update };
}

function buttons(job, row, notes) {
  const end = (title) => async () => {
    try {
      await ask(`v1/jobs/${job.id}`, { method: "DELETE" });
      notes.replaceChildren();
      await poll(); // which takes the button away
      const near = row.isConnected ? row : byId("job-list");
      (near.querySelector("button") ?? byId("job-file")).focus();
    } catch (error) {
      const told = { kind: "error", title: refusal(error, title), text: error.message };
      notes.replaceChildren(notice(told));
    }
  };
  const into = `the job into ${job.collection}`;
  if (!ENDED.includes(job.state)) return [cancelButton(into, end("It goes on."))];
  return [
    button(`Download the report of ${into}`, () => download(job.id, notes), {}, "Download report"),
    button(`Forget ${into}`, end("It is kept."), {}, "Forget"),
  ];
}

// The first press asks, the second cancels.
function cancelButton(into, cancel) {
  const made = button(
    `Cancel ${into}`,
    () => {
      if (made.classList.contains("danger")) return cancel();
      made.classList.add("danger");
      made.textContent = "Cancel? What is stored stays";
      made.setAttribute("aria-label", `Cancel ${into}? What is stored stays`);
      return undefined;
    },
    {},
    "Cancel",
  );
  return made;
}

async function download(id, notes) {
  try {
    const report = await ask(`v1/jobs/${id}?failed=${MOST_FAILED}`);
    const blob = new Blob([JSON.stringify(report, null, 2)], { type: "application/json" });
    const url = URL.createObjectURL(blob);
    element("a", { href: url, download: `${id}.json` }).click();
    setTimeout(() => URL.revokeObjectURL(url)); // the download has begun by then
    notes.replaceChildren();
  } catch (error) {
    notes.replaceChildren(
      notice({ kind: "error", title: "The report cannot be read.", text: error.message }),
    );
  }
}
