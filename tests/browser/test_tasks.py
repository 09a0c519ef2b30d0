"""Each task of the page shows what the server answers, held against the server's own scores and numpy."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.browser.conftest import Opener
from tests.server.sockets import wait_until


def ask(url: str, path: str, **body: Any) -> Any:
    reply = httpx.post(f"{url}/{path}", json=body, timeout=60, trust_env=False)
    assert reply.status_code == 200, reply.text
    return reply.json()


def read(text: str) -> float:
    """A number as the page writes it."""
    return float(text.replace("−", "-"))


def given(opened: Any, label: str) -> list[str]:
    """The texts in a field."""
    return str(opened.page.get_by_label(label, exact=True).input_value()).splitlines()


def unit(url: str, texts: list[str]) -> Any:
    vectors = np.array(
        [item["embedding"] for item in ask(url, "v1/embeddings", model="all-MiniLM-L6-v2", input=texts)["data"]]
    )
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_similarities_are_cosines(opened: Opener, url: str) -> None:
    shown = opened(url).task("similarity", "all-MiniLM-L6-v2").run()
    texts = given(shown, "Texts")
    cosines = unit(url, texts) @ unit(url, texts).T
    cells = np.array([read(text) for text in shown.texts(".heatmap td[data-left]")]).reshape(len(texts), len(texts))
    assert np.abs(cells - cosines).max() < 0.0051
    # Each colour is that of its value, from the least to the most alike.
    steps = [int(re.findall(r"heat-(\d+)", one)[0]) for one in shown.page.eval_on_selector_all(
        ".heatmap td.heat", "all => all.map((one) => one.className)")]  # fmt: skip
    between = cosines[~np.eye(len(texts), dtype=bool)]
    expected = np.round(10 * (between - between.min()) / np.ptp(between))
    assert np.abs(np.array(steps) - expected).max() <= 1
    assert (min(steps), max(steps)) == (0, 10)
    tokens = ask(url, "v1/embeddings", model="all-MiniLM-L6-v2", input=texts)["usage"]["prompt_tokens"]
    assert re.fullmatch(rf"{tokens} tokens · [\d.\u202f]+ ms · nothing cut", shown.page.inner_text(".status"))


def test_the_most_alike_are_a_table_too(opened: Opener, url: str) -> None:
    shown = opened(url).task("similarity", "all-MiniLM-L6-v2").run()
    shown.unfold("The most alike, as a table")
    values = [read(text) for text in shown.texts(".result .plain td.number")]
    assert len(values) == 8 * 7 / 2
    assert values == sorted(values, reverse=True)


def test_prompts_of_a_model_may_be_chosen(opened: Opener, url: str) -> None:
    shown = opened(url).task("similarity", "with-prompts")
    shown.page.get_by_label("Read as").select_option("query")
    shown.run()
    assert json.loads(sent(shown)[-1])["prompt_name"] == "query"


def sent(shown: Any) -> list[str]:
    return [one.post_data for one in shown.asked if one.method == "POST"]


@pytest.mark.parametrize(
    ("model", "mode"), [("all-MiniLM-L6-v2", ""), ("all-MiniLM-L6-v2", "colbert"), ("reranker", "")]
)
def test_documents_are_ranked_by_their_scores(opened: Opener, url: str, model: str, mode: str) -> None:
    shown = opened(url).task("rerank", model)
    if mode:
        shown.page.get_by_label("Compare").select_option(mode)
    shown.run()
    (query,), documents = given(shown, "Query"), given(shown, "Documents")
    scores = [
        item["score"]
        for item in ask(
            url, "score", model=model, queries=query, documents=documents, **({"mode": mode} if mode else {})
        )["data"]
    ]
    order = np.argsort(-np.array(scores), kind="stable")
    assert shown.texts(".ranked .text") == [documents[index] for index in order]
    values = [read(text) for text in shown.texts(".ranked .number")]
    assert np.abs(np.array(values) - np.array(scores)[order]).max() < 0.00051
    assert shown.texts(".ranked .note") == [f"given as {index + 1}" for index in order]


@pytest.mark.parametrize(("model", "mode"), [("colbert", None), ("all-MiniLM-L6-v2", "colbert")])
def test_words_are_coloured_and_add_up_to_the_score(opened: Opener, url: str, model: str, mode: str | None) -> None:
    shown = opened(url).task("words", model).run()
    (query,), documents = given(shown, "Query"), given(shown, "Documents")
    more = {} if mode is None else {"mode": mode}
    scores = [
        item["score"] for item in ask(url, "score", model=model, queries=query, documents=documents, **more)["data"]
    ]
    order = np.argsort(-np.array(scores), kind="stable")
    assert shown.texts(".documents .colored") == [documents[index] for index in order]
    values = [read(text) for text in shown.texts(".documents .score .number")]
    assert np.abs(np.array(values) - np.array(scores)[order]).max() < 0.0051
    # A token of the query alone: other colours, and the detail names it.
    before = shown.page.inner_html(".documents")
    shown.page.locator(".picker button", has_text="bridge").first.click()
    assert shown.page.inner_html(".documents") != before
    shown.page.locator(".colored [data-row]").first.hover()
    assert "with “bridge”" in shown.page.inner_text(".detail")


def test_words_of_every_script_stay_whole(opened: Opener, url: str) -> None:
    texts = ["naïve 🙂🙃 café", "潮はなぜ満ちるのか。", "لماذا يحدث المد والجزر؟", "👩‍👩‍👧 family", "a\u0301 combined"]
    shown = opened(url).task("words", "all-MiniLM-L6-v2")
    shown.page.get_by_label("Documents", exact=True).fill("\n".join(texts))
    shown.run()
    assert sorted(shown.page.locator(".colored").all_text_contents()) == sorted(texts)
    tokens = [
        shown.page.locator(".colored", has_text=text[:4]).locator("[data-row]").all_text_contents()
        for text in texts[1:3]
    ]
    assert "".join(tokens[0]) == texts[1]
    assert tokens[1] == re.findall(r"\w+|[^\w\s]", texts[2]) or "".join(tokens[1]) == texts[2].replace(" ", "")


def test_entities_stand_in_their_text(opened: Opener, url: str) -> None:
    shown = opened(url).task("entities", "ner").run()
    assert shown.page.locator("mark bdi").all_text_contents() == ["Marie Curie", "Warsaw"]
    first = shown.page.locator(".marked").first.text_content()
    assert first == "Marie CuriePER 1.00 was born in WarsawLOC 1.00 and worked in Paris."


def test_entities_of_the_labels_in_the_field(opened: Opener, url: str) -> None:
    shown = opened(url).task("entities", "gliner")
    shown.page.get_by_label("Texts", exact=True).fill("the bank of england\nnew york rating")
    shown.page.get_by_label("Labels", exact=True).fill(" person ,loc、 org,, person")
    shown.run()
    (body,) = map(json.loads, sent(shown))
    assert body["labels"] == ["person", "loc", "org"]
    items = ask(url, "v1/extract", **body)["data"]
    found = [part for item in items for part in item["entities"]]
    assert found, "the test needs a model that finds something"
    assert shown.page.locator("mark bdi").all_text_contents() == [part["text"] for part in found]
    assert shown.page.locator("mark .kind").all_text_contents() == [
        f"{part['label']} {part['score']:.2f}" for part in found
    ]
    assert [re.sub(r"(person|loc|org) \d\.\d\d", "", text or "") for text in
            shown.page.locator(".marked").all_text_contents()] == body["input"]  # fmt: skip
    shown.page.get_by_label("Labels", exact=True).fill(" , ")
    shown.run()
    assert shown.texts(".result .problem p") == ["Give a label first."]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("model", ["gliclass", "nli"])
def test_bars_of_the_labels_in_the_field(opened: Opener, url: str, model: str, several: bool) -> None:
    shown = opened(url).task("labels", model)
    shown.page.get_by_label("Texts", exact=True).fill("what a fine day\nthe sea w1 w2 w3")
    shown.page.get_by_label("Labels", exact=True).fill("w7 w8, bread, the moon")
    shown.page.get_by_label("Several labels may fit a text").set_checked(several)
    shown.run()
    asked = ["w7 w8", "bread", "the moon"]
    fields = {"model": model, "input": given(shown, "Texts"), "labels": asked, "multi_label": several}
    items = ask(url, "classify", **fields)["data"]
    bars = [list(zip(one[::2], map(read, one[1::2]), strict=True)) for one in (
        item.locator(".bars .name, .bars .number").all_inner_texts() for item in
        shown.page.locator(".documents > li").all())]  # fmt: skip
    for item, drawn in zip(items, bars, strict=True):
        expected = dict(zip(asked, item["probs"], strict=True))
        assert sorted(label for label, _ in drawn) == sorted(asked)
        assert [value for _, value in drawn] == sorted((value for _, value in drawn), reverse=True)
        assert max(abs(expected[label] - value) for label, value in drawn) < 0.00051
        assert several or abs(sum(item["probs"]) - 1) < 1e-4


def test_without_labels_a_model_has_its_own_or_none(opened: Opener, url: str) -> None:
    shown = opened(url).task("labels", "nli")
    shown.page.get_by_label("Labels", exact=True).fill("")
    shown.run()
    assert set(shown.texts(".bars .name")) == {"contradiction", "neutral", "entailment"}
    shown.page.locator("#model").select_option("gliclass")
    wait_until(lambda: "gliclass" in shown.page.title(), "the model")
    shown.run()
    assert shown.texts(".result .problem p") == ["Give a label first."]


def test_labels_are_the_likeliest_first(opened: Opener, url: str) -> None:
    shown = opened(url).task("labels", "classifier").run()
    texts = given(shown, "Texts")
    items = ask(url, "classify", model="classifier", input=texts)["data"]
    labels = ("calm", "angry", "glad")
    expected = [sorted(zip(item["probs"], labels, strict=True), reverse=True) for item in items]
    assert shown.texts(".bars .name") == [label for item in expected for _, label in item]
    values = [read(text) for text in shown.texts(".bars .number")]
    assert np.abs(np.array(values) - [value for item in expected for value, _ in item]).max() < 0.00051


@pytest.mark.parametrize("model", ["splade", "bge-m3"])
def test_sparse_entries_are_the_heaviest_first(opened: Opener, url: str, model: str) -> None:
    shown = opened(url).task("sparse", model).run()
    texts = given(shown, "Texts")
    items = ask(url, "pooling", model=model, input=texts, task="sparse")["data"]
    for place, item in enumerate(items):
        entries = sorted(item["data"], key=lambda one: -one["weight"])
        part = shown.page.locator(".documents > li").nth(place)
        names = part.locator(".bars").first.locator(".name").all_text_contents()
        assert names == [one["token"] for one in entries[:16]]
        shared = {one["token"] for other in items if other is not item for one in other["data"]}
        bold = part.locator(".bars").first.locator(".shared .name").all_text_contents()
        assert bold == [name for name in names if name in shared]


def test_pages_are_ranked_and_lit_by_the_query(opened: Opener, url: str, tmp_path: Path) -> None:
    names = []
    for name, colour in (("red", (200, 10, 10)), ("half", (10, 10, 200))):
        picture = Image.new("RGB", (160, 96), "white")
        picture.paste(colour, (0, 0, 80, 96))
        picture.save(tmp_path / f"{name}.png")
        names.append(f"{name}.png")
    shown = opened(url).task("pictures", "colqwen3")
    for _ in range(3):
        shown.page.get_by_role("button", name=re.compile("^Remove ")).first.click()
    shown.page.get_by_label("Pictures", exact=True).set_input_files([str(tmp_path / name) for name in names])
    shown.page.locator(".thumbs li").nth(1).wait_for()
    shown.run()
    documents = json.loads(sent(shown)[-1])["input"]
    (query,) = given(shown, "Query")
    ranked = ask(url, "rerank", model="colqwen3", query=query, documents=documents)["results"]
    assert shown.texts(".pages .score bdi") == [names[item["index"]] for item in ranked]
    values = [read(text) for text in shown.texts(".pages .score .number")]
    assert np.abs(np.array(values) - [item["relevance_score"] for item in ranked]).max() < 0.0051
    # The veil is thinnest over the patch with the largest product, which the table names.
    shown.unfold("The strongest patches, as a table")
    line, column = (
        int(read(text))
        for text in shown.page.locator(".pages .plain tbody tr").first.locator("th, td").all_text_contents()[:2]
    )
    alpha = np.array(
        shown.page.locator(".lit canvas").first.evaluate(
            "(veil) => { const all = veil.getContext('2d').getImageData(0, 0, veil.width, veil.height);"
            " return [veil.height, veil.width, ...all.data.filter((_, at) => at % 4 === 3)]; }"
        )
    )
    rows, columns, veil = alpha[0], alpha[1], alpha[2:].reshape(alpha[0], alpha[1])
    assert columns > rows > 1
    assert veil[line - 1, column - 1] == veil.min() < veil.max()


def test_pages_that_are_read_in_tiles_are_lit_too(opened: Opener, url: str) -> None:
    shown = opened(url).task("pictures", "colidefics3").run()
    body = json.loads(sent(shown)[-1])
    query = ask(url, "pooling", **(json.loads(sent(shown)[-2])))["data"][0]
    pages = ask(url, "pooling", **body)["data"]
    best = [np.array(query["data"]) @ np.array(page["data"]).T for page in pages]
    first = int(np.argmax([matrix.max(1).sum() for matrix in best]))
    cells = np.array(pages[first]["tokens"]["pictures"][0]["cells"])
    products = best[first].max(0)[cells]
    # Pages of 480 x 640 become tiles of two lines and two columns of cells each: two by two of them.
    assert products.shape == (4, 4)
    shown.unfold("The strongest patches, as a table")
    listed = [
        [read(text) for text in row.locator("th, td").all_text_contents()]
        for row in shown.page.locator(".pages .plain").first.locator("tbody tr").all()
    ]
    assert len(listed) == 12
    values = [value for _, _, value in listed]
    assert np.abs(np.array(values) - np.sort(products.ravel())[::-1][:12]).max() < 0.00051
    for line, column, value in listed:
        assert abs(products[int(line) - 1, int(column) - 1] - value) < 0.00051


def test_places_on_the_map_are_principal_components(opened: Opener, url: str) -> None:
    shown = opened(url).task("map", "all-MiniLM-L6-v2").run()
    texts = given(shown, "Texts")
    centred = unit(url, texts) - unit(url, texts).mean(0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    expected = left[:, :2] * values[:2]
    expected = (expected - expected.min(0)) / np.ptp(expected, axis=0)
    shown.unfold("The places, as a table")
    got = np.array([read(text) for text in shown.texts(".plain td.number")]).reshape(-1, 2)
    for axis in range(2):
        column = got[:, axis]
        assert min(np.abs(column - expected[:, axis]).max(), np.abs(1 - column - expected[:, axis]).max()) < 0.002
    shares = 100 * values**2 / (values**2).sum()
    assert f"Across {shares[0]:.0f} %, up {shares[1]:.0f} %" in shown.page.inner_text(".legend")


def test_the_server_view_counts_what_is_done(opened: Opener, url: str) -> None:
    shown = opened(url).task("server", "all-MiniLM-L6-v2")
    assert shown.texts(".server tbody th") == shown.texts("#model option")
    titles = shown.texts(".card h2")
    charts = shown.page.locator(".card [role=img]")
    # Two readings are a rate.
    wait_until(lambda: shown.texts(".card .large")[0] != "–", "a rate")
    # The page's own readings of /metrics are no requests, and nothing ran.
    assert shown.texts(".card .large") == ["0", "0.0", "0.0", "–", "0", "–"]
    assert not inked(shown, titles.index("Batch fill, %"))
    ask(url, "v1/embeddings", model="all-MiniLM-L6-v2", input=["word " * 100] * 8)
    wait_until(lambda: int(re.sub(r"\D", "", shown.texts(".card .large")[0])) > 0, "tokens")
    figures = dict(zip(titles, shown.texts(".card .large"), strict=True))
    tokens, prompts, requests = (
        float(figures[f"{what} per second"].replace("\u202f", "")) for what in ("Tokens", "Prompts", "Requests")
    )
    # 8 prompts of 102 tokens in one request; all are shown as rates of the same seconds.
    assert abs(prompts / requests - 8) < 2
    assert abs(tokens / prompts - 102) < 4
    assert 0 < float(figures["Batch fill, %"]) <= 100
    assert re.fullmatch(
        r"Batch fill, % in the last two minutes: from \d+ to \d+",
        str(charts.nth(titles.index("Batch fill, %")).get_attribute("aria-label")),
    )
    assert inked(shown, titles.index("Batch fill, %"))
    # It asks while it is shown, and no longer.
    shown.page.locator("nav a", has_text="Similarity").click()
    shown.page.get_by_role("heading", name="Similarity").wait_for()
    shown.page.wait_for_timeout(2500)
    asked = len(shown.asked)
    shown.page.wait_for_timeout(2500)
    assert len(shown.asked) == asked


def inked(shown: Any, chart: int) -> bool:
    """Whether a chart has marks in the colour of readings."""
    shown.allowed = ["willReadFrequently"]  # what this test does, and the page does not
    return bool(
        shown.page.locator(".card .chart")
        .nth(chart)
        .evaluate(
            """(plot) => {
                const canvas = plot.querySelector("canvas");
                const [red, green, blue] = getComputedStyle(plot).color.match(/\\d+/g).map(Number);
                const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
                for (let at = 0; at < data.length; at += 4)
                    if (data[at + 3] === 255 && data[at] === red && data[at + 1] === green && data[at + 2] === blue) return true;
                return false;
            }"""
        )
    )


def test_the_charts_follow_the_theme_and_the_window(opened: Opener, url: str) -> None:
    shown = opened(url, color_scheme="light").task("server", "all-MiniLM-L6-v2")
    wait_until(lambda: shown.texts(".card .large")[0] != "–", "a rate")
    assert inked(shown, 0)
    shown.page.emulate_media(color_scheme="dark")
    wait_until(lambda: inked(shown, 0), "the colours of the dark")
    shown.page.set_viewport_size({"width": 360, "height": 740})
    wait_until(
        lambda: shown.page.evaluate(
            "[...document.querySelectorAll('.chart')].every((one) => one.querySelector('canvas').clientWidth <= one.clientWidth)"
        ),
        "narrow charts",
    )
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= 360


def test_models_show_the_tasks_that_they_can_do(opened: Opener, url: str) -> None:
    shown = opened(url)
    expected = {
        "all-MiniLM-L6-v2": ["Similarity", "Rerank", "Words", "Map"],
        "classifier": ["Labels"],
        "reranker": ["Rerank"],
        "ner": ["Entities"],
        "splade": ["Similarity", "Rerank", "Words", "Sparse", "Map"],
        "colbert": ["Rerank", "Words"],
        "colqwen3": ["Rerank", "Words", "Pictures"],
        "bge-m3": ["Similarity", "Rerank", "Words", "Sparse", "Map"],
        "gliner": ["Entities"],
        "gliclass": ["Labels"],
        "nli": ["Labels"],
    }
    shown.page.goto(url)
    for model, tasks in expected.items():
        shown.page.locator("#model").select_option(model)
        wait_until(lambda: shown.page.title().endswith(f"· {model} · Poolhouse"), model)  # noqa: B023
        assert shown.texts("nav a") == [*tasks, "Server"]


LANGUAGES = ("curl", "Python", "JavaScript")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(
    ("task", "model"),
    [
        ("similarity", "all-MiniLM-L6-v2"),
        ("words", "colbert"),
        ("rerank", "all-MiniLM-L6-v2"),
        ("entities", "gliner"),
        ("labels", "nli"),
    ],
)
def test_the_calls_shown_are_programs_that_get_the_same(
    opened: Opener, url: str, language: str, task: str, model: str, tmp_path: Path
) -> None:
    shown = opened(url).task(task, model)
    label = "Documents" if task in ("words", "rerank") else "Texts"
    shown.page.get_by_label(label, exact=True).fill("""it's "quoted" \\ $HOME `date`\n🙂 Größe 潮\n'''\n%s {x} !""")
    shown.run()
    shown.page.get_by_role("button", name=language, exact=True).click()
    program = shown.page.locator(".calls pre").text_content() or ""
    output = execute(program, language, tmp_path)
    replies = (
        [json.loads(line) for line in output.splitlines() if line.strip()] if language != "curl" else lines(output)
    )
    expected = [httpx.post(f"{url}/{path(program)}", content=body, headers={"content-type": "application/json"}, timeout=60,
                trust_env=False).json() for body in sent(shown)]  # fmt: skip
    assert len(replies) == len(expected) == (2 if task == "words" else 1)
    for got, wanted in zip(replies, expected, strict=True):
        key = "results" if task == "rerank" else "data"
        assert [sorted(item) for item in got[key]] == [sorted(item) for item in wanted[key]]
        for one, other in zip(got[key], wanted[key], strict=True):
            for field in ("embedding", "data", "relevance_score", "probs"):
                assert np.allclose(one.get(field, 0), other.get(field, 0), atol=1e-4)
            assert [part["label"] for part in one.get("entities", ())] == [
                part["label"] for part in other.get("entities", ())
            ]


def path(program: str) -> str:
    return re.findall(r"http://[\d.:]+/([\w/]+)", program)[0]


def lines(output: str) -> list[Any]:
    """Objects of JSON that follow each other."""
    decoder, at, found = json.JSONDecoder(), 0, []
    while at < len(output.rstrip()):
        value, at = decoder.raw_decode(output, at)
        found.append(value)
    return found


def execute(program: str, language: str, tmp_path: Path, **more: str) -> str:
    """What a program prints."""
    from playwright._impl._driver import compute_driver_executable

    runs = {
        "curl": ("sh", "bash"),
        "Python": ("py", sys.executable),
        "JavaScript": ("mjs", compute_driver_executable()[0]),
    }
    ending, runner = runs[language]
    file = tmp_path / f"call.{ending}"
    file.write_text(program, encoding="utf-8")
    environment = {**os.environ, **more}
    done = subprocess.run([runner, file], capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 0, f"{program}\n{done.stderr}"
    return done.stdout
