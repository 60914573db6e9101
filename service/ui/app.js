// The page: words or a picture -> pictures, a picture and labels -> bars. No framework, no build.
// Everything that came from outside is written with textContent, never as HTML.
"use strict";

const HITS = 24;
const BARS = 10;

const byId = (id) => document.getElementById(id);
let picture = null; // the chosen File or Blob
const running = new Map(); // status line -> AbortController of the request on its way

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Ask the service; an error's message is what the API says.
async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The service cannot be reached.");
  }
  const body = await response.json().catch((error) => {
    if (error.name === "AbortError") throw error;
    return null;
  });
  if (response.ok && body) return body;
  throw new Error(body?.error?.message ?? `The service answered with status ${response.status}.`);
}

// Run one request at a time for each status line: a new one takes the place of the one before.
async function run(status, doing, work) {
  running.get(status)?.abort();
  const own = new AbortController();
  running.set(status, own);
  showError("");
  byId(status).textContent = doing;
  document.body.classList.toggle("busy", running.has("status"));
  try {
    await work(own.signal);
  } catch (error) {
    if (error.name === "AbortError") return;
    byId(status).textContent = "";
    showError(error.message);
  } finally {
    if (running.get(status) === own) running.delete(status);
    document.body.classList.toggle("busy", running.has("status"));
  }
}

function showError(message) {
  byId("alert").textContent = message;
  byId("alert").hidden = !message;
}

