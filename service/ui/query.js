// What is looked for: the words of the search box, and beside them more words, pictures and items,
// each with a weight. "This, but red" is an item and the word red.

import { showBlob, showStored } from "./api.js";
import { button, byId, element, icon } from "./dom.js";
import { toDataUri } from "./pictures.js";

const MAX_WEIGHT = 2;

let parts = []; // beside the box: { kind: words | picture | item, weight, ... }
const box = { kind: "box", weight: 1 };
let changed = () => {};

export function listenForQuery(onChange) {
  changed = onChange;
  byId("add-words").addEventListener("click", () => {
    add({ kind: "words", text: "", weight: 1 });
    byId("parts").querySelector("li:last-child input[type=text]").focus();
  });
  byId("query").addEventListener("input", changed);
}

export function addPictures(files) {
  for (const file of files) add({ kind: "picture", blob: file, weight: 1 });
}

export function addItem(hit) {
  if (!parts.some((part) => part.kind === "item" && part.hit.id === hit.id)) {
    add({ kind: "item", hit, weight: 1 });
  }
}

export function replaceByItem(hit) {
  clear();
  addItem(hit);
}

export function clear() {
  byId("query").value = "";
  parts = [];
  box.weight = 1;
  render();
}

// An item is one of its own collection; another one does not know it.
export function dropItems() {
  parts = parts.filter((part) => part.kind !== "item");
  render();
}

export const isEmpty = () => used().length === 0;
export const isOneText = () => used().length === 1 && textOf(used()[0]) !== null;

// The fields of POST /v1/search that say what is looked for.
export async function toBody() {
  const queries = [];
  for (const part of used()) queries.push({ ...(await content(part)), weight: part.weight });
  const [first] = queries;
  if (queries.length > 1 || first.weight < 0) return { queries };
  delete first.weight; // alone it only says which way to look
  return first;
}

// In words, for the line above the hits.
export function describe() {
  return used()
    .map((part) => {
      const name = textOf(part) !== null ? `\u201c${textOf(part)}\u201d` : nameOf(part);
      return part.weight < 0 ? `not ${name}` : name;
    })
    .join(" + ");
}

const textOf = (part) => {
  if (part.kind === "box") return byId("query").value.trim();
  return part.kind === "words" ? part.text.trim() : null;
};

const nameOf = (part) =>
  part.kind === "picture" ? "a picture" : part.hit.caption || `item ${part.hit.id}`;

function used() {
  return [box, ...parts].filter((part) => part.weight !== 0 && textOf(part) !== "");
}

async function content(part) {
  if (part.kind === "item") return { id: part.hit.id };
  if (part.kind === "picture") return { image: await toDataUri(part.blob) };
  return { text: textOf(part) };
}

function add(part) {
  parts.push(part);
  render();
}

function remove(part) {
  parts = parts.filter((one) => one !== part);
  render();
  byId("query").focus();
}

function render() {
  const list = byId("parts");
  list.hidden = !parts.length;
  const rows = parts.map(makeRow);
  if (parts.length) rows.unshift(boxRow());
  list.replaceChildren(...rows);
  changed();
}

function boxRow() {
  const name = element("span", { class: "name" }, "The words above");
  return element("li", {}, glyph("Aa"), name, weight(box, "the words above"));
}

function makeRow(part) {
  const name = nameIn(part);
  const shown = part.kind === "words" ? wordsInput(part) : element("span", { class: "name" }, name);
  const drop = button(`Remove ${name}`, () => remove(part), { class: "icon" }, icon("close"));
  return element("li", {}, preview(part), shown, weight(part, name), drop);
}

const nameIn = (part) => {
  if (part.kind === "words") return "these words";
  return part.kind === "picture" ? part.blob.name || "Pasted picture" : nameOf(part);
};

function wordsInput(part) {
  const attributes = {
    type: "text",
    "aria-label": "More words",
    autocomplete: "off",
    placeholder: "in red",
  };
  const input = element("input", attributes);
  input.value = part.text;
  input.addEventListener("input", () => {
    part.text = input.value;
    changed();
  });
  return input;
}

const glyph = (text) => element("span", { class: "thumb", "aria-hidden": "true" }, text);

function preview(part) {
  if (part.kind === "words") return glyph("Aa");
  const image = element("img", { class: "thumb", alt: "" });
  image.addEventListener("error", () => image.replaceWith(glyph("?")));
  if (part.kind === "picture") showBlob(image, part.blob);
  else showStored(image, part.hit.image_url);
  return image;
}

function weight(part, name) {
  const slider = element("input", {
    type: "range",
    min: -MAX_WEIGHT,
    max: MAX_WEIGHT,
    step: 0.1,
    "aria-label": `Weight of ${name}`,
  });
  slider.value = part.weight;
  const shown = element("output", {}, part.weight.toFixed(1));
  slider.addEventListener("input", () => {
    part.weight = Number(slider.value);
    shown.textContent = part.weight.toFixed(1);
    changed();
  });
  return element("span", { class: "weight" }, slider, shown);
}
