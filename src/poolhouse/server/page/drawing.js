// Drawing: what several tasks show: a scale of colours, bars, coloured words, tokens to choose from.

import { h, number, pointed, roving } from "./dom.js";

const STEPS = 10;

/** A scale of colours from the smallest to the largest of these numbers; its ends are written in its legend. */
export function scale(values) {
  let lo = Infinity, hi = -Infinity;
  for (const value of values) {
    if (value < lo) lo = value;
    if (value > hi) hi = value;
  }
  if (!(lo < hi)) [lo, hi] = Number.isFinite(lo) ? [Math.min(lo, 0), Math.max(lo, 1)] : [0, 1];
  const share = (value) => Math.min(Math.max((value - lo) / (hi - lo), 0), 1);
  return {
    lo, hi, share,
    color: (value) => `heat heat-${Math.round(share(value) * STEPS)}`,
    legend: () => h("p", { class: "legend" }, h("span", { class: "number", text: number(lo) }),
      h("span", { class: "ramp", "aria-hidden": "true" }, Array.from({ length: STEPS + 1 }, (_, step) => h("i", { class: `heat-${step}` }))),
      h("span", { class: "number", text: number(hi) })),
  };
}

/** The line below a drawing that says what the pointer or the focus is on; its height never changes. */
export const detail = (hint) => h("p", { class: "detail", dir: "auto", "aria-live": "polite", text: hint });

/** Bars, in order. items: { value, label, note, text, class }. least, most: ends of the scale. */
export function bars(items, { least = 0, most = 1, digits = 3, ranked = false } = {}) {
  const width = most - least || 1;
  const zero = Math.min(Math.max((0 - least) / width, 0), 1);
  return h(ranked ? "ol" : "ul", { class: `bars${ranked ? " ranked" : ""}` }, items.map((item) => {
    const at = Math.min(Math.max((item.value - least) / width, 0), 1);
    const track = h("span", { class: "track", "aria-hidden": "true" },
      h("span", { class: `fill ${item.value < 0 ? "below" : ""}`, vars: { from: Math.min(zero, at), size: Math.abs(at - zero) } }));
    return h("li", { class: item.class },
      item.label !== undefined && h("bdi", { class: "name", dir: "auto", text: item.label }),
      track, h("span", { class: "number", text: number(item.value, digits) }),
      item.text !== undefined && h("p", { class: "text", dir: "auto" }, item.text),
      item.picture && h("img", { src: item.picture, alt: item.label ?? "" }),
      item.note);
  }));
}

/** The ends of a scale of bars: from 0, or below it, to 1, or the largest. */
export function ends(values) {
  // Not by the arguments of a call, which may be too many.
  const most = values.reduce((top, value) => Math.max(top, value), 0);
  const least = values.reduce((low, value) => Math.min(low, value), 0);
  return { least, most: most > 0 ? most : least < 0 ? 0 : 1 };
}

/** That a text was cut, where it was. */
export const cutNote = (item) => item?.truncated
  ? h("span", { class: "note", text: `cut: it has ${item.original_is_estimate ? "about " : ""}${item.original_tokens} tokens` })
  : null;

/** A text whose parts are coloured. spans: [start, end] in characters of Unicode, [0, 0] for none; values: one for each.

Parts that overlap, as the bytes of one character do, are one part with the largest value.
*/
export function colored(text, spans, values, colors, say) {
  const characters = Array.from(text);
  const parts = [];
  spans.map(([start, end], row) => ({ start, end, row })).filter(({ start, end }) => end > start)
    .sort((a, b) => a.start - b.start || a.end - b.end).forEach(({ start, end, row }) => {
      const before = parts.at(-1);
      if (before && start < before.end) {
        before.end = Math.max(before.end, end);
        if (values[row] > values[before.row]) before.row = row;
      } else parts.push({ start, end, row });
    });
  const element = h("p", { class: "colored", dir: "auto" });
  let at = 0;
  for (const { start, end, row } of parts) {
    element.append(characters.slice(at, start).join(""));
    const shown = characters.slice(start, end).join("");
    element.append(h("span", { class: colors(values[row]), tabindex: -1, data: { row }, text: shown }));
    at = end;
  }
  element.append(characters.slice(at).join(""));
  roving(element, "[data-row]");
  pointed(element, "[data-row]", (cell) => say(Number(cell.dataset.row), cell.textContent));
  return element;
}

/** The tokens of a query as buttons, of which one or none is chosen. shown: what each is called. */
export function picker(label, shown, choose) {
  const group = h("div", { class: "picker", role: "group", "aria-label": label });
  const all = h("button", { type: "button", "aria-pressed": "true", text: "all", data: { row: -1 } });
  const buttons = [all, ...shown.map(({ name, special }, row) =>
    h("button", { type: "button", "aria-pressed": "false", class: special ? "special" : null, data: { row }, dir: "auto", text: name }))];
  group.append(...buttons);
  group.addEventListener("click", ({ target }) => {
    const button = target.closest("button");
    if (!button) return;
    for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
    choose(Number(button.dataset.row));
  });
  return group;
}

/** What each row of token vectors is called: its part of the text, else its entry in the vocabulary. */
export function names(text, { strings, spans }) {
  const characters = Array.from(text);
  return strings.map((entry, row) => {
    const [start, end] = spans[row];
    if (end <= start) return { name: entry, special: true };
    return { name: characters.slice(start, end).join("").trim() || "␣", special: false };
  });
}

/** Products of the rows of two matrices: [rows of the first][rows of the second]. */
export const products = (left, right) => left.map((a) => right.map((b) => dot(a, b)));

export function dot(a, b) {
  let sum = 0;
  for (let index = 0; index < a.length; index++) sum += a[index] * b[index];
  return sum;
}

/** The sum of the best product of each row, late interaction's score. */
export const maxSim = (matrix) => matrix.reduce((sum, row) => sum + (row.length ? Math.max(...row) : 0), 0);
