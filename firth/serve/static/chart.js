// Line charts in SVG, drawn again when data or width change.

import { el, number, show, svg } from "./dom.js";

const HEIGHT = 300;
const MARGIN = { left: 58, right: 12, top: 10, bottom: 34 };
const MOST_POINTS = 600;

/** Return a chart: `draw(series, {x, y, log})`, where a series has a name, a color, points [x, y] and whether it is `dots`. */
export function chart(label) {
  const picture = svg("svg", { class: "plot", role: "img", "aria-label": label, height: HEIGHT });
  const readout = el("p", { class: "note readout" }, "");
  const node = el("figure", { class: "chart" }, picture, readout);
  let drawn = null;
  let scales = null;

  function draw(series, axes) {
    drawn = [series, axes];
    const width = node.clientWidth || 600;
    picture.setAttribute("width", width);
    picture.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const points = series.flatMap((one) => one.points).filter(([, y]) => !axes.log || y > 0);
    if (!points.length) {
      scales = null;
      show(picture, svg("text", { x: MARGIN.left, y: 40 }, "no value yet"));
      return;
    }
    const xs = span(points.map(([x]) => x));
    const ys = span(points.map(([, y]) => (axes.log ? Math.log10(y) : y)), 0.05);
    const right = width - MARGIN.right;
    const bottom = HEIGHT - MARGIN.bottom;
    const toX = (x) => MARGIN.left + ((x - xs[0]) / (xs[1] - xs[0])) * (right - MARGIN.left);
    const toY = (y) => bottom - (((axes.log ? Math.log10(y) : y) - ys[0]) / (ys[1] - ys[0])) * (bottom - MARGIN.top);
    scales = { toX, toY, xs };
    const parts = [];
    for (const value of axes.log ? logTicks(ys) : ticks(ys, 6)) {
      const y = toY(value);
      parts.push(svg("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y, y2: y }), svg("text", { class: "tick", x: MARGIN.left - 8, y: y + 4, "text-anchor": "end" }, number(value)));
    }
    for (const value of ticks(xs, Math.max(2, Math.floor(width / 110)))) {
      const x = toX(value);
      const end = x > right - 20 ? "end" : "middle";
      parts.push(svg("line", { class: "axis", x1: x, x2: x, y1: bottom, y2: bottom + 4 }), svg("text", { class: "tick", x, y: bottom + 17, "text-anchor": end }, number(value)));
    }
    parts.push(svg("line", { class: "axis", x1: MARGIN.left, x2: right, y1: bottom, y2: bottom }));
    parts.push(svg("text", { class: "unit", x: right, y: HEIGHT - 2, "text-anchor": "end" }, axes.x));
    for (const one of series) {
      const shown = thin(one.points.filter(([, y]) => !axes.log || y > 0));
      const line = shown.map(([x, y]) => `${toX(x).toFixed(1)},${toY(y).toFixed(1)}`).join(" ");
      const kind = `c${one.color % 6}${one.color >= 6 ? " dashed" : ""}`;
      parts.push(svg("polyline", { class: `${kind}${one.raw ? " raw" : ""}`, points: line }));
      if (one.dots) parts.push(...shown.map(([x, y]) => svg("circle", { class: kind, cx: toX(x), cy: toY(y), r: 3 })));
    }
    show(picture, parts);
  }

  picture.addEventListener("pointermove", (event) => {
    if (!scales) return;
    const [series, axes] = drawn;
    const at = event.clientX - picture.getBoundingClientRect().left;
    const values = series.filter((one) => !one.raw && one.points.length).map((one) => {
      const best = one.points.reduce((a, b) => (Math.abs(scales.toX(b[0]) - at) < Math.abs(scales.toX(a[0]) - at) ? b : a));
      return `${one.name}: ${number(best[1])} at ${axes.x} ${number(best[0])}`;
    });
    readout.textContent = values.join("; ");
  });
  picture.addEventListener("pointerleave", () => {
    readout.textContent = "";
  });
  new ResizeObserver(() => drawn && draw(...drawn)).observe(node);
  return { node, draw };
}

/** Return the mean of each point and its neighbors, of which there are more in longer series. */
export function smooth(points) {
  const half = Math.max(1, Math.round(points.length / 60));
  return points.map(([x], i) => {
    const near = points.slice(Math.max(0, i - half), i + half + 1);
    return [x, near.reduce((sum, [, y]) => sum + y, 0) / near.length];
  });
}

function thin(points) {
  const every = Math.ceil(points.length / MOST_POINTS);
  return every <= 1 ? points : points.filter((_, i) => i % every === 0 || i === points.length - 1);
}

function span(values, margin = 0) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (low === high) return [low - Math.abs(low || 1) / 2, high + Math.abs(high || 1) / 2];
  return [low - margin * (high - low), high + margin * (high - low)];
}

function ticks([low, high], count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((one) => one * power >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i += 1) found.push(i * step + 0);
  return found;
}

function logTicks([low, high]) {
  const found = [];
  const wide = high - low > 3;
  for (let power = Math.floor(low); power <= high; power += 1) {
    for (const digit of wide ? [1] : [1, 2, 5]) {
      const at = power + Math.log10(digit);
      if (at >= low && at <= high) found.push(digit * 10 ** power);
    }
  }
  return found.length > 1 ? found : ticks([10 ** low, 10 ** high], 4);
}
