// Views: one per task; which of them a model can do, what each asks for, calls, and draws.

import { bars, colored, cutNote, detail, dot, ends, maxSim, names, picker, products, scale } from "./drawing.js";
import * as examples from "./examples.js";
import { choice, commaList, flag, pictures, text, texts } from "./fields.js";
import { count, folded, h, number, pointed, plural, roving, short, table } from "./dom.js";
import { axes, placed } from "./plane.js";

const does = (model, ...tasks) => tasks.some((task) => model.tasks.includes(task));
const seesPictures = (model) => model.modalities?.includes("image");
const readsTokens = (model) => does(model, "token_embed");

/** A problem with the fields that the page can tell itself. */
export class Missing extends Error {}

function needed(list, least, what, most = Infinity) {
  if (list.length < least) throw new Missing(least === 1 ? `Give ${what} first.` : `Give at least ${least} ${what}.`);
  if (list.length > most) throw new Missing(`Here are ${count(list.length)} ${what}; at most ${count(most)} can be drawn.`);
}

const cutField = () => flag({ label: "Cut texts that are too long", value: true });
const cutting = (values) => (values.cut ? { truncate_prompt_tokens: -1 } : {});

/** How texts are read, for models with prompts. */
function readAs(model) {
  const stored = [...new Set(model.prompts ?? [])];
  if (!stored.length) return {};
  const options = [["", "by default"], ...stored.map((name) => [name, name])];
  return { reading: choice({ label: "Read as", options }) };
}
const reading = (values) => (values.reading ? { prompt_name: values.reading } : {});

const quoted = (one) => `“${one}”`;

// -- one vector per text

const similarity = {
  id: "similarity",
  title: "Similarity",
  about: "How alike texts are: the cosine of each two vectors.",
  empty: "a table of every text with every other",
  can: (model) => does(model, "embed"),
  fields: (model) => ({ texts: texts({ label: "Texts", value: examples.ALIKE }), ...readAs(model), cut: cutField() }),
  async run(values, model, calls) {
    needed(values.texts, 2, "texts", 400);
    const reply = await calls.post("v1/embeddings", { input: [...values.texts], ...reading(values), ...cutting(values) });
    return { items: reply.data, unit: reply.data.map(({ embedding }) => unit(embedding)) };
  },
  draw({ items, unit: vectors }, { texts: given }) {
    const cosines = vectors.map((a) => vectors.map((b) => dot(a, b)));
    const pairs = cosines.flatMap((row, left) => row.slice(left + 1).map((value, over) => ({ value, left, right: left + 1 + over })));
    const colors = scale(pairs.map(({ value }) => value));
    const below = detail("Point at a cell, or walk through them with the arrow keys.");
    const dense = given.length > 10;
    const cells = h("table", { class: `heatmap${dense ? " dense" : ""}`, vars: { columns: given.length } },
      h("caption", { class: "unseen", text: "Cosine of each text with each other" }),
      h("thead", {}, h("tr", {}, h("td"), given.map((_, index) => h("th", { scope: "col", text: index + 1 })))),
      h("tbody", {}, cosines.map((row, left) => h("tr", {},
        h("th", { scope: "row" }, h("span", { class: "number", text: left + 1 }), " ", h("bdi", { text: short(given[left], 44) })),
        row.map((value, right) => h("td", {
          class: left === right ? "same" : colors.color(value), tabindex: -1, data: { left, right },
        }, h("span", { text: left === right ? "1" : number(value) })))))));
    roving(cells, "td[data-left]", () => given.length);
    pointed(cells, "td[data-left]", ({ dataset: { left, right } }) => {
      below.replaceChildren(h("b", { class: "number", text: number(cosines[left][right], 3) }), ` ${Number(left) + 1} `,
        h("bdi", { text: quoted(short(given[left], 90)) }), ` × ${Number(right) + 1} `, h("bdi", { text: quoted(short(given[right], 90)) }));
    });
    pairs.sort((a, b) => b.value - a.value);
    return [
      h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Similarities" }, cells), colors.legend(), below,
      folded("The most alike, as a table", () => table("The most alike", ["text", "text", "cosine"],
        pairs.slice(0, 50).map(({ value, left, right }) => [short(given[left]), short(given[right]), number(value, 3)]))),
      listOfCuts(items, given),
    ];
  },
};

function unit(vector) {
  const length = Math.sqrt(dot(vector, vector)) || 1;
  return vector.map((value) => value / length);
}

