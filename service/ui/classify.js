// The classification view: pictures and labels in, a bar for each label out.

import { ask, isAbort, Latest, showBlob } from "./api.js";
import { button, byId, element, icon, notice, option, refill } from "./dom.js";
import { percent, plural, seconds } from "./format.js";
import { onChosen, onPictures } from "./pictures.js";
import { onService, service } from "./service.js";

const TOGETHER = 16; // pictures in one request: answers come in while the others wait
const OWN = "own";

let pictures = [];
const classifying = new Latest();

export function listenForClassify() {
  onChosen(byId("files"), addPictures);
  onPictures("classify", addPictures);
  byId("classify-form").addEventListener("submit", (event) => {
    event.preventDefault();
    classify();
  });
  byId("clear-classify").addEventListener("click", clear);
  byId("label-set").addEventListener("change", showChoices);
  byId("templates").addEventListener("change", showChoices);
  byId("classify-model").addEventListener("change", showChoices);
  byId("temperature").addEventListener("input", showTemperature);
  onService(showService);
  showEmpty();
}

function addPictures(files) {
  pictures.push(...files);
  showChosen();
}

function clear() {
  classifying.stop();
  pictures = [];
  showChosen();
  showEmpty();
  byId("files").focus();
}

function showEmpty() {
  byId("answers").replaceChildren();
  byId("classify-status").textContent = "";
  byId("classify-notice").replaceChildren(
    notice({
      title: "No answers yet.",
      text: "Choose pictures, name the labels, and see how probable each is.",
    }),
  );
}

function showChosen() {
  byId("chosen").hidden = !pictures.length;
  byId("chosen").replaceChildren(
    ...pictures.map((file) => {
      const remove = () => {
        pictures = pictures.filter((one) => one !== file);
        showChosen();
        byId("files").focus();
      };
      return element(
        "li",
        {},
        thumb(file),
        button(`Remove ${file.name}`, remove, { class: "icon" }, icon("close")),
      );
    }),
  );
}

function thumb(file) {
  const image = element("img", { class: "thumb", alt: file.name });
  // The service may read a format that the browser does not show.
  image.addEventListener("error", () =>
    image.replaceWith(element("span", { class: "thumb" }, "?")),
  );
  showBlob(image, file);
  return image;
}

async function classify() {
  const signal = classifying.begin();
  const problem = findProblem();
  if (problem) return showProblem(...problem);
  const files = [...pictures];
  byId("classify-notice").replaceChildren();
  byId("answers").replaceChildren();
  byId("classify-status").textContent = `Classifying ${plural(files.length, "picture")} ...`;
  const started = performance.now();
  try {
    let failed = 0;
    for (let at = 0; at < files.length; at += TOGETHER) {
      const some = files.slice(at, at + TOGETHER);
      const results = await classifySome(some, signal);
      failed += results.filter((result) => result.error).length;
      byId("answers").append(...results.map((result, i) => answer(some[i], result)));
    }
    byId("classify-status").textContent = summary(
      files.length,
      failed,
      (performance.now() - started) / 1000,
    );
  } catch (error) {
    if (!isAbort(error)) showProblem("It cannot be classified.", error.message);
  }
  return undefined;
}

function summary(count, failed, took) {
  const bad = failed ? ` ${plural(failed, "picture")} could not be read.` : "";
  return `${plural(count - failed, "picture")} in ${seconds(took)}.${bad}`;
}

// When no picture of a request can be read, its answer is the first one's error.
async function classifySome(files, signal) {
  const form = makeForm();
  for (const file of files) form.append("files", file, "picture");
  try {
    return (await ask("v1/classify", { method: "POST", form, signal })).results;
  } catch (error) {
    if (error.code !== "invalid_image") throw error;
    if (files.length === 1) return [{ error }];
    return (await Promise.all(files.map((file) => classifySome([file], signal)))).flat();
  }
}

