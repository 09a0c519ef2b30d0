// Elements: the only way by which this page shows text, so none of it is ever read as markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element. props: class, text, on (listeners), data, vars (custom properties), else attributes. Children may be texts. */
export function h(tag, props = {}, ...children) {
  return filled(document.createElement(tag), props, children);
}

/** The same of SVG. */
export function s(tag, props = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), props, children);
}

function filled(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") element.setAttribute("class", value);
    else if (name === "text") element.textContent = value;
    else if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name === "vars") for (const [key, one] of Object.entries(value)) element.style.setProperty(`--${key}`, one);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

let last = 0;
/** An id that no other element has. */
export const fresh = (word) => `${word}-${++last}`;

/** A number with so many digits behind the point; a true minus, so that columns stay aligned. */
export const number = (value, digits = 2) =>
  Number.isFinite(value) ? value.toFixed(digits).replace(/^-(?=[0.]*$)/, "").replace("-", "−") : String(value);

/** A count with thin blanks between thousands. */
export const count = (value) => String(Math.round(value)).replace(/\B(?=(\d{3})+$)/g, "\u202f");

export const plural = (amount, word) => `${count(amount)} ${word}${amount === 1 ? "" : "s"}`;

/** The beginning of a text in one line. */
export function short(text, length = 60) {
  const characters = Array.from(text.replace(/\s+/g, " ").trim());
  return characters.length > length ? `${characters.slice(0, length - 1).join("")}…` : characters.join("");
}

/** Lets the arrow keys walk through the cells of `container`, of which one at a time is in the order of tabs. */
export function roving(container, selector, columns = () => 1) {
  const cells = () => [...container.querySelectorAll(selector)];
  const first = container.querySelector(selector);
  if (first) first.tabIndex = 0;
  container.addEventListener("keydown", (event) => {
    const all = cells(), at = all.indexOf(event.target.closest(selector));
    if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns() }[event.key];
    const to = event.key === "Home" ? 0 : event.key === "End" ? all.length - 1 : step === undefined ? -1 : at + step;
    if (to < 0 || to >= all.length) return;
    event.preventDefault();
    all[to].focus();
  });
  container.addEventListener("focusin", (event) => {
    const cell = event.target.closest(selector);
    if (!cell) return;
    for (const other of container.querySelectorAll(`${selector}[tabindex="0"]`)) other.tabIndex = -1;
    cell.tabIndex = 0;
  });
}

/** Calls back with the cell that the pointer or the focus is on. */
export function pointed(container, selector, callback) {
  for (const event of ["pointerover", "focusin"])
    container.addEventListener(event, ({ target }) => {
      const cell = target.closest?.(selector);
      if (cell && container.contains(cell)) callback(cell);
    });
}

/** A table that scrolls within its own box; columns of numbers are aligned. rows: of texts, numbers and elements. */
export function table(caption, heads, rows) {
  const cell = (value, index) =>
    index === 0
      ? h("th", { scope: "row", dir: "auto" }, value)
      : h("td", { class: typeof value === "number" || /^[−\d][\d.\u202f−]*$/.test(value) ? "number" : null, dir: "auto" }, typeof value === "number" ? number(value, 3) : value);
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    h("table", { class: "plain" }, h("caption", { class: "unseen", text: caption }),
      h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col", text: head })))),
      h("tbody", {}, rows.map((row) => h("tr", {}, row.map(cell))))));
}

/** What is folded away until it is asked for; made only then. */
export function folded(title, make) {
  const details = h("details", { class: "folded" }, h("summary", { text: title }));
  details.addEventListener("toggle", () => { if (details.open && details.childElementCount === 1) details.append(make()); });
  return details;
}
