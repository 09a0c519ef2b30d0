// Server: what it serves, and live numbers of its work, read from /metrics while this view is open.

import { ask } from "./api.js";
import { count, h, number, s, table } from "./dom.js";

const SECONDS = 2, KEPT = 60;
const LINE = /^([a-z_]+)(?:\{(.*)\})? ([-+.\deEinfNa]+)/;

/** The sum of each metric over its labels. */
export function sums(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = LINE.exec(line);
    if (match) found.set(match[1], (found.get(match[1]) ?? 0) + Number(match[3]));
  }
  return found;
}

const rate = (name) => (now, before, seconds) => ((now.get(name) ?? 0) - (before.get(name) ?? 0)) / seconds;
const mean = (name) => (now, before) => {
  const counted = (now.get(`${name}_count`) ?? 0) - (before.get(`${name}_count`) ?? 0);
  return counted ? 1000 * ((now.get(`${name}_sum`) ?? 0) - (before.get(`${name}_sum`) ?? 0)) / counted : 0;
};
const GAUGES = [
  { title: "Tokens per second", read: rate("poolhouse_prompt_tokens_total"), show: count },
  { title: "Prompts per second", read: rate("poolhouse_prompts_total"), show: (value) => number(value, 1) },
  { title: "Milliseconds per request", read: mean("poolhouse_request_seconds"), show: (value) => number(value, 1) },
  { title: "Prompts that wait or run", read: (now) => now.get("poolhouse_queued_prompts") ?? 0, show: count },
];

/** The view; it stops asking once it is not on the page. */
export function server(models, version) {
  const cards = GAUGES.map(({ title }) => {
    const value = h("p", { class: "number large", text: "–" }), line = s("polyline", { points: "" });
    return { value, line, past: [], element: h("div", { class: "card" }, h("h2", { text: title }), value,
      s("svg", { viewBox: `0 0 ${KEPT} 20`, preserveAspectRatio: "none", "aria-hidden": "true" }, line)) };
  });
  const problem = h("p", { class: "problem", role: "alert", hidden: true });
  const element = h("section", { class: "server" }, h("h1", { text: "Server" }),
    h("p", { class: "about", text: `Poolhouse ${version}: its work in the last two minutes, and what it serves.` }),
    problem, h("div", { class: "cards" }, cards.map((card) => card.element)),
    h("h2", { text: "Models" }),
    table("Models", ["model", "tasks", "reads", "longest prompt", "prompts"], models.map((model) =>
      [model.id, model.tasks.join(", "), (model.modalities ?? []).join(", "), count(model.max_model_len), (model.prompts ?? []).join(", ") || "–"])));
  let before = null, then = 0;
  const tick = async () => {
    if (!element.isConnected) { before = null; return; }
    try {
      const now = sums((await ask("metrics")).reply), at = performance.now();
      if (before) GAUGES.forEach(({ read, show }, index) => {
        const card = cards[index], value = read(now, before, (at - then) / 1000);
        card.past = [...card.past, value].slice(-KEPT);
        const most = Math.max(...card.past) || 1;
        card.value.textContent = show(value);
        card.line.setAttribute("points", card.past.map((one, place) => `${place + KEPT - card.past.length},${number(19 - 18 * one / most).replace("−", "-")}`).join(" "));
      });
      [before, then, problem.hidden] = [now, at, true];
    } catch (error) {
      problem.textContent = `${error.title ?? "Problem"}: ${error.message}`;
      problem.hidden = false;
    }
    setTimeout(tick, 1000 * SECONDS);
  };
  return { element, begin: () => { if (!before) setTimeout(tick, 0); } };
}
