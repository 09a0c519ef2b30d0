// App: the frame around the tasks: which model, which task, the key, the theme; runs a task and shows what came.

import { ask, BASE, Calls, Failure, hasKey, LANGUAGES, program, useKey } from "./api.js";
import { count, h, plural } from "./dom.js";
import { server } from "./server.js";
import { Missing, VIEWS } from "./views.js";

const at = (id) => document.getElementById(id);
const main = at("main"), chooser = at("model"), tasks = at("tasks");
const SECONDS_TO_RETRY = 2;

let models = [], version = "";
// Tasks as they stand, by model and task, so that nothing is lost by looking at another.
const opened = new Map();
// What was last written into the fields of a task, for the same task of another model.
const written = new Map();

// -- start

async function start() {
  try {
    models = (await ask("v1/models")).reply.data;
    version = (await ask("version")).reply.version;
  } catch (error) {
    trouble(error);
    return;
  }
  chooser.replaceChildren(...models.map((model) => h("option", { value: model.id, text: model.id })));
  chooser.disabled = false;
  delete main.dataset.trouble;
  route();
  // Left out by --disable-fastapi-docs; with keys set, a link cannot show one.
  at("docs").hidden = !(await fetch(new URL("docs", BASE), { method: "HEAD" }).catch(() => ({ ok: false }))).ok;
}

/** The server gives no list of models: it loads, wants a key, or is gone. */
function trouble(error) {
  const waiting = error.status === 503 || error.status === 0;
  const title = error.status === 401 ? "The server wants a key" : waiting ? "Not ready yet" : "The server refused";
  // What is asked again and answered alike is not said again.
  if (main.dataset.trouble !== title + error.message) main.replaceChildren(h("h1", { text: title }), problem(error));
  main.dataset.trouble = title + error.message;
  if (waiting) setTimeout(start, 1000 * SECONDS_TO_RETRY);
  if (error.status === 401) showKey(true);
}

const problem = (error) => h("div", { class: "problem", role: "alert" },
  h("b", { text: error.title ?? "Problem" }), h("p", { dir: "auto", text: error.message }));

// -- model and task, both in the address: #task/model

function route() {
  const [task, name] = location.hash.slice(1).split("/").map((part) => { try { return decodeURIComponent(part); } catch { return ""; } });
  const model = models.find(({ id }) => id === name) ?? models[0];
  chooser.value = model.id;
  const able = VIEWS.filter((view) => view.can(model));
  const view = task === "server" ? null : able.find(({ id }) => id === task) ?? able[0] ?? null;
  const link = (id, title) => h("li", {}, h("a", {
    href: address(id, model), "aria-current": id === (view?.id ?? "server") ? "page" : null, text: title,
  }));
  tasks.replaceChildren(...able.map(({ id, title }) => link(id, title)), link("server", "Server"));
  at("facts").textContent = `${model.tasks.join(", ")} · up to ${count(model.max_model_len)} tokens`;
  document.title = `${view?.title ?? "Server"} · ${model.id} · Poolhouse`;
  const place = `${model.id}\n${view?.id}`;
  if (!opened.has(place)) opened.set(place, view ? task_(view, model) : server(models, version));
  const shown = opened.get(place);
  if (main.firstElementChild !== shown.element) main.replaceChildren(shown.element);
  shown.begin?.();
  tasks.querySelector("[aria-current]")?.scrollIntoView({ block: "nearest", inline: "nearest" });
}

const address = (task, model) => `#${encodeURIComponent(task)}/${encodeURIComponent(model.id)}`;

// -- one task of one model