function listOfCuts(items, given) {
  const cut = items.map((item, index) => [item, index]).filter(([item]) => item.truncated);
  if (!cut.length) return null;
  return h("ul", { class: "cuts" }, cut.map(([item, index]) => h("li", {}, h("bdi", { text: quoted(short(given[index])) }), " ", cutNote(item))));
}

const map = {
  id: "map",
  title: "Map",
  about: "Texts on a plane, near each other where they are alike: the two directions in which the vectors differ most (PCA).",
  empty: "a map of the texts",
  can: (model) => does(model, "embed"),
  fields: (model) => ({ texts: texts({ label: "Texts", value: examples.TOPICS, rows: 14 }), ...readAs(model), cut: cutField() }),
  async run(values, model, calls) {
    needed(values.texts, 3, "texts", 2000);
    const reply = await calls.post("v1/embeddings", { input: [...values.texts], ...reading(values), ...cutting(values) });
    const vectors = reply.data.map(({ embedding }) => unit(embedding));
    return { items: reply.data, vectors, ...axes(vectors) };
  },
  draw({ items, vectors, points, shares }, { texts: given }) {
    const below = detail("Point at a text, or walk through them with the arrow keys, to see its nearest.");
    const plot = placed(points, given.map((one) => short(one, 28)), given);
    const dots = [...plot.querySelectorAll(".dot")];
    pointed(plot, ".dot", (chosen) => {
      const at = Number(chosen.dataset.index);
      const nearest = vectors.map((vector, index) => ({ index, value: dot(vector, vectors[at]) }))
        .filter(({ index }) => index !== at).sort((a, b) => b.value - a.value).slice(0, 3);
      dots.forEach((one, index) => {
        one.classList.toggle("chosen", index === at);
        one.classList.toggle("near", nearest.some((other) => other.index === index));
      });
      below.replaceChildren(h("bdi", { text: quoted(short(given[at], 110)) }), " nearest: ",
        ...nearest.flatMap(({ index, value }, place) => [place ? ", " : "", h("bdi", { text: quoted(short(given[index], 40)) }), ` ${number(value)}`]));
    });
    return [plot, h("p", { class: "legend", text: `Across ${number(100 * shares[0], 0)} %, up ${number(100 * shares[1], 0)} % of what differs.` }), below,
      folded("The places, as a table", () => table("Places", ["text", "across", "up"],
        given.map((one, index) => [short(one), number(points[index][0], 3), number(points[index][1], 3)]))),
      listOfCuts(items, given)];
  },
};

// -- a query and documents

const rerank = {
  id: "rerank",
  title: "Rerank",
  about: "Documents by how well they answer a query, best first.",
  empty: "the documents in order, each with its score",
  can: (model) => does(model, "embed", "token_embed") || model.model_type === "rerank",
  fields(model) {
    const modes = [["", "what the model is for"], ["dense", "one vector each"]];
    if (model.sparse) modes.push(["sparse", "sparse vectors"]);
    if (readsTokens(model)) modes.push(["colbert", "token vectors"]);
    if (model.sparse === "token") modes.push(["weighted", "all three"]);
    return {
      query: text({ label: "Query", value: examples.QUESTION }),
      texts: texts({ label: "Documents", value: examples.PASSAGES }),
      ...(does(model, "embed") ? { mode: choice({ label: "Compare", options: modes }) } : {}),
      cut: cutField(),
    };
  },
  async run(values, model, calls) {
    needed(values.texts, 1, "a document");
    const reply = await calls.post("rerank", {
      query: values.query, documents: [...values.texts], return_documents: false,
      ...(values.mode ? { mode: values.mode } : {}), ...cutting(values),
    });
    return reply.results;
  },
  draw(results, { texts: given }) {
    return [bars(results.map((item) => ({
      value: item.relevance_score, text: given[item.index],
      note: h("span", { class: "note" }, `given as ${item.index + 1}`, item.truncated ? "; " : "", cutNote(item)),
    })), { ...ends(results.map((item) => item.relevance_score)), ranked: true })];
  },
};

// -- a vector per token

/** The token vectors of texts or pictures, and what each row stands for. */
const tokenVectors = (calls, input, role, values = {}) =>
  calls.post("pooling", { input, task: "token_embed", input_type: role, return_tokens: true, ...cutting(values) });

/** The best product of each column, or the products of one row. */
const best = (matrix, row) => (matrix.length ? matrix[0].map((_, column) => row < 0 ? Math.max(...matrix.map((line) => line[column])) : matrix[row][column]) : []);

