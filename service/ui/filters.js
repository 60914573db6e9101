// Which items may be found: chips for plain equality, and a box for the whole filter language.

import { ask, collectionPath, isAbort, Latest } from "./api.js";
import { button, byId, element, icon, option } from "./dom.js";
import { plural } from "./format.js";

const WAIT_MS = 350; // after the last key, before the service is asked how many items there are
const MAX_SUGGESTED = 50;

let chips = []; // { field, value }; the field's name as the filter language writes it
let known = new Map(); // field -> Set of values seen in items, for suggestions
let collection = () => null;
let changed = () => {};
let timer = 0;
const counting = new Latest();

export class FilterProblem extends Error {}

export function listenForFilters(collectionName, onChange) {
  collection = collectionName;
  changed = onChange;
  byId("add-filter").addEventListener("click", addFromInputs);
  for (const id of ["filter-field", "filter-value"]) {
    byId(id).addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault(); // which would search
      addFromInputs();
    });
  }
  byId("filter-field").addEventListener("input", suggestValues);
  byId("filter-json").addEventListener("input", () => {
    counting.stop();
    clearTimeout(timer);
    timer = setTimeout(check, WAIT_MS);
  });
}

// The filter for the API, null without any. Throws FilterProblem for a box that is not JSON.
export function currentFilter() {
  const written = readBox();
  const own = chipFilter();
  if (written && own) return { and: [own, written] };
  return written ?? own;
}

export function addChip(field, value) {
  if (chips.some((chip) => chip.field === field && chip.value === value)) return;
  chips.push({ field, value });
  renderChips();
  changed();
}

export function clearFilters() {
  chips = [];
  byId("filter-json").value = "";
  renderChips();
}

// An error that the service found in the filter, beside the box it is about.
export function showProblem(message) {
  const note = byId("filter-note");
  note.textContent = message;
  note.classList.add("bad");
  byId("filter-json").setAttribute("aria-invalid", "true");
}

// Fields and values to suggest, from items that were seen.
export function learn(items) {
  for (const { metadata } of items) {
    for (const [name, value] of Object.entries(metadata ?? {})) {
      if (value !== null && typeof value === "object") continue;
      const field = escapeName(name);
      if (!known.has(field)) known.set(field, new Set());
      if (known.get(field).size < MAX_SUGGESTED) known.get(field).add(value);
    }
  }
  byId("filter-fields").replaceChildren(...[...known.keys()].sort().map((name) => option(name)));
  suggestValues();
}

export function forget() {
  known = new Map();
  learn([]);
}

// A key of metadata as the filter language names it: dots lead into objects, these words combine.
export function escapeName(name) {
  const escaped = name.replace(/[\\.]/g, "\\$&");
  return ["and", "or", "not"].includes(name) ? `\\${escaped}` : escaped;
}

function suggestValues() {
  const values = [...(known.get(byId("filter-field").value.trim()) ?? [])];
  byId("filter-values").replaceChildren(...values.map((value) => option(asTyped(value))));
}

function addFromInputs() {
  const [field, value] = [byId("filter-field"), byId("filter-value")];
  const name = field.value.trim();
  if (!name) return field.focus();
  addChip(name, parseValue(value.value.trim()));
  value.value = "";
  return value.focus();
}

// 3, true and null are meant as such, unless all that is known of the field is text; "3" is text.
function parseValue(text) {
  const seen = known.get(byId("filter-field").value.trim());
  if (seen?.size && [...seen].every((value) => typeof value === "string") && !/^".*"$/.test(text)) {
    return text;
  }
  try {
    const value = JSON.parse(text);
    return value !== null && typeof value === "object" ? text : value;
  } catch {
    return text;
  }
}

const asTyped = (value) => (typeof value === "string" ? value : JSON.stringify(value));

function chipFilter() {
  if (!chips.length) return null;
  const values = new Map();
  for (const { field, value } of chips) values.set(field, [...(values.get(field) ?? []), value]);
  return Object.fromEntries([...values].map(([field, list]) => [field, { in: list }]));
}

function readBox() {
  const text = byId("filter-json").value.trim();
  if (!text) return null;
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new FilterProblem(`The filter is not JSON: ${error.message}`);
  }
  if (value === null || typeof value !== "object" || Array.isArray(value)) {
    throw new FilterProblem('The filter must be a JSON object, such as {"color": "red"}.');
  }
  return value;
}

// How many items are left, or what is wrong.
export async function check() {
  clearTimeout(timer);
  const signal = counting.begin();
  const note = byId("filter-note");
  const name = collection();
  note.textContent = "";
  note.classList.remove("bad");
  byId("filter-json").removeAttribute("aria-invalid");
  try {
    const filter = currentFilter();
    if (!filter || !name) return;
    const query = new URLSearchParams({ filter: JSON.stringify(filter) });
    const { count } = await ask(`${collectionPath(name)}/count?${query}`, { signal });
    note.textContent = `Holds for ${plural(count, "item")}.`;
  } catch (error) {
    if (!isAbort(error)) showProblem(error.message);
  }
}

function renderChips() {
  const list = byId("chips");
  list.hidden = !chips.length;
  list.replaceChildren(
    ...chips.map((chip) => {
      const text = `${chip.field} = ${asTyped(chip.value)}`;
      const drop = () => {
        chips = chips.filter((one) => one !== chip);
        renderChips();
        changed();
      };
      const cross = button(`Remove ${text}`, drop, { class: "icon" }, icon("close"));
      return element("li", {}, element("span", {}, text), cross);
    }),
  );
  check();
}
