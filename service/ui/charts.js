// A line chart in SVG: a few series over the last minutes, with their latest values as legend.

import { element, svg } from "./dom.js";

const WIDTH = 560;
const HEIGHT = 190;
const LEFT = 52;
const BOTTOM = 22;
const TOP = 10;
const TICKS = 4;
const LEAST_POINTS = 31; // the axis grows from so many to all of them

// makeChart({ title, names, format, points, everyS }) -> { root, update(series) }; `points` is how
// many values, one each `everyS` seconds, fit; null is a gap.
export function makeChart({ title, names, format, points, everyS }) {
  const viewBox = `0 0 ${WIDTH} ${HEIGHT}`;
  const canvas = svg("svg", { viewBox, role: "img", class: "chart", "aria-label": title });
  const values = names.map(() => element("b", {}, "\u2013"));
  const legend = names.map((name, i) =>
    element(
      "span",
      { class: `legend series-${i}` },
      element("i", { "aria-hidden": "true" }),
      `${name} `,
      values[i],
    ),
  );
  const legends = element("div", { class: "legends" }, ...legend);
  const head = element("div", { class: "chart-head" }, element("h2", {}, title), legends);
  const root = element("figure", { class: "panel" }, head, canvas);
  let span = LEAST_POINTS;
  const x = (i, count) => LEFT + ((WIDTH - LEFT - 8) * (span - count + i)) / (span - 1);
  let latest = names.map(() => []);

  function tell(at) {
    const told = latest.map((series) => format(series.at(at) ?? null));
    told.forEach((text, i) => {
      values[i].textContent = text;
    });
    return told;
  }

  function update(series) {
    latest = series;
    span = Math.min(points, Math.max(LEAST_POINTS, series[0].length));
    const top = niceTop(Math.max(...series.flat().filter(Number.isFinite), 0));
    const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / top);
    canvas.replaceChildren(...grid(top, y, format), ...times((span - 1) * everyS));
    series.forEach((line, i) => canvas.append(...drawLine(line, i, x, y, HEIGHT - BOTTOM)));
    const told = tell(-1);
    canvas.setAttribute(
      "aria-label",
      `${title}: ${names.map((name, i) => `${name} ${told[i]}`).join(", ")}`,
    );
  }

  // Under the pointer the legend tells that moment's values.
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const position = ((event.clientX - box.left) / box.width) * WIDTH;
    const count = latest[0].length;
    const step = x(1, count) - x(0, count);
    const at = Math.round((position - x(0, count)) / step);
    if (at < 0 || at >= count) return;
    canvas.querySelector(".cursor")?.remove();
    canvas.append(
      svg("line", {
        class: "cursor",
        x1: x(at, count),
        x2: x(at, count),
        y1: TOP,
        y2: HEIGHT - BOTTOM,
      }),
    );
    tell(at);
  });
  canvas.addEventListener("pointerleave", () => {
    canvas.querySelector(".cursor")?.remove();
    tell(-1);
  });
  update(latest);
  return { root, update };
}

// 1, 2 or 5 times a power of ten, at or above the largest value.
export function niceTop(largest) {
  if (!(largest > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(largest));
  return [1, 2, 5, 10].find((step) => step * power >= largest) * power;
}

function grid(top, y, format) {
  return Array.from({ length: TICKS + 1 }, (_, i) => (top * i) / TICKS).flatMap((value) => [
    svg("line", { class: "grid", x1: LEFT, x2: WIDTH - 8, y1: y(value), y2: y(value) }),
    svg("text", { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, format(value)),
  ]);
}

// How long ago, along the axis.
function times(lengthS) {
  const stepS = [15, 30, 60].find((step) => lengthS / step <= 5) ?? 60;
  const marks = Math.floor(lengthS / stepS);
  return Array.from({ length: marks + 1 }, (_, i) => {
    const x = WIDTH - 8 - ((WIDTH - LEFT - 8) * i * stepS) / lengthS;
    const text = stepS < 60 ? `-${i * stepS} s` : `-${i} min`;
    const anchor = i ? "middle" : "end";
    return svg("text", { x, y: HEIGHT - 5, "text-anchor": anchor }, i ? text : "now");
  });
}

function drawLine(line, index, x, y, bottom) {
  return runs(line).map((run) => {
    const places = run.map((i) => `${x(i, line.length).toFixed(1)} ${y(line[i]).toFixed(1)}`);
    if (run.length === 1) {
      const [cx, cy] = places[0].split(" ");
      return svg("circle", { class: `dot series-${index}`, cx, cy, r: 2.5 });
    }
    const path = `M${places.join("L")}`;
    const [first, last] = [run[0], run.at(-1)].map((i) => x(i, line.length).toFixed(1));
    const area = svg("path", { class: "area", d: `${path}L${last} ${bottom}L${first} ${bottom}Z` });
    return svg("g", { class: `series-${index}` }, area, svg("path", { class: "line", d: path }));
  });
}

// The indexes of values that follow each other without a gap.
function runs(line) {
  const found = [];
  line.forEach((value, i) => {
    if (!Number.isFinite(value)) return;
    if (found.at(-1)?.at(-1) === i - 1) found.at(-1).push(i);
    else found.push([i]);
  });
  return found;
}
