// The page: one view at a time, named in the address; start here, and follow the view's name.

import { ApiError, hasKey, isUnauthorised, useKey } from "./api.js";
import { listenForClassify } from "./classify.js";
import { listenForCollections, openCollections, turnItems } from "./collections.js";
import { byId, closeable, notice } from "./dom.js";
import { listenForItemDialog } from "./hits.js";
import { listenForJobs, openJobs } from "./jobs.js";
import { listenForKeys } from "./keyboard.js";
import { listenForPictures } from "./pictures.js";
import { listenForSearch, turn } from "./search.js";
import { onService, refresh, service } from "./service.js";
import { listenForStatus, openStatus } from "./status.js";

const VIEWS = ["search", "classify", "collections", "jobs", "status"];
const RETRY_MS = 3000; // while models load

let view = null;

function viewOfAddress() {
  const named = location.hash.slice(1);
  return VIEWS.includes(named) ? named : VIEWS[0];
}

function show() {
  const before = view;
  view = viewOfAddress();
  for (const name of VIEWS) byId(`view-${name}`).hidden = name !== view;
  for (const link of byId("views").children) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${view[0].toUpperCase()}${view.slice(1)} \u00b7 clipserve`;
  openStatus(view === "status");
  openJobs(view === "jobs");
  if (view === "collections" && before !== view) openCollections();
}

function goTo(name) {
  if (viewOfAddress() !== name) location.hash = name;
  show(); // now, and not when the browser tells of the new address
}

function focusSearch() {
  goTo("search");
  byId("query").focus();
  byId("query").select();
}

async function load() {
  const banner = byId("banner");
  try {
    await refresh();
    banner.hidden = true;
  } catch (error) {
    banner.replaceChildren(problem(error));
    banner.hidden = false;
  }
}

function problem(error) {
  if (isUnauthorised(error)) {
    const title = hasKey() ? "This API key is not known here." : "This service needs an API key.";
    return notice({ kind: "problem", title, action: { name: "Enter a key", run: askForKey } });
  }
  if (error instanceof ApiError && error.status === 503) setTimeout(load, RETRY_MS);
  const title =
    error.status === 503 ? "The service is not ready yet." : "The service cannot be used.";
  return notice({
    kind: "problem",
    title,
    text: error.message,
    action: { name: "Try again", run: load },
  });
}

function askForKey() {
  byId("key").value = "";
  byId("key-dialog").showModal();
}

function listenForKey() {
  const dialog = closeable(byId("key-dialog"));
  byId("key-button").addEventListener("click", askForKey);
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!byId("key").value.trim()) return;
    useKey(byId("key").value);
    byId("key").value = "";
    dialog.close();
    showKey();
    load();
  });
  byId("forget-key").addEventListener("click", () => {
    useKey("");
    location.reload(); // so that nothing it showed stays
  });
  showKey();
}

function showKey() {
  byId("key-button").classList.toggle("on", hasKey());
  byId("key-button").setAttribute("aria-label", hasKey() ? "API key: in use" : "API key");
}

function showAbout() {
  byId("about").textContent = service.models
    .map((one) => `${one.id} ${one.fingerprint.slice(0, 12)}`)
    .join(", ");
}

onService(showAbout);
listenForSearch(goTo);
listenForClassify();
listenForCollections();
listenForJobs(goTo);
listenForStatus();
listenForItemDialog();
listenForKey();
listenForPictures(() => view);
listenForKeys({
  show: (number) => goTo(VIEWS[number]),
  focusSearch,
  turn: (step) => {
    if (view === "search") turn(step);
    if (view === "collections") turnItems(step);
  },
});
window.addEventListener("hashchange", show);
show();
load();