const words = {
  id: "words",
  title: "Words",
  about: "Which words of a document answer a query: each is coloured by its best product with a token of the query.",
  empty: "the documents, coloured word by word",
  can: readsTokens,
  fields: () => ({
    query: text({ label: "Query", value: examples.WHEN }),
    texts: texts({ label: "Documents", value: examples.BRIDGES, rows: 5 }),
    cut: cutField(),
  }),
  async run(values, model, calls) {
    needed(values.query.trim(), 1, "a query");
    needed(values.texts, 1, "a document");
    const query = await tokenVectors(calls, [values.query], "query", values);
    const documents = await tokenVectors(calls, [...values.texts], "document", values);
    return { query: query.data[0], documents: documents.data };
  },
  draw({ query, documents }, values, model) {
    // Of models that are for one vector per text, scores of token vectors are means.
    const mean = does(model, "embed") ? query.data.length : 1;
    const asked = names(values.query, query.tokens);
    const answered = documents.map((item, index) => {
      const matrix = products(query.data, item.data);
      return { item, index, matrix, score: maxSim(matrix) / mean, named: names(values.texts[index], item.tokens) };
    }).sort((a, b) => b.score - a.score);
    const shown = answered.flatMap(({ matrix, item }) => best(matrix, -1).filter((_, row) => item.tokens.spans[row][1] > 0));
    const colors = scale(shown);
    const list = h("ol", { class: "documents" }), whole = h("div");
    const below = detail("Point at a word, or choose a token of the query.");
    const draw = (row) => {
      list.replaceChildren(...answered.map(({ item, index, matrix, score }) => {
        const values_ = best(matrix, row);
        return h("li", {},
          h("p", { class: "score" }, h("span", { class: "number", text: number(score) }), h("span", { class: "note", text: `text ${index + 1}` }), cutNote(item)),
          colored(values.texts[index], item.tokens.spans, values_, colors.color, (at, word) => {
            const from = row >= 0 ? row : matrix.reduce((top, line, which) => (line[at] > matrix[top][at] ? which : top), 0);
            below.replaceChildren(h("b", { class: "number", text: number(values_[at], 3) }), " ", h("bdi", { text: quoted(word) }), " with ", h("bdi", { text: quoted(asked[from].name) }));
          }),
        );
      }));
      whole.replaceChildren(folded("As a table", () => table("Words", ["document", "word", "product"],
        answered.flatMap(({ index, matrix, named }) => best(matrix, row).map((value, at) => [String(index + 1), named[at].name, number(value, 3)])))));
    };
    draw(-1);
    return [picker("Tokens of the query", asked, draw), colors.legend(), below,
      h("p", { class: "hint", text: `A score is the ${mean > 1 ? "mean" : "sum"} of the best product of each token of the query.` }), list, whole];
  },
};

const seen = {
  id: "pictures",
  title: "Pictures",
  about: "Pictures and pages by how well they answer a query; of late-interaction models, lit where they do.",
  empty: "the pictures in order, lit where they answer",
  can: (model) => seesPictures(model) && does(model, "embed", "token_embed", "classify"),
  fields: () => ({
    query: text({ label: "Query", value: "Which month has the most rain?" }),
    pictures: pictures({ label: "Pictures", value: examples.pages() }),
  }),
  async run(values, model, calls) {
    needed(values.query.trim(), 1, "a query");
    needed(values.pictures, 1, "a picture");
    const documents = values.pictures.map(({ uri }) => ({ content: [{ type: "image_url", image_url: { url: uri } }] }));
    if (model.tasks[0] !== "token_embed") {
      const reply = await calls.post("rerank", { query: values.query, documents, return_documents: false });
      return { ranked: reply.results };
    }
    const query = await tokenVectors(calls, [values.query], "query");
    const read = await tokenVectors(calls, documents, "document");
    return { query: query.data[0], read: read.data };
  },
  draw({ ranked, query, read }, values) {
    if (ranked) return [bars(ranked.map((item) => ({
      value: item.relevance_score, label: values.pictures[item.index].name, picture: values.pictures[item.index].uri,
    })), { ...ends(ranked.map((item) => item.relevance_score)), ranked: true })];
    const asked = names(values.query, query.tokens);
    const pages = read.map((item, index) => {
      const matrix = products(query.data, item.data);
      return { picture: values.pictures[index], cells: cellsOf(item.tokens.pictures[0]), matrix, score: maxSim(matrix) };
    }).sort((a, b) => b.score - a.score);
    const below = detail("Point at a patch, or choose a token of the query.");
    const list = h("ol", { class: "pages" });
    const lights = [];
    for (const { picture, cells, matrix, score } of pages) {
      const lit = cells ? patches(picture, cells, below) : null;
      if (lit) lights.push({ ...lit, matrix, rows: cells.flat() });
      list.append(h("li", {}, h("p", { class: "score" }, h("span", { class: "number", text: number(score) }), " ", h("bdi", { text: picture.name })),
        lit ? lit.element : h("img", { src: picture.uri, alt: picture.name }),
        lit ? lit.table : h("p", { class: "hint", text: "The vectors of this model stand for no patches, so nothing is lit." })));
    }
    const draw = (row) => {
      const all = lights.map(({ matrix, rows }) => { const values_ = best(matrix, row); return rows.map((at) => values_[at]); });
      const colors = scale(all.flat());
      lights.forEach(({ light }, index) => light(all[index], colors));
    };
    draw(-1);
    return [picker("Tokens of the query", asked, draw), below, list];
  },
};

