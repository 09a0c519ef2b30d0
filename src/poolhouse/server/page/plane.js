// Plane: the two directions in which vectors differ most, and points on a plane with names that do not overlap.

import { dot } from "./drawing.js";
import { h, roving } from "./dom.js";

const ROUNDS = 300;

/** Principal components by the matrix of products of centred vectors, which is small where texts are few.

points: [texts][2], each direction from 0 to 1. shares: of the variance, of each direction.
*/
export function axes(vectors) {
  const mean = vectors[0].map((_, at) => vectors.reduce((sum, vector) => sum + vector[at], 0) / vectors.length);
  const centred = vectors.map((vector) => vector.map((value, at) => value - mean[at]));
  const gram = centred.map((a) => centred.map((b) => dot(a, b)));
  const total = gram.reduce((sum, row, at) => sum + row[at], 0) || 1;
  const shares = [], columns = [];
  for (let axis = 0; axis < 2; axis++) {
    const { value, direction } = largest(gram, axis);
    shares.push(Math.max(value, 0) / total);
    columns.push(direction.map((part) => part * Math.sqrt(Math.max(value, 0))));
    gram.forEach((row, left) => row.forEach((_, right) => { row[right] -= value * direction[left] * direction[right]; }));
  }
  const fitted = columns.map((column) => {
    const least = Math.min(...column), width = Math.max(...column) - least || 1;
    return column.map((value) => (value - least) / width);
  });
  return { points: vectors.map((_, at) => fitted.map((column) => column[at])), shares };
}

/** The largest eigenvalue of a symmetric matrix and its direction, by repeated products; the same at every run. */
function largest(matrix, axis) {
  let direction = matrix.map((_, at) => Math.sin((at + 1) * (axis + 1.7)));
  let value = 0;
  for (let round = 0; round < ROUNDS; round++) {
    const next = matrix.map((row) => dot(row, direction));
    const length = Math.sqrt(dot(next, next));
    if (length < 1e-12) return { value: 0, direction: direction.map(() => 0) };
    const unit = next.map((part) => part / length);
    const moved = unit.reduce((sum, part, at) => sum + Math.abs(part - direction[at]), 0);
    [direction, value] = [unit, length];
    if (moved < 1e-9) break;
  }
  // Of the two signs, the one whose largest part is positive.
  const peak = direction.reduce((top, part) => (Math.abs(part) > Math.abs(top) ? part : top), 0);
  return { value, direction: peak < 0 ? direction.map((part) => -part) : direction };
}

/** Points with names, at places that grow with the room; a name that would cover another is shown once it is pointed at. */
export function placed(points, names, whole) {
  const plot = h("div", { class: "plot", role: "group", "aria-label": "Map of the texts" });
  points.forEach(([x, y], index) => plot.append(h("button", {
    type: "button", class: "dot", tabindex: -1, data: { index }, "aria-label": whole[index],
    vars: { x, y: 1 - y },
  }, h("bdi", { class: "name", text: names[index] }))));
  roving(plot, ".dot");
  new ResizeObserver(() => {
    const dots = [...plot.querySelectorAll(".dot")], room = plot.getBoundingClientRect();
    const taken = dots.map((one) => shrunk(one.getBoundingClientRect(), 6));
    for (const { firstChild: label } of dots) {
      // Right of its dot, else left of it, else only when it is pointed at.
      label.classList.remove("crowded", "left");
      if (!free(label, taken, room)) label.classList.add("left");
      if (free(label, taken, room)) taken.push(label.getBoundingClientRect());
      else label.classList.add("crowded");
    }
  }).observe(plot);
  return plot;
}

const shrunk = ({ left, right, top, bottom }, by) => ({ left: left + by, right: right - by, top: top + by, bottom: bottom - by });

function free(label, taken, room) {
  const box = label.getBoundingClientRect();
  return box.left >= room.left && box.right <= room.right && taken.every((other) =>
    box.right < other.left || box.left > other.right || box.bottom < other.top || box.top > other.bottom);
}
