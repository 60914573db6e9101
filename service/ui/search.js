// The search view: from the query, the filters and the options to a page of hits.

import { ask, collectionPath, isAbort, Latest } from "./api.js";
import { byId, notice, option } from "./dom.js";
import * as filters from "./filters.js";
import { plural, seconds, whole } from "./format.js";
import { showHits, showWaiting } from "./hits.js";
import { onChosen, onPictures } from "./pictures.js";
import * as query from "./query.js";
import { collectionNamed, modelOf, onService, service } from "./service.js";

const OFFSET_MAX = 9000; // of the API
const NEARLY_EQUAL = 0.98; // cosine

const searching = new Latest();
let offset = 0;
let shown = null; // the collection whose items were last learnt from
let goTo = () => {};

// `showView(name)` brings another view to the front.
export function listenForSearch(showView) {
  goTo = showView;
  query.listenForQuery(onQueryChanged);
  filters.listenForFilters(chosen, () => search());
  byId("search-form").addEventListener("submit", (event) => {
    event.preventDefault();
    search();
  });
  byId("options-button").addEventListener("click", () => openOptions(byId("options").hidden));
  byId("clear-search").addEventListener("click", clear);
  byId("collection").addEventListener("change", changeCollection);
  for (const id of ["page-size", "field", "exact", "rerank", "deduplicate", "min-score"]) {
    byId(id).addEventListener("change", () => search());
  }
  byId("search-previous").addEventListener("click", () => turn(-1));
  byId("search-next").addEventListener("click", () => turn(1));
  const addPictures = (files) => {
    query.addPictures(files);
    search();
  };
  onChosen(byId("query-file"), addPictures);
  onPictures("search", addPictures);
  onService(showService);
}

// What every card offers, here and in the collections' view.
export const actions = {
  onLike: (hit) => searchBy(hit, query.replaceByItem),
  onMix: (hit) => {
    searchBy(hit, query.addItem);
    byId("query").focus();
  },
  onFilter: (field, value) => {
    goTo("search");
    filters.addChip(field, value);
  },
};

export function searchIn(name) {
  if (byId("collection").value !== name) {
    byId("collection").value = name;
    changeCollection();
  }
  goTo("search");
  byId("query").focus();
}

const chosen = () => byId("collection").value || null;
const pageSize = () => Number(byId("page-size").value);

function searchBy(hit, put) {
  if (hit.collection && hit.collection !== chosen()) {
    byId("collection").value = hit.collection;
    changeCollection();
  }
  goTo("search");
  put(hit);
  search();
  window.scrollTo({ top: 0 });
}

async function search(from = 0) {
  const signal = searching.begin();
  const name = chosen();
  if (!name) return showService();
  offset = from;
  try {
    const filter = filters.currentFilter();
    byId("search-status").textContent = "Searching ...";
    waitForHits();
    const started = performance.now();
    const look = query.isEmpty() ? browse : find;
    const hits = await look(name, filter, signal);
    present(hits, (performance.now() - started) / 1000, Boolean(filter));
  } catch (error) {
    if (!isAbort(error)) fail(error);
  } finally {
    if (!signal.aborted) byId("search-hits").classList.remove("stale");
  }
  return undefined;
}

async function find(name, filter, signal) {
  const body = { ...(await query.toBody()), ...options(), collection: name, k: pageSize(), offset };
  if (filter) body.filter = filter;
  signal.throwIfAborted(); // while the pictures were read
  const answer = await ask("v1/search", { method: "POST", json: body, signal });
  answer.hits.truncated = answer.query.truncated;
  return answer.hits;
}

// Nothing is looked for: the first items, or with a filter all it holds for, in any direction.
async function browse(name, filter, signal) {
  if (!filter) {
    const path = `${collectionPath(name)}/items?limit=${pageSize()}`;
    return (await ask(path, { signal })).data;
  }
  const vector = new Array(collectionNamed(name).embed_dim).fill(1);
  const json = { vector, collection: name, k: pageSize(), offset, filter };
  const { hits } = await ask("v1/search", { method: "POST", json, signal });
  return hits.map(({ score, ...item }) => item);
}

function options() {
  const given = { field: byId("field").value };
  if (byId("min-score").value !== "") given.min_score = Number(byId("min-score").value);
  if (byId("deduplicate").checked) given.deduplicate = NEARLY_EQUAL;
  if (byId("exact").checked) given.exact = true;
  if (canRerank() && byId("rerank").checked) given.rerank = true;
  return given;
}