function searchWords(query) {
  const body = { text: query, k: HITS, collection: byId("collection").value || undefined };
  return run("status", "Searching ...", async (signal) => {
    const started = performance.now();
    const answer = await ask("v1/search", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
    const cut = answer.query.truncated ? " The query was too long and was cut." : "";
    showHits(answer.hits, `for \u201c${query}\u201d`, started, cut);
  });
}

function searchPicture() {
  if (!picture) return askForPicture();
  const form = new FormData();
  form.append("file", picture, "picture");
  form.append("k", String(HITS));
  if (byId("collection").value) form.append("collection", byId("collection").value);
  return run("status", "Searching ...", async (signal) => {
    const started = performance.now();
    const answer = await ask("v1/search", { method: "POST", body: form, signal });
    showHits(answer.hits, "like the chosen one", started, "");
  });
}

function classify() {
  const labels = byId("labels").value.split(",").map((label) => label.trim()).filter(Boolean);
  if (!picture) return askForPicture();
  if (!labels.length) {
    showError("Type at least one label; separate several by commas.");
    byId("labels").focus();
    return undefined;
  }
  const form = new FormData();
  form.append("files", picture, "picture");
  form.append("labels", labels.join(","));
  form.append("templates", "photo");
  form.append("top_k", String(BARS));
  return run("answer", "Classifying ...", async (signal) => {
    const answer = await ask("v1/classify", { method: "POST", body: form, signal });
    const found = answer.results[0].predictions;
    showBars(found);
    byId("answer").textContent = `Most likely: ${found[0].label}, ${percent(found[0].probability)}.`;
  });
}

function askForPicture() {
  showError("Choose a picture first.");
  byId("file").focus();
}

function showHits(hits, what, started, remark) {
  const seconds = ((performance.now() - started) / 1000).toFixed(2);
  const count = hits.length === 1 ? "1 picture" : `${hits.length} pictures`;
  byId("status").textContent = hits.length
    ? `${count} ${what}, in ${seconds} s.${remark}`
    : "The collection is empty.";
  byId("results").replaceChildren(...hits.map(makeHit));
}

function makeHit(hit) {
  const name = hit.caption || hit.id;
  const button = element("button", "hit");
  button.type = "button";
  button.title = name;
  const frame = element("span", "frame");
  const image = element("img");
  image.alt = "";
  image.loading = "lazy";
  image.addEventListener("error", () => {
    frame.textContent = "no picture";
    button.disabled = true;
  });
  image.src = hit.image_url;
  frame.append(image);
  const text = element("span", "text");
  text.append(element("span", "caption", name));
  if (hit.score !== undefined) text.append(element("span", "score", hit.score.toFixed(3)));
  button.append(frame, text);
  const score = hit.score === undefined ? "" : `, score ${hit.score.toFixed(3)}`;
  button.setAttribute("aria-label", `${name}${score}. Find similar pictures.`);
  button.addEventListener("click", () => searchLike(hit));
  const item = element("li");
  item.append(button);
  return item;
}

async function searchLike(hit) {
  const response = await fetch(hit.image_url).catch(() => null);
  if (!response?.ok) return showError("The picture of this item cannot be loaded.");
  choose(await response.blob());
  window.scrollTo({ top: 0 });
  return searchPicture();
}

function showBars(predictions) {
  byId("bars").replaceChildren(
    ...predictions.map(({ label, probability }) => {
      const item = element("li");
      const fill = element("span", "fill");
      fill.style.width = `${100 * probability}%`;
      fill.setAttribute("aria-hidden", "true");
      item.append(fill, element("span", "name", label), element("span", "value", percent(probability)));
      return item;
    }),
  );
  byId("bars").hidden = false;
}

function percent(probability) {
  return `${(100 * probability).toFixed(1)} %`;
}

function choose(blob) {
  picture = blob;
  URL.revokeObjectURL(byId("preview").src);
  byId("preview").src = URL.createObjectURL(blob);
  byId("preview").hidden = false;
  byId("drop-text").hidden = true;
  byId("drop").classList.add("filled");
  byId("bars").hidden = true;
  showError("");
}

async function describeService() {
  const [models, collections] = await Promise.all([ask("v1/models"), ask("v1/collections")]);
  const about = byId("about");
  for (const model of models.data) {
    const line = element("div", "", `${model.id} `);
    line.append(element("code", "", model.fingerprint.slice(0, 12)));
    about.append(line);
  }
  const found = collections.data;
  const select = byId("collection");
  select.replaceChildren(
    ...found.map((one) => {
      const count = one.count.toLocaleString();
      const option = element("option", "", `${one.name} (${count})`);
      option.value = one.name;
      return option;
    }),
  );
  byId("collection-choice").hidden = found.length < 2;
  byId("search-note").textContent = describe(found);
  for (const control of ["query", "similar"]) byId(control).disabled = !found.length;
  byId("search-form").querySelector("button").disabled = !found.length;
  if (found.length) await showSome(found[0]);
}

// Something to look at, and to start from.
async function showSome(collection) {
  const path = `v1/collections/${encodeURIComponent(collection.name)}/items?limit=${HITS}`;
  const page = await ask(path);
  if (running.has("status") || byId("results").children.length) return; // the first search was quicker
  byId("status").textContent = page.data.length
    ? "From the collection; choose a picture to find similar ones."
    : "The collection is empty.";
  byId("results").replaceChildren(...page.data.map(makeHit));
}

function describe(collections) {
  if (!collections.length) return "No collection is served, so there is nothing to search in.";
  if (collections.length > 1) return "";
  return `${collections[0].count.toLocaleString()} pictures in ${collections[0].name}.`;
}

function listen() {
  byId("search-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const query = byId("query").value.trim();
    if (query) searchWords(query);
  });
  byId("classify-form").addEventListener("submit", (event) => {
    event.preventDefault();
    classify();
  });
  byId("similar").addEventListener("click", searchPicture);
  byId("file").addEventListener("change", () => {
    const file = byId("file").files[0];
    if (file) choose(file);
  });
  byId("preview").addEventListener("error", () => {
    byId("preview").hidden = true; // a format the browser does not show; the service may read it
    byId("drop-text").hidden = false;
    byId("drop").classList.remove("filled");
  });
  const inside = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!inside(event)) return;
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dragging");
  });
  document.addEventListener("drop", (event) => {
    document.body.classList.remove("dragging");
    if (!inside(event)) return;
    event.preventDefault();
    const file = event.dataTransfer.files[0];
    if (file) choose(file);
  });
  document.addEventListener("paste", (event) => {
    const file = event.clipboardData?.files[0];
    if (file) choose(file);
  });
}

listen();
describeService().catch((error) => showError(error.message));