/** The rows of the cells of a picture, line by line; null where they are no grid. */
function cellsOf(place) {
  if (!place?.grid) return place?.cells ?? null;
  const [lines, columns] = place.grid;
  return Array.from({ length: lines }, (_, line) => Array.from({ length: columns }, (_, column) => place.rows[0] + line * columns + column));
}

/** A picture under a veil that is thin over patches with large products. */
function patches(picture, cells, below) {
  const rows = cells.length, columns = cells[0].length;
  const veil = h("canvas", { width: columns, height: rows, "aria-hidden": "true" });
  const element = h("div", { class: "lit" }, h("img", { src: picture.uri, alt: picture.name }), veil);
  let values = [], strongest = () => [];
  veil.addEventListener("pointermove", (event) => {
    const row = Math.min(Math.floor(rows * event.offsetY / veil.clientHeight), rows - 1);
    const column = Math.min(Math.floor(columns * event.offsetX / veil.clientWidth), columns - 1);
    below.replaceChildren(h("b", { class: "number", text: number(values[row * columns + column], 3) }), ` line ${row + 1}, column ${column + 1} of ${rows} × ${columns}`);
  });
  const listed = () => table(`Strongest patches of ${picture.name}`, ["line", "column", "product"], strongest());
  const shown = folded("The strongest patches, as a table", listed);
  return {
    element, table: shown,
    light(next, colors) {
      values = next;
      strongest = () => values.map((value, at) => ({ value, at })).sort((a, b) => b.value - a.value).slice(0, 12)
        .map(({ value, at }) => [String(Math.floor(at / columns) + 1), String(at % columns + 1), number(value, 3)]);
      if (shown.childElementCount > 1) shown.lastChild.replaceWith(listed());
      const context = veil.getContext("2d");
      const image = context.createImageData(columns, rows);
      values.forEach((value, at) => image.data.set([9, 40, 46, Math.round(225 * (1 - colors.share(value) ** 1.5))], 4 * at));
      context.putImageData(image, 0, 0);
    },
  };
}

// -- labels

const labelField = (value, more = "") => commaList({ label: "Labels", value, hint: `With commas between them.${more}` });

const labels = {
  id: "labels",
  title: "Labels",
  about: "The probability of each label of a text.",
  empty: "the labels of each text, likeliest first",
  can: (model) => does(model, "classify") && model.model_type !== "rerank",
  fields: (model) => ({
    texts: texts({ label: "Texts", value: examples.MOODS, rows: 5 }),
    ...(model.takes_labels ? {
      labels: labelField(examples.TONES, model.labels.length ? " None: the model's own." : ""),
      several: flag({ label: "Several labels may fit a text", value: false }),
    } : {}),
    cut: cutField(),
  }),
  async run(values, model, calls) {
    needed(values.texts, 1, "a text");
    // Models that judge whether one text follows from another have labels of their own besides.
    if (!model.labels.length && values.labels) needed(values.labels, 1, "a label");
    const own = values.labels?.length ? { labels: values.labels, multi_label: values.several } : {};
    return (await calls.post("classify", { input: [...values.texts], ...own, ...cutting(values) })).data;
  },
  draw(items, { texts: given, labels: asked }, model) {
    const called = asked?.length ? asked : model.labels;
    return [h("ul", { class: "documents" }, items.map((item, index) => {
      const all = item.probs.map((value, which) => ({ value, label: called[which] ?? `LABEL_${which}` })).sort((a, b) => b.value - a.value);
      return h("li", {}, h("p", { class: "given", dir: "auto", text: given[index] }), cutNote(item), shownFirst(all, 8, "labels", ends(all.map(({ value }) => value).concat(1))));
    }))];
  },
};