const canRerank = () => Boolean(modelOf(collectionNamed(chosen()))?.can_match) && query.isOneText();

function present(hits, took, isFiltered) {
  filters.learn(hits);
  byId("search-notice").replaceChildren(...(hits.length ? [] : [nothing()]));
  const named = hits.map((hit) => ({ ...hit, collection: chosen() }));
  showHits(byId("search-hits"), named, actions);
  byId("search-status").textContent = hits.length ? headline(hits, took, isFiltered) : "";
  const isAll = offset === 0 && hits.length < pageSize();
  byId("search-pager").hidden = isAll || (query.isEmpty() && !isFiltered);
  byId("search-previous").disabled = offset === 0;
  byId("search-next").disabled = hits.length < pageSize() || offset + pageSize() > OFFSET_MAX;
}

function headline(hits, took, isFiltered) {
  if (query.isEmpty() && !isFiltered) {
    return `Some of what is in ${chosen()}; start from one of them, or type.`;
  }
  const range = `Hits ${whole(offset + 1)}\u2013${whole(offset + hits.length)}`;
  const which = offset ? range : plural(hits.length, "hit");
  if (query.isEmpty()) return `${which} in no order of likeness; start from one of them, or type.`;
  const cut = hits.truncated ? " The words were too many and were cut." : "";
  return `${which} for ${query.describe()}, in ${seconds(took)}.${cut}`;
}

function nothing() {
  if (offset) {
    const action = { name: "Back to the first", run: () => search() };
    return notice({ title: "There are no more hits.", action });
  }
  if (!collectionNamed(chosen())?.count) {
    const text = "Fill it with clipserve embed, or over the API.";
    return notice({ title: "This collection is empty.", text });
  }
  const text = "The filters, or the lowest score, may leave nothing.";
  return notice({ title: "Nothing was found.", text });
}

function fail(error) {
  const isFilter = error instanceof filters.FilterProblem || error.code === "invalid_filter";
  byId("search-status").textContent = "";
  byId("search-hits").replaceChildren();
  byId("search-pager").hidden = true;
  if (isFilter) {
    openOptions(true);
    filters.showProblem(error.message);
  }
  const title = isFilter ? "The filter cannot be used." : "The search failed.";
  const action = { name: "Try again", run: () => search(offset) };
  byId("search-notice").replaceChildren(
    notice({ kind: "error", title, text: error.message, action }),
  );
}

function waitForHits() {
  const list = byId("search-hits");
  byId("search-notice").replaceChildren();
  if (list.children.length) list.classList.add("stale");
  else showWaiting(list, 12);
}

export function turn(step) {
  const button = byId(step < 0 ? "search-previous" : "search-next");
  if (byId("search-pager").hidden || button.disabled) return;
  search(Math.max(0, offset + step * pageSize()));
  byId("search-status").scrollIntoView({ block: "nearest" });
}

function onQueryChanged() {
  byId("clear-search").hidden = query.isEmpty();
  byId("rerank").disabled = !canRerank();
}

function clear() {
  query.clear();
  filters.clearFilters();
  search();
  byId("query").focus();
}

function changeCollection() {
  query.dropItems();
  filters.forget();
  filters.check();
  showRerank();
  search();
}

function showRerank() {
  byId("rerank-choice").hidden = !modelOf(collectionNamed(chosen()))?.can_match;
  byId("rerank").disabled = !canRerank();
}

function openOptions(open) {
  byId("options").hidden = !open;
  byId("options-button").setAttribute("aria-expanded", String(open));
}

// The collections may have changed; the one that was chosen stays if it is there.
function showService() {
  const before = chosen();
  byId("collection").replaceChildren(
    ...service.collections.map((one) => option(one.name, `${one.name} (${whole(one.count)})`)),
  );
  if (collectionNamed(before)) byId("collection").value = before;
  const isNone = !service.collections.length;
  for (const control of byId("search-form").elements) control.disabled = isNone;
  byId("collection-choice").hidden = service.collections.length < 2;
  showRerank();
  if (isNone) {
    byId("search-hits").replaceChildren();
    byId("search-status").textContent = "";
    const text = "Make one under Collections, or with clipserve embed.";
    byId("search-notice").replaceChildren(notice({ title: "No collection is served.", text }));
  } else if (chosen() !== shown) {
    shown = chosen();
    query.dropItems();
    search();
  }
}