function makeForm() {
  const form = new FormData();
  const ownLabels = labels();
  if (byId("label-set").value) form.append("label_set", byId("label-set").value);
  else for (const label of ownLabels) form.append("labels", label);
  for (const template of templates()) form.append("templates", template);
  form.append("top_k", byId("top-k").value);
  form.append("temperature", String(temperature()));
  const least = Number(byId("min-probability").value);
  if (least > 0) form.append("min_probability", String(least / 100));
  if (byId("classify-model").value) form.append("model", byId("classify-model").value);
  if (model()?.multi_label) form.append("multi_label", String(byId("multi-label").checked));
  return form;
}

// Lines, if there are several, for then a label may hold a comma.
function labels() {
  const text = byId("labels").value.trim();
  const parts = text.split(text.includes("\n") ? "\n" : ",");
  return [...new Set(parts.map((label) => label.trim()).filter(Boolean))];
}

const lines = (id) =>
  byId(id)
    .value.split("\n")
    .map((line) => line.trim())
    .filter(Boolean);
const templates = () =>
  byId("templates").value === OWN ? lines("own-templates") : [byId("templates").value];
const temperature = () => 10 ** Number(byId("temperature").value);
const model = () =>
  service.models.find((one) => one.id === byId("classify-model").value) ?? service.models[0];

function findProblem() {
  if (!pictures.length) return ["Choose a picture first.", "", "files"];
  if (!byId("label-set").value && !labels().length)
    return ["Name at least one label.", "", "labels"];
  if (!templates().length) return ["Write at least one template.", "", "own-templates"];
  return null;
}

function showProblem(title, text, focus) {
  byId("classify-status").textContent = "";
  byId("classify-notice").replaceChildren(notice({ kind: "error", title, text }));
  if (focus) byId(focus).focus();
}

function answer(file, result) {
  const content = element(
    "div",
    { class: "answer-content" },
    element("p", { class: "file-name" }, file.name),
  );
  if (result.error) content.append(element("p", { class: "bad" }, result.error.message));
  else if (!result.predictions.length)
    content.append(element("p", { class: "note" }, "No label is probable enough."));
  else content.append(bars(result.predictions, file.name));
  return element("li", { class: "panel answer" }, thumb(file), content);
}

function bars(predictions, name) {
  const rows = predictions.map(({ label, probability }) => {
    const fill = element("span", { class: "fill", "aria-hidden": "true" });
    fill.style.width = `${100 * probability}%`;
    return element(
      "li",
      {},
      element("span", { class: "label" }, label),
      element("span", { class: "value" }, percent(probability)),
      element("span", { class: "track" }, fill),
    );
  });
  return element(
    "ol",
    { class: "bars", "aria-label": `Labels of ${name} by probability` },
    ...rows,
  );
}

function showTemperature() {
  const text = temperature().toFixed(2);
  byId("temperature-value").textContent = text;
  byId("temperature").setAttribute("aria-valuetext", text);
}

function showChoices() {
  const set = service.labelSets.find((one) => one.id === byId("label-set").value);
  byId("labels-choice").hidden = Boolean(set);
  byId("label-set-note").hidden = !set;
  if (set) {
    const some = set.labels.slice(0, 8).join(", ");
    byId("label-set-note").textContent =
      set.count > 8 ? `${plural(set.count, "label")}: ${some}, ...` : some;
  }
  byId("own-templates-choice").hidden = byId("templates").value !== OWN;
  byId("multi-label-choice").hidden = !model()?.multi_label;
}

function showService() {
  refill("label-set", [
    option("", "Own labels"),
    ...service.labelSets.map((set) => option(set.id)),
  ]);
  refill(
    "templates",
    [...service.templateSets.map((name) => option(name)), option(OWN, "own ...")],
    "photo",
  );
  refill(
    "classify-model",
    service.models.map((one) => option(one.id)),
  );
  byId("label-set-choice").hidden = !service.labelSets.length;
  byId("classify-model-choice").hidden = service.models.length < 2;
  showChoices();
}
