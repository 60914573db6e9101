// Hits and items as cards, and the dialog that shows all that is known of one.

import { showStored } from "./api.js";
import { button, byId, closeable, element, icon, notice } from "./dom.js";
import { escapeName } from "./filters.js";

// Cards with their actions: onLike, onMix, onFilter(field, value), and onDelete if it is offered.
export function showHits(list, hits, actions) {
  const hadFocus = list.contains(document.activeElement);
  list.replaceChildren(...hits.map((hit) => card(hit, actions)));
  if (hadFocus) list.querySelector(".hit")?.focus({ preventScroll: true });
}

// Grey cards, while there is nothing to show yet.
export function showWaiting(list, count) {
  const part = (name) => element("span", { class: name });
  const grey = () =>
    element("li", { class: "card waiting", "aria-hidden": "true" }, part("frame"), part("text"));
  list.replaceChildren(...Array.from({ length: count }, grey));
}

export const nameOf = (hit) => hit.caption || hit.id;

export function listenForItemDialog() {
  closeable(byId("item-dialog"));
}

function card(hit, actions) {
  const name = nameOf(hit);
  const score =
    hit.score === undefined ? null : element("span", { class: "score" }, scoreText(hit));
  const told = hit.score === undefined ? name : `${name}, score ${scoreText(hit)}`;
  const text = element(
    "span",
    { class: "text" },
    element("span", { class: "caption" }, name),
    score,
  );
  const open = button(
    told,
    () => showItem(hit, actions),
    { class: "hit", title: name },
    picture(hit),
    text,
  );
  const like = button(
    `More like ${name}`,
    () => actions.onLike(hit),
    { class: "like" },
    icon("like"),
    "More like this",
  );
  const mixed = { class: "icon mix", title: "Add to the search" };
  const mix = button(`Add ${name} to the search`, () => actions.onMix(hit), mixed, icon("plus"));
  const item = element(
    "li",
    { class: "card" },
    open,
    element("span", { class: "card-tools" }, like, mix),
  );
  item.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const act = { m: actions.onLike, "+": actions.onMix }[event.key];
    if (!act) return;
    event.preventDefault(); // the search box, which gets the focus, would get the letter too
    act(hit);
  });
  return item;
}

const scoreText = (hit) => hit.score.toFixed(3);

function picture(hit) {
  const frame = element("span", { class: "frame" });
  const image = element("img", { alt: "", loading: "lazy", decoding: "async" });
  const missing = element("span", { class: "no-picture" }, "no picture");
  image.addEventListener("error", () => frame.replaceChildren(missing));
  frame.append(image);
  showStored(image, hit.image_url);
  return frame;
}

function showItem(hit, actions) {
  const dialog = byId("item-dialog");
  const then =
    (act) =>
    (...given) => {
      dialog.close();
      act(...given);
    };
  byId("item-title").textContent = nameOf(hit);
  const facts = [["Id", hit.id]];
  if (hit.score !== undefined) facts.push(["Score", hit.score.toFixed(4)]);
  if (hit.matching !== undefined) facts.push(["Matching", hit.matching.toFixed(4)]);
  const buttons = [
    button(
      "More like this",
      then(() => actions.onLike(hit)),
      { class: "primary" },
    ),
    button(
      "Add to the search",
      then(() => actions.onMix(hit)),
    ),
  ];
  if (actions.onDelete) buttons.push(deleteButton(hit, actions, dialog));
  byId("item-content").replaceChildren(
    element(
      "div",
      { class: "item" },
      picture(hit),
      element(
        "div",
        { class: "item-facts" },
        definitions(facts),
        metadata(hit, then(actions.onFilter)),
      ),
    ),
    element("div", { class: "row" }, ...buttons),
    element("div", { class: "item-notice" }),
  );
  dialog.showModal();
}

// The first press asks, the second deletes.
function deleteButton(hit, actions, dialog) {
  const made = button("Delete", async () => {
    if (!made.classList.contains("danger")) {
      made.classList.add("danger");
      made.textContent = "Delete for good?";
      made.setAttribute("aria-label", `Delete ${nameOf(hit)} for good?`);
      return;
    }
    made.disabled = true;
    try {
      await actions.onDelete(hit);
      dialog.close();
    } catch (error) {
      const title = error.status === 403 ? "This may not be deleted here." : "It was not deleted.";
      const told = notice({ kind: "error", title, text: error.message });
      dialog.querySelector(".item-notice").replaceChildren(told);
      made.remove();
    }
  });
  return made;
}

function metadata(hit, onFilter) {
  const entries = Object.entries(hit.metadata ?? {});
  if (!entries.length) return element("p", { class: "note" }, "No metadata.");
  const rows = entries.map(([name, value]) => [name, metadataValue(name, value, onFilter)]);
  return definitions(rows);
}

// A plain value is a button: only items that have the same.
function metadataValue(name, value, onFilter) {
  const text = typeof value === "string" ? value : JSON.stringify(value);
  if (value !== null && typeof value === "object") return element("code", {}, text);
  const told = `Only items where ${name} is ${text}`;
  return button(told, () => onFilter(escapeName(name), value), { class: "value" }, text);
}

function definitions(rows) {
  const pairs = rows.map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value)),
  );
  return element("dl", { class: "facts" }, ...pairs);
}
