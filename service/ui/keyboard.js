// Keys for everything that is done often; never while somebody types, never with Ctrl, Alt or Meta.

import { byId, closeable } from "./dom.js";

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

// actions: show(number of a view), focusSearch(), turn(step)
export function listenForKeys(actions) {
  const help = closeable(byId("help-dialog"));
  byId("help-button").addEventListener("click", () => help.showModal());
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.altKey || event.metaKey) return;
    if (document.querySelector("dialog[open]")) return; // Escape closes it by itself
    if (handle(event, actions, help)) event.preventDefault();
  });
}

function handle(event, actions, help) {
  const from = event.target;
  if (isTyping(from)) return leave(event, from);
  if (event.key === "/") actions.focusSearch();
  else if (event.key === "?") help.showModal();
  else if (event.key === "[" || event.key === "]") actions.turn(event.key === "[" ? -1 : 1);
  else if (/^[1-5]$/.test(event.key)) actions.show(Number(event.key) - 1);
  else if (STEPS[event.key] && from.matches(".card button")) return move(from, ...STEPS[event.key]);
  else if (event.key === "Escape") from.blur();
  else return false;
  return true;
}

const isTyping = (from) =>
  from.matches("textarea, select, input:not([type=checkbox], [type=file])");

// Out of a box: Escape to the page, and down from the search box to the first hit.
function leave(event, from) {
  if (event.key === "Escape") {
    if (from.value && from.type === "search") return false; // the browser empties it
    from.blur();
    return true;
  }
  if (event.key !== "ArrowDown" || from.id !== "query") return false;
  const first = document.querySelector("#search-hits .hit");
  first?.focus();
  return Boolean(first);
}

// To the hit beside, above or below; up from the first row to the search box.
function move(from, dx, dy) {
  const cards = [...from.closest(".hits").querySelectorAll(".card")];
  const at = cards.indexOf(from.closest(".card"));
  const columns = cards.filter((card) => card.offsetTop === cards[0].offsetTop).length;
  const to = cards[at + dx + dy * columns];
  if (to) to.querySelector(".hit").focus();
  else if (dy < 0 && from.closest("#search-hits")) byId("query").focus();
  return true;
}