function task_(view, model) {
  const fields = view.fields(model);
  for (const [name, value] of Object.entries(written.get(view.id) ?? {})) fields[name]?.set(value);
  const run = h("button", { type: "submit", class: "primary", text: "Run" });
  const status = h("p", { class: "status", role: "status" });
  const result = h("div", { class: "result" }, h("p", { class: "empty", text: `Run shows ${view.empty}.` }));
  const code = h("div", { class: "calls", hidden: true });
  let running = null;

  async function submit(event) {
    event.preventDefault();
    if (running) { running.abort(); return; }
    const values = Object.fromEntries(Object.entries(fields).map(([name, field]) => [name, field.value()]));
    written.set(view.id, values);
    running = new AbortController();
    const calls = new Calls(model.id, running.signal);
    const late = setTimeout(() => { run.textContent = "Stop"; output.setAttribute("aria-busy", "true"); }, 250);
    let shown, said = "";
    try {
      shown = view.draw(await view.run(values, model, calls), values, model);
      said = [plural(calls.tokens, "token"), `${calls.ms < 10 ? calls.ms.toFixed(1) : count(calls.ms)} ms`,
        calls.cut ? `${count(calls.cut)} cut` : "nothing cut"].join(" · ");
    } catch (error) {
      if (error.name === "AbortError") [shown, said] = [null, "Stopped."];
      else if (error instanceof Missing || error instanceof Failure) shown = [problem(error)];
      else { shown = [problem({ title: "This page failed", message: String(error) })]; console.error(error); }
      if (error.status === 401) showKey(true);
    } finally {
      clearTimeout(late);
      running = null;
      run.textContent = "Run";
      output.removeAttribute("aria-busy");
    }
    status.textContent = said;
    if (shown) result.replaceChildren(...shown.flat(Infinity).filter(Boolean));
    if (calls.made.length) { code.hidden = false; code.replaceChildren(...programs(calls.made)); }
  }

  const form = h("form", { class: "inputs", on: { submit, keydown: (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  } } }, Object.values(fields).map((field) => field.element),
    h("div", { class: "actions" }, run, h("span", { class: "hint", text: "or Ctrl + Enter" })));
  const output = h("section", { class: "output", "aria-label": "Result" }, status, result, code);
  return {
    element: h("div", { class: "task" }, h("h1", { text: view.title }), h("p", { class: "about", text: view.about }),
      h("div", { class: "work" }, form, output)),
  };
}

/** The calls that were made, as programs make them. */
function programs(calls) {
  const shown = h("pre", { tabindex: 0, "aria-label": "The same as a program" });
  let language = LANGUAGES[0];
  const buttons = LANGUAGES.map((name) => h("button", { type: "button", text: name, on: { click: () => choose(name) } }));
  const choose = (name) => {
    language = name;
    shown.textContent = program(name, calls);
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.textContent === name));
  };
  const copy = h("button", { type: "button", class: "copy", text: "Copy", on: { click: async () => {
    try { await navigator.clipboard.writeText(program(language, calls, true)); copy.textContent = "Copied"; }
    catch { getSelection().selectAllChildren(shown); copy.textContent = "Selected"; }
    setTimeout(() => { copy.textContent = "Copy"; }, 1500);
  } } });
  choose(language);
  return [h("h2", { text: calls.length > 1 ? "These calls" : "This call" }),
    h("div", { class: "languages", role: "group", "aria-label": "Language" }, buttons, copy), shown];
}

// -- key and theme

const keyButton = at("key-button"), keyPanel = at("key-panel"), keyField = at("key");

function showKey(open) {
  keyPanel.hidden = !open;
  keyButton.setAttribute("aria-expanded", String(open));
  if (open) keyField.focus();
}
const tellKey = () => { keyButton.textContent = hasKey() ? "Key ✓" : "Key"; };
keyButton.addEventListener("click", () => showKey(keyPanel.hidden));
keyPanel.addEventListener("keydown", (event) => { if (event.key === "Escape") { showKey(false); keyButton.focus(); } });
keyPanel.addEventListener("submit", (event) => { event.preventDefault(); changeKey(keyField.value); });
at("forget").addEventListener("click", () => changeKey(""));

function changeKey(value) {
  useKey(value);
  keyField.value = "";
  tellKey();
  showKey(false);
  keyButton.focus();
  if (!models.length) start();
}

const THEMES = ["auto", "light", "dark"];
const themeButton = at("theme");
const tellTheme = () => {
  const { theme } = document.documentElement.dataset;
  themeButton.textContent = theme[0].toUpperCase() + theme.slice(1);
  themeButton.setAttribute("aria-label", `${themeButton.textContent} theme`);
};
themeButton.addEventListener("click", () => {
  const root = document.documentElement;
  root.dataset.theme = THEMES[(THEMES.indexOf(root.dataset.theme) + 1) % THEMES.length];
  try { localStorage.setItem("poolhouse-theme", root.dataset.theme); } catch { /* private windows */ }
  tellTheme();
});

chooser.addEventListener("change", () => {
  const task = location.hash.slice(1).split("/")[0] || "similarity";
  location.hash = address(task, { id: chooser.value });
});
addEventListener("hashchange", route);
tellKey();
tellTheme();
start();