/** The first bars, and the others where they are asked for. */
function shownFirst(all, most, what, options) {
  return [bars(all.slice(0, most), options),
    all.length > most ? folded(`${count(all.length - most)} more ${what}`, () => bars(all.slice(most, 500), options)) : null];
}

const entities = {
  id: "entities",
  title: "Entities",
  about: "Parts of a text with labels: people, places, what the model knows.",
  empty: "the texts with what was found in them",
  can: (model) => does(model, "extract") || (model.tasks[0] === "token_classify" && model.labels?.length > 0),
  fields: (model) => does(model, "extract") ? {
    texts: texts({ label: "Texts", value: examples.PEOPLE, rows: 6 }),
    labels: labelField(examples.KINDS),
  } : {
    texts: texts({ label: "Texts", value: examples.PEOPLE, rows: 6 }),
    how: choice({ label: "Join tokens", options: [["simple", "simple"], ["first", "by words: first"], ["average", "by words: average"], ["max", "by words: max"], ["none", "not at all"]] }),
    cut: cutField(),
  },
  async run(values, model, calls) {
    needed(values.texts, 1, "a text");
    if (values.labels) {
      needed(values.labels, 1, "a label");
      return (await calls.post("v1/extract", { input: [...values.texts], labels: values.labels })).data;
    }
    return (await calls.post("classify_tokens", { input: [...values.texts], aggregation_strategy: values.how, ...cutting(values) })).data;
  },
  draw(items, { texts: given }) {
    const kinds = [...new Set(items.flatMap(({ entities: found }) => found.map(({ label }) => label)))].sort();
    const kind = (label) => `entity kind-${kinds.indexOf(label) % 6}`;
    return [h("ul", { class: "documents" }, items.map((item, index) => h("li", {},
      marked(given[index], item.entities, kind), cutNote(item),
      item.entities.length ? null : h("p", { class: "hint", dir: "auto", text: item.error?.message ?? "Nothing was found." })))),
    folded("As a table", () => table("Entities", ["part", "label", "score"],
      items.flatMap(({ entities: found }) => found.map((one) => [one.text, one.label, number(one.score, 3)]))))];
  },
};

function marked(given, found, kind) {
  const characters = Array.from(given);
  const element = h("p", { class: "marked", dir: "auto" });
  let at = 0;
  for (const { label, score, start, end } of found) {
    element.append(characters.slice(at, start).join(""),
      h("mark", { class: kind(label) }, h("bdi", { text: characters.slice(start, end).join("") }), h("span", { class: "kind", text: `${label} ${number(score)}` })));
    at = end;
  }
  element.append(characters.slice(at).join(""));
  return element;
}

const sparse = {
  id: "sparse",
  title: "Sparse",
  about: "What a text is found by: entries of the vocabulary with weights. Those that several texts have are bold.",
  empty: "the entries of each text, heaviest first",
  can: (model) => Boolean(model.sparse),
  fields: () => ({ texts: texts({ label: "Texts", value: examples.SPARSE, rows: 5 }), cut: cutField() }),
  async run(values, model, calls) {
    needed(values.texts, 1, "a text");
    return (await calls.post("pooling", { input: [...values.texts], task: "sparse", ...cutting(values) })).data;
  },
  draw(items, { texts: given }) {
    const seenIn = new Map();
    for (const { data } of items) for (const { token_id } of data) seenIn.set(token_id, (seenIn.get(token_id) ?? 0) + 1);
    const { most } = ends(items.flatMap(({ data }) => data.map(({ weight }) => weight)));
    return [h("ul", { class: "documents columns" }, items.map((item, index) => {
      const all = [...item.data].sort((a, b) => b.weight - a.weight).map(({ token, token_id, weight }) => ({
        value: weight, label: token ?? `#${token_id}`, class: seenIn.get(token_id) > 1 ? "shared" : null,
      }));
      return h("li", {}, h("p", { class: "given", dir: "auto", text: given[index] }), cutNote(item),
        h("p", { class: "hint", text: plural(all.length, all.length === 1 ? "entr" : "entr").replace(/entrs?$/, all.length === 1 ? "entry" : "entries") }),
        shownFirst(all, 16, "entries", { least: 0, most }));
    }))];
  },
};

export const VIEWS = [similarity, rerank, words, seen, labels, entities, sparse, map];
