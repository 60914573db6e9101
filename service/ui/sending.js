// A file into a new job: sent part by part, started when all of it is on the service's disk.

import { ask, isAbort, Latest } from "./api.js";
import { byId, notice, option, refill, refusal } from "./dom.js";
import { bytes, whole } from "./format.js";
import { onChosen, onPictures } from "./pictures.js";
import { FileProblem, parts } from "./records.js";
import { onService, service } from "./service.js";

const NONE = "Make a collection first, for the items to go into.";

const sending = new Latest();
let goTo = () => {};
let file = null;
let isSending = false;

// show(view); `onStarted(job)` is told of every job that was started.
export function listenForSending(show, onStarted) {
  goTo = show;
  onChosen(byId("job-file"), choose);
  onPictures("jobs", choose);
  byId("job-form").addEventListener("submit", (event) => {
    event.preventDefault();
    start(onStarted);
  });
  byId("job-stop").addEventListener("click", () => sending.stop());
  onService(showService);
}

// The collection that the next job goes into.
export function fill(collection) {
  goTo("jobs");
  byId("job-collection").value = collection;
  byId("job-file").focus();
}

function choose([chosen]) {
  if (isSending) return;
  file = chosen;
  byId("job-file-name").textContent = `${file.name}, ${bytes(file.size)}`;
  byId("job-notice").replaceChildren();
}

function showService() {
  refill(
    "job-collection",
    service.collections.map((one) => option(one.name, `${one.name} (${whole(one.count)})`)),
  );
  showSending(isSending);
}

async function start(onStarted) {
  if (!file) return showProblem("Choose a file first.", "", "job-file");
  const signal = sending.begin();
  byId("job-notice").replaceChildren();
  showSending(true);
  try {
    onStarted(await send(byId("job-collection").value, signal));
    file = null;
    byId("job-file-name").textContent = "";
  } catch (error) {
    showFailure(error);
  } finally {
    showSending(false);
  }
  return undefined;
}

async function send(collection, signal) {
  const json = { collection, start: false };
  const { id } = await ask("v1/jobs", { method: "POST", json });
  try {
    signal.throwIfAborted();
    showProgress(0);
    for await (const part of parts(file)) {
      await append(id, part.text, signal);
      showProgress(part.bytes);
    }
    return await ask(`v1/jobs/${id}:start`, { method: "POST", signal });
  } catch (error) {
    await withdraw(id).catch(() => {}); // why it failed is what is told
    throw error;
  }
}

async function withdraw(id) {
  await ask(`v1/jobs/${id}`, { method: "DELETE" });
  await ask(`v1/jobs/${id}`, { method: "DELETE" }); // and forgotten
}

// A refusal for want of room did nothing, so the part is sent again.
async function append(id, lines, signal) {
  for (;;) {
    try {
      return await ask(`v1/jobs/${id}:append`, { method: "POST", lines, signal });
    } catch (error) {
      if (error.status !== 429) throw error;
      byId("job-progress-text").textContent = "The service is busy; going on in a moment.";
      await pause(error.retryAfterS, signal);
    }
  }
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

function showProgress(sent) {
  byId("job-progress").value = file.size ? sent / file.size : 1;
  byId("job-progress-text").textContent = `Sent ${bytes(sent)} of ${bytes(file.size)}.`;
}

function showSending(on) {
  isSending = on;
  const isNone = !service.collections.length;
  byId("job-sending").hidden = !on;
  byId("job-stop").hidden = !on;
  for (const id of ["job-file", "job-collection", "job-start"]) byId(id).disabled = on || isNone;
  byId("job-none").textContent = isNone ? NONE : "";
}

function showFailure(error) {
  if (isAbort(error)) return showProblem("It was not sent.", "Nothing of it is stored.");
  if (error instanceof FileProblem)
    return showProblem("This file is no list of items.", error.message, "job-file");
  return showProblem(refusal(error, "No job was started."), error.message);
}

function showProblem(title, text, focus) {
  byId("job-notice").replaceChildren(notice({ kind: "error", title, text }));
  if (focus) byId(focus).focus();
}
