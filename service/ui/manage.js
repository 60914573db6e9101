// Making a collection, and dropping one after its name was typed.

import { ask, collectionPath } from "./api.js";
import { byId, closeable, element, notice, option, refill, refusal } from "./dom.js";
import { plural } from "./format.js";
import { collectionNamed, onService, refresh, service } from "./service.js";

let doomed = null; // the name of the collection that is asked about

// `onMade(name)` is told of a collection that was made.
export function listenForManaging(onMade) {
  const make = closeable(byId("make-dialog"));
  byId("new-collection").addEventListener("click", openMake);
  byId("make-form").addEventListener("submit", (event) => {
    event.preventDefault();
    act("make", async () => {
      const name = byId("make-name").value.trim();
      const json = { model: byId("make-model").value };
      await ask(collectionPath(name), { method: "PUT", json });
      await refresh();
      make.close();
      onMade(name);
    });
  });
  listenForDrop();
  onService(() => {
    refill(
      "make-model",
      service.models.map((one) => option(one.id)),
    );
    byId("make-model-choice").hidden = service.models.length < 2;
  });
}

export function openMake() {
  byId("make-form").reset();
  byId("make-notice").replaceChildren();
  byId("make-dialog").showModal();
}

export function openDrop(name) {
  doomed = name;
  byId("drop-form").reset();
  byId("drop-notice").replaceChildren();
  byId("drop-go").disabled = true;
  byId("drop-title").textContent = `Drop ${name}?`;
  const one = collectionNamed(name); // none, if it is unavailable
  const items = one ? plural(one.count, "item") : "All items";
  byId("drop-text").textContent = `${items} and the index are removed from disk, for good.`;
  byId("drop-label").replaceChildren("Type its name, ", element("b", {}, name), ", to confirm");
  byId("drop-dialog").showModal();
}

function listenForDrop() {
  const dialog = closeable(byId("drop-dialog"));
  const isTyped = () => byId("drop-name").value === doomed;
  byId("drop-name").addEventListener("input", () => {
    byId("drop-go").disabled = !isTyped();
  });
  byId("drop-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!isTyped()) return; // Enter asks for no button
    act("drop", async () => {
      await ask(collectionPath(doomed), { method: "DELETE" });
      await refresh();
      dialog.close();
      byId("new-collection").focus(); // the button that opened the dialog is gone
    });
  });
}

// Once at a time; a refusal is told in the dialog.
async function act(kind, work) {
  const go = byId(`${kind}-go`);
  go.disabled = true;
  try {
    await work();
  } catch (error) {
    const title = kind === "make" ? "It was not made." : "It was not dropped.";
    const told = { kind: "error", title: refusal(error, title), text: error.message };
    byId(`${kind}-notice`).replaceChildren(notice(told));
    byId(`${kind}-name`).focus();
  } finally {
    go.disabled = false;
  }
}
