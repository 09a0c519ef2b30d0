// Server: what it serves, and charts of its work, read from /metrics while this view is open.

import { ask, BASE } from "./api.js";
import { count, h, number, table } from "./dom.js";

const SECONDS = 2, KEPT = 60, HEIGHT = 110;
const LINE = /^([a-z_]+)(?:\{(.*)\})? ([-+.\deEinfNa]+)/;
// Requests that reached no model: this page's own, and those of probes.
const OF_NO_MODEL = /(?:^|,)model=""/;

/** The sum of each metric over its labels. */
export function sums(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = LINE.exec(line);
    if (match && !OF_NO_MODEL.test(match[2] ?? "")) found.set(match[1], (found.get(match[1]) ?? 0) + Number(match[3]));
  }
  return found;
}

const grown = (name, now, before) => (now.get(name) ?? 0) - (before.get(name) ?? 0);
const rate = (name) => (now, before, seconds) => grown(name, now, before) / seconds;
/** The mean of what came between two readings; null where nothing came. */
const mean = (name, times) => (now, before) => {
  const counted = grown(`${name}_count`, now, before);
  return counted ? times * grown(`${name}_sum`, now, before) / counted : null;
};
const one = (value) => number(value, 1);
const CHARTS = [
  { title: "Tokens per second", read: rate("poolhouse_prompt_tokens_total"), show: count },
  { title: "Prompts per second", read: rate("poolhouse_prompts_total"), show: one },
  { title: "Requests per second", read: rate("poolhouse_request_seconds_count"), show: one },
  { title: "Milliseconds per request", read: mean("poolhouse_request_seconds", 1000), show: one },
  { title: "Prompts that wait or run", read: (now) => now.get("poolhouse_queued_prompts") ?? 0, show: count },
  { title: "Batch fill, %", read: mean("poolhouse_batch_fill", 100), show: count },
];

let library = null;
/** uPlot, fetched once it is needed. It is no module: its script sets a global. */
const drawn = () => library ??= new Promise((done, failed) => {
  const at = (name) => new URL(`page/vendor/${name}`, BASE).href;
  document.head.append(h("link", { rel: "stylesheet", href: at("uPlot.css") }),
    h("script", { src: at("uPlot.js"), on: { load: () => done(globalThis.uPlot), error: failed } }));
});

/** One number over the last two minutes. add: shows a further reading, null for none. */
function chart({ title, show }) {
  const head = h("h2", { text: title }), large = h("p", { class: "number large", text: "–" });
  const plot = h("div", { class: "chart", role: "img", "aria-label": `${title}: no readings yet` });
  const element = h("div", { class: "card" }, head, large, plot);
  const seconds = Array.from({ length: KEPT }, (_, at) => SECONDS * (at + 1 - KEPT));
  const past = Array(KEPT).fill(null);
  const say = (value) => { large.textContent = value === null ? "–" : show(value); };
  // Colours as they are now, since the theme may change.
  const color = (of, property = "color") => () => getComputedStyle(of)[property];
  const axis = { stroke: color(head), font: "11px system-ui, sans-serif", ticks: { show: false }, grid: { stroke: color(element, "borderTopColor"), width: 1 } };
  let graph = null;
  drawn().then((uPlot) => {
    graph = new uPlot({
      width: plot.clientWidth || 240, height: HEIGHT, legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false } },
      scales: { x: { time: false, range: [seconds[0], 0] }, y: { range: (_, __, most) => [0, most || 1] } },
      axes: [
        { ...axis, size: 20, gap: 2, incrs: [30, 60], values: (_, ticks) => ticks.map((tick) => `${number(tick, 0)} s`) },
        { ...axis, size: 42, gap: 4, space: 24, values: (_, ticks) => ticks.map((tick) => (tick < 1 ? String(tick) : count(tick))) },
      ],
      series: [{}, { stroke: color(plot), width: 1.5, points: { show: true, size: 4, fill: color(plot), width: 0 } }],
      hooks: { setCursor: [({ cursor }) => say(past[cursor.idx ?? KEPT - 1])] },
    }, [seconds, past], plot);
    new ResizeObserver(() => { if (plot.clientWidth) graph.setSize({ width: plot.clientWidth, height: HEIGHT }); }).observe(plot);
  });
  return {
    element,
    add(value) {
      past.push(value);
      past.shift();
      say(value);
      const known = past.filter((reading) => reading !== null);
      if (known.length) plot.setAttribute("aria-label",
        `${title} in the last two minutes: from ${show(Math.min(...known))} to ${show(Math.max(...known))}`);
      graph?.setData([seconds, past]);
    },
  };
}

/** The view; it stops asking once it is not on the page. */
export function server(models, version) {
  const charts = CHARTS.map(chart);
  const problem = h("p", { class: "problem", role: "alert", hidden: true });
  const element = h("section", { class: "server" }, h("h1", { text: "Server" }),
    h("p", { class: "about", text: `Poolhouse ${version}: its work in the last two minutes, and what it serves.` }),
    problem, h("div", { class: "cards" }, charts.map((one) => one.element)),
    h("h2", { text: "Models" }),
    table("Models", ["model", "tasks", "reads", "longest prompt", "prompts"], models.map((model) =>
      [model.id, model.tasks.join(", "), (model.modalities ?? []).join(", "), count(model.max_model_len), (model.prompts ?? []).join(", ") || "–"])),
    h("p", { class: "hint" }, "Charts by uPlot 1.6.32, ",
      h("a", { href: new URL("page/vendor/uPlot.LICENSE.txt", BASE).href, text: "MIT licence" }), "."));
  let before = null, then = 0, asking = false;
  const tick = async () => {
    asking = element.isConnected;
    if (!asking) { before = null; return; }
    try {
      const now = sums((await ask("metrics")).reply), at = performance.now();
      if (before) CHARTS.forEach(({ read }, index) => charts[index].add(read(now, before, (at - then) / 1000)));
      [before, then, problem.hidden] = [now, at, true];
    } catch (error) {
      problem.textContent = `${error.title ?? "Problem"}: ${error.message}`;
      problem.hidden = false;
    }
    setTimeout(tick, 1000 * SECONDS);
  };
  return { element, begin: () => { if (!asking) { asking = true; setTimeout(tick, 0); } } };
}
