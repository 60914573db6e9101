// The collections' view: what each is, and its items, page by page.

import { ask, collectionPath, isAbort, Latest } from "./api.js";
import { button, byId, element, notice, renew } from "./dom.js";
import { bytes, percent, plural, whole } from "./format.js";
import { showHits, showWaiting } from "./hits.js";
import { listenForManaging, openDrop, openMake } from "./manage.js";
import { actions, searchIn } from "./search.js";
import { fill } from "./sending.js";
import { collectionNamed, onService, refresh, service } from "./service.js";

const PAGE = 24;
const STALE = "Its model was replaced by another checkpoint; it is searched with the old one.";

const browsing = new Latest();
let name = null; // of the collection that is browsed
let starts = [""]; // of the pages so far: the id that each comes after
let next = null; // of the page after this one

export function listenForCollections() {
  byId("browser-previous").addEventListener("click", () => turnItems(-1));
  byId("browser-next").addEventListener("click", () => turnItems(1));
  listenForManaging(browse);
  onService(showService);
}

// The view came to the front: counts and items may have changed.
export async function openCollections() {
  try {
    await refresh();
    if (name) showPage();
    else if (service.collections.length === 1) browse(service.collections[0].name);
  } catch (error) {
    const action = { name: "Try again", run: openCollections };
    byId("collections-notice").replaceChildren(
      notice({
        kind: "error",
        title: "The collections cannot be read.",
        text: error.message,
        action,
      }),
    );
  }
}

export function turnItems(step) {
  const control = byId(step < 0 ? "browser-previous" : "browser-next");
  if (byId("browser").hidden || control.disabled) return;
  if (step > 0) starts.push(next);
  else starts.pop();
  showPage();
}

const none = () =>
  notice({
    title: "No collection is served.",
    text: "Make one here, or with clipserve embed, and name it to clipserve serve.",
    action: { name: "New collection", run: openMake },
  });

function showService() {
  const { collections, unavailable } = service;
  const isEmpty = !collections.length && !unavailable.length;
  byId("collections-notice").replaceChildren(...(isEmpty ? [none()] : []));
  renew(byId("collection-list"), ...collections.map(card), ...unavailable.map(lostCard));
  if (name && !collectionNamed(name)) {
    name = null;
    byId("browser").hidden = true;
  }
}

function card(one) {
  const told = element("div", { class: "card-notice" });
  const rows = facts(one).map(([term, text]) =>
    element("div", {}, element("dt", {}, term), element("dd", {}, text)),
  );
  const notes = [];
  if (one.index?.reason) notes.push(element("p", { class: "note" }, one.index.reason));
  if (one.stale) notes.push(element("p", { class: "note warn" }, STALE));
  const buttons = [
    button(`Browse ${one.name}`, () => browse(one.name), {}, "Browse"),
    button(`Search in ${one.name}`, () => searchIn(one.name), {}, "Search"),
  ];
  if (one.index) {
    const name = `Rebuild the index of ${one.name}`;
    buttons.push(button(name, () => rebuild(one.name, told), {}, "Rebuild index"));
  }
  buttons.push(button(`Fill ${one.name}`, () => fill(one.name), {}, "Fill"));
  buttons.push(button(`Drop ${one.name}`, () => openDrop(one.name), { class: "quiet" }, "Drop"));
  return element(
    "li",
    { class: `panel collection${one.name === name ? " current" : ""}` },
    element("h2", {}, one.name),
    element("dl", { class: "facts" }, ...rows),
    ...notes,
    element("div", { class: "row" }, ...buttons),
    told,
  );
}

function lostCard(one) {
  const drop = button(`Drop ${one.name}`, () => openDrop(one.name), { class: "quiet" }, "Drop");
  return element(
    "li",
    { class: "panel collection" },
    element("h2", {}, one.name),
    element("p", { class: "note warn" }, `It is not served: ${one.reason}`),
    element("div", { class: "row" }, drop),
  );
}

function facts(one) {
  const found = [
    ["Items", whole(one.count)],
    ["Model", one.model],
    ["Vectors", `${one.embed_dim} x ${one.dtype}`],
    ["Index", one.index?.kind ?? "none: every vector is compared"],
  ];
  if (!one.index) return found;
  const { recall_target: recall, memory_bytes: memory } = one.index;
  if (recall) found.push(["Recall aimed at", percent(recall)]);
  if (memory) found.push(["Memory", bytes(memory)]);
  const { indexed, fresh, dead } = one.searched;
  found.push(["In the index", `${whole(indexed)}, ${whole(fresh)} new, ${whole(dead)} gone`]);
  return found;
}

async function rebuild(collection, told) {
  try {
    await ask(`${collectionPath(collection)}:rebuild`, { method: "POST" });
    const text = "It is being built anew; searches go on meanwhile.";
    told.replaceChildren(element("p", { class: "note", role: "status" }, text));
  } catch (error) {
    told.replaceChildren(
      notice({ kind: "error", title: "It is not built anew.", text: error.message }),
    );
  }
}

function browse(collection) {
  name = collection;
  starts = [""];
  byId("browser").hidden = false;
  byId("browser-title").textContent = `Items of ${name}`;
  for (const [i, item] of [...byId("collection-list").children].entries()) {
    item.classList.toggle("current", service.collections[i]?.name === name);
  }
  byId("browser-hits").replaceChildren();
  return showPage();
}

async function showPage() {
  const signal = browsing.begin();
  const list = byId("browser-hits");
  if (!list.children.length) showWaiting(list, 12);
  list.classList.add("stale");
  const query = new URLSearchParams({ start_after: starts.at(-1), limit: String(PAGE + 1) });
  try {
    const { data } = await ask(`${collectionPath(name)}/items?${query}`, { signal });
    present(data.slice(0, PAGE), data.length > PAGE);
  } catch (error) {
    if (isAbort(error)) return;
    list.replaceChildren();
    const action = { name: "Try again", run: showPage };
    byId("browser-notice").replaceChildren(
      notice({ kind: "error", title: "The items cannot be read.", text: error.message, action }),
    );
  } finally {
    if (!signal.aborted) list.classList.remove("stale");
  }
}

function present(items, hasMore) {
  const from = (starts.length - 1) * PAGE;
  next = items.at(-1)?.id ?? null;
  const empty = notice({
    title: "There is nothing here.",
    text: "Fill it with a job, with clipserve embed, or over the API.",
    action: { name: "Fill it", run: () => fill(name) },
  });
  byId("browser-notice").replaceChildren(...(items.length ? [] : [empty]));
  const range = `${whole(from + 1)}\u2013${whole(from + items.length)}`;
  const all = plural(collectionNamed(name).count, "item");
  byId("browser-status").textContent = items.length ? `${range} of ${all}` : "";
  byId("browser-previous").disabled = starts.length === 1;
  byId("browser-next").disabled = !hasMore;
  const own = { ...actions, onDelete: deleteItem };
  showHits(
    byId("browser-hits"),
    items.map((item) => ({ ...item, collection: name })),
    own,
  );
}

async function deleteItem(item) {
  // Not by its path: of `items/..` a browser makes the collection's own.
  await ask(`${collectionPath(name)}/items:delete`, { method: "POST", json: { ids: [item.id] } });
  await refresh();
  await showPage();
}
