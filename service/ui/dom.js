// Making elements. What came from outside only ever becomes text or an attribute, never markup.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

// element("li", { class: "hit", hidden: true }, "text", child): strings become text nodes.
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  setAll(made, attributes);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  setAll(made, attributes);
  made.append(...children);
  return made;
}

export function icon(name) {
  return svg("svg", { "aria-hidden": "true" }, svg("use", { href: `#i-${name}` }));
}

export function button(name, onClick, attributes = {}, ...children) {
  const shown = children.length ? children : [name];
  const made = element("button", { type: "button", "aria-label": name, ...attributes }, ...shown);
  made.addEventListener("click", onClick);
  return made;
}

export function option(value, text = value) {
  return element("option", { value }, text);
}

// In the place of content: nothing there, an error, or why it cannot be.
export function notice({ title, text = "", kind = "empty", action = null }) {
  const role = kind === "error" ? { role: "alert" } : {};
  const made = element("div", { class: `notice ${kind}`, ...role }, element("strong", {}, title));
  if (text) made.append(element("p", {}, text));
  if (action) made.append(button(action.name, action.run));
  return made;
}

// New children; a button that has the focus hands it to the new one of its name.
export function renew(list, ...children) {
  const focused = list.contains(document.activeElement) ? document.activeElement : null;
  const name = focused?.getAttribute("aria-label");
  list.replaceChildren(...children);
  if (name) list.querySelector(`[aria-label="${CSS.escape(name)}"]`)?.focus();
}

// New options; what was chosen stays chosen where it is still there.
export function refill(id, options, otherwise) {
  const select = byId(id);
  const wanted = [select.value, otherwise, options[0]?.value];
  select.replaceChildren(...options);
  select.value =
    wanted.find((value) => options.some((one) => one.value === value && value !== undefined)) ?? "";
}

// The title for an error of a change: that the key may not, where that is why.
export const refusal = (error, title) =>
  error.code === "insufficient_scope" ? "This API key may not do that." : title;

export function closeable(dialog) {
  const close = () => dialog.close();
  dialog.querySelector("[data-close]").addEventListener("click", close);
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) close(); // beside the dialog, on its backdrop
  });
  return dialog;
}

function setAll(made, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    made.setAttribute(name, value === true ? "" : value);
  }
}
