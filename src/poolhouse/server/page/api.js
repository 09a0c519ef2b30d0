// Calls: requests to the server that gave this page, with the key if there is one, and its errors as it words them.

/** The address that all paths are relative to, behind any prefix of a proxy. */
export const BASE = new URL(".", location.origin + location.pathname);

let key = sessionStorage.getItem("poolhouse-key") || "";
export const hasKey = () => key !== "";
export function useKey(value) {
  key = value.trim();
  if (key) sessionStorage.setItem("poolhouse-key", key);
  else sessionStorage.removeItem("poolhouse-key");
}

/** What the server refused, or why it could not be asked. status: 0 where no answer came. */
export class Failure extends Error {
  constructor(status, title, message) {
    super(message);
    this.status = status;
    this.title = title;
  }
}

/** The answer to a call: `reply` is its JSON, or its text; `ms` the time until all of it was here. */
export async function ask(path, body = undefined, signal = undefined) {
  const started = performance.now();
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer, text;
  try {
    answer = await fetch(new URL(path, BASE), {
      method: body === undefined ? "GET" : "POST", headers, signal, cache: "no-store", credentials: "same-origin",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
    text = await answer.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(0, "No answer", `The server at ${BASE.href} did not answer: ${error.message}`);
  }
  const ms = performance.now() - started;
  let reply = text;
  if ((answer.headers.get("content-type") || "").startsWith("application/json")) {
    try { reply = JSON.parse(text); } catch { /* shown as it came */ }
  }
  if (!answer.ok) throw new Failure(answer.status, `${answer.status} ${answer.statusText}`.trim(), worded(reply));
  return { reply, ms };
}

/** The message of an error in any of the server's shapes; else all that came. */
function worded(reply) {
  if (typeof reply === "string") return reply || "The server said no more.";
  const message = reply.message ?? reply.error?.message ?? reply.error ?? reply.detail;
  return typeof message === "string" ? message : JSON.stringify(reply, null, 2);
}

/** A series of calls to one model: their bodies, tokens, time, and what was cut. */
export class Calls {
  constructor(model, signal) {
    Object.assign(this, { model, signal, made: [], tokens: 0, ms: 0, cut: 0 });
  }

  async post(path, fields) {
    const body = { model: this.model, ...fields };
    this.made.push({ path, body });
    const { reply, ms } = await ask(path, body, this.signal);
    const items = reply.data ?? reply.results ?? [];
    this.ms += ms;
    this.tokens += reply.usage?.prompt_tokens ?? reply.usage?.total_tokens ?? 0;
    this.cut += items.filter((item) => item.truncated).length;
    return reply;
  }
}

// The longest text of a call that is shown in full; pictures are longer. A copy has all of it.
const SHOWN = 400;
const shortened = (value) => typeof value === "string" && value.startsWith("data:") && value.length > SHOWN
  ? `${value.slice(0, 40)}…` : value;

/** Calls as a program makes them. whole: with pictures in full, which are else cut. */
export function program(language, calls, whole = false) {
  const { head, write, join } = WRITERS[language];
  const written = calls.map((call) => write(new URL(call.path, BASE).href, whole ? call.body : mapped(call.body)));
  return head() + (written.length > 1 && join ? written.map(join) : written).join("\n\n");
}

function mapped(value) {
  if (Array.isArray(value)) return value.map(mapped);
  if (value && typeof value === "object")
    return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, mapped(one)]));
  return shortened(value);
}

const indented = (text, by) => text.replace(/\n/g, `\n${by}`);
const shell = (text) => `'${text.replace(/'/g, `'\\''`)}'`;

/** JSON as Python writes it; texts are the same in both, but for halves of a surrogate pair. */
function python(value, indent = "") {
  const deeper = `${indent}    `;
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const parts = Array.isArray(value)
    ? value.map((one) => python(one, deeper))
    : Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${python(one, deeper)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  return parts.length ? `${open}\n${parts.map((part) => `${deeper}${part},\n`).join("")}${indent}${close}` : open + close;
}

const WRITERS = {
  curl: {
    head: () => "",
    write(url, body) {
      const lines = [`curl -s ${shell(url)}`, `-H 'Content-Type: application/json'`];
      if (key) lines.push(`-H "Authorization: Bearer $POOLHOUSE_API_KEY"`);
      return [...lines, `-d ${shell(JSON.stringify(body, null, 2))}`].join(" \\\n  ");
    },
  },
  Python: {
    head: () => `${key ? "import os\n\n" : ""}import httpx\n\n`,
    write(url, body) {
      const auth = key ? `    headers={"Authorization": f"Bearer {os.environ['POOLHOUSE_API_KEY']}"},\n` : "";
      return `reply = httpx.post(
    ${JSON.stringify(url)},
${auth}    json=${python(body, "    ")},
    timeout=60,
)
reply.raise_for_status()
print(reply.text)`;
    },
  },
  JavaScript: {
    head: () => "",
    // Each in a block of its own, so that names may come again.
    join: (text) => `{\n  ${indented(text, "  ")}\n}`,
    write(url, body) {
      const auth = key ? "\n    Authorization: `Bearer ${process.env.POOLHOUSE_API_KEY}`," : "";
      return `const reply = await fetch(${JSON.stringify(url)}, {
  method: "POST",
  headers: {
    "Content-Type": "application/json",${auth}
  },
  body: JSON.stringify(${indented(JSON.stringify(body, null, 2), "  ")}),
});
if (!reply.ok) throw new Error(await reply.text());
console.log(await reply.text());`;
    },
  },
};
export const LANGUAGES = Object.keys(WRITERS);
