// Fields: what a task asks its user for. Each is { element, value(), set(value) }.

import { fresh, h, plural } from "./dom.js";

/** One text. */
export function text({ label, value, hint }) {
  const id = fresh("field");
  const area = h("textarea", { id, rows: 2, dir: "auto", spellcheck: "false" });
  area.value = value;
  return {
    element: h("div", { class: "field" }, h("label", { for: id, text: label }), area, hint && h("p", { class: "hint", text: hint })),
    value: () => area.value,
    set: (next) => { area.value = next; },
  };
}

/** Short names in one line, with commas between them. */
export function commaList({ label, value, hint }) {
  const id = fresh("field");
  const input = h("input", { id, type: "text", dir: "auto", spellcheck: "false", autocomplete: "off", "aria-describedby": `${id}-hint` });
  const set = (next) => { input.value = next.join(", "); };
  set(value);
  return {
    element: h("div", { class: "field" }, h("label", { for: id, text: label }), input, h("p", { id: `${id}-hint`, class: "hint", text: hint })),
    value: () => [...new Set(input.value.split(/[,，、،]/).map((one) => one.trim()).filter((one) => one !== ""))],
    set,
  };
}

/** Several texts, one per line, or with blank lines between them. */
export function texts({ label, value, rows = 9 }) {
  const id = fresh("field");
  const area = h("textarea", { id, rows, dir: "auto", spellcheck: "false" });
  const split = h("select", { "aria-label": `${label}: what divides them` },
    h("option", { value: "line", text: "one per line" }), h("option", { value: "blank", text: "blank lines between" }));
  const amount = h("span", { class: "amount" });
  const read = () => area.value.split(split.value === "line" ? /\r?\n/ : /(?:\r?\n[ \t]*){2,}/)
    .map((one) => one.trim()).filter((one) => one !== "");
  const tell = () => { amount.textContent = plural(read().length, "text"); };
  area.addEventListener("input", tell);
  split.addEventListener("change", tell);
  const set = ({ content, by }) => { area.value = content; split.value = by; tell(); };
  set(Array.isArray(value) ? { content: value.join("\n"), by: "line" } : value);
  return {
    element: h("div", { class: "field" },
      h("div", { class: "label" }, h("label", { for: id, text: label }), amount, split), area),
    value: () => Object.assign(read(), { content: area.value, by: split.value }),
    set: (next) => set({ content: next.content, by: next.by }),
  };
}

/** One of several. options: [value, what is shown]. */
export function choice({ label, options, value = options[0][0] }) {
  const id = fresh("field");
  const select = h("select", { id }, options.map(([name, shown]) => h("option", { value: name, text: shown })));
  const set = (next) => { if (options.some(([name]) => name === next)) select.value = next; };
  set(value);
  return {
    element: h("div", { class: "field row" }, h("label", { for: id, text: label }), select),
    value: () => select.value,
    set,
  };
}

/** Yes or no. */
export function flag({ label, value }) {
  const box = h("input", { type: "checkbox" });
  box.checked = value;
  return {
    element: h("label", { class: "field row flag" }, box, h("span", { text: label })),
    value: () => box.checked,
    set: (next) => { box.checked = next; },
  };
}

const AT_MOST = 16;

/** Pictures, as data URIs with names. value: those to begin with. */
export function pictures({ label, value }) {
  const id = fresh("field");
  let held = value;
  const list = h("ul", { class: "thumbs" });
  const input = h("input", { id, type: "file", accept: "image/*", multiple: true });
  const amount = h("span", { class: "amount" });
  const draw = () => {
    amount.textContent = plural(held.length, "picture");
    list.replaceChildren(...held.map((picture) => h("li", {},
      h("img", { src: picture.uri, alt: picture.name }),
      h("button", { type: "button", "aria-label": `Remove ${picture.name}`, text: "×", on: { click: () => {
        held = held.filter((other) => other !== picture);
        draw();
        input.focus();
      } } }))));
  };
  const add = async (files) => {
    const read = await Promise.all([...files].filter((file) => file.type.startsWith("image/")).map(read_));
    held = [...held, ...read].slice(-AT_MOST);
    draw();
  };
  input.addEventListener("change", async () => { await add(input.files); input.value = ""; });
  const element = h("div", { class: "field" }, h("div", { class: "label" }, h("label", { for: id, text: label }), amount), input, list);
  element.addEventListener("dragover", (event) => event.preventDefault());
  element.addEventListener("drop", (event) => { event.preventDefault(); add(event.dataTransfer.files); });
  element.addEventListener("paste", (event) => { if (event.clipboardData.files.length) add(event.clipboardData.files); });
  draw();
  return { element, value: () => held, set: (next) => { held = next; draw(); } };
}

const read_ = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve({ name: file.name, uri: reader.result });
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(file);
});
