"""A ColQwen3 over sockets: the requests of its documentation with real files, wrong pictures, slow sources, clients that
hang up."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from poolhouse import LLM
from poolhouse.bench.made_up import write_colqwen3
from tests.inputs.sources import Source, source, whole
from tests.server.sockets import Client, load, wait_until
from tests.server.test_server import Server

MODEL = "TomoroAI/tomoro-colqwen3-embed-4b"
PROMPT = {"type": "text", "text": "Describe the image."}
# A source that is slow for so long; /health answers in a small part of it.
SLOW_SECONDS = 2.0


def drawn(width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height))


def encoded(picture: Image.Image, form: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, form)
    return file.getvalue()


def uri(file: bytes, form: str) -> str:
    return f"data:image/{form.lower()};base64,{base64.b64encode(file).decode()}"


PNG = encoded(drawn(300, 200, 1), "PNG")
JPEG = encoded(drawn(160, 260, 2), "JPEG")


def shown(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


PAGES = [{"content": [shown(uri(PNG, "PNG")), PROMPT]}, {"content": [shown(uri(JPEG, "JPEG")), PROMPT]}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colqwen3(tmp_path_factory.mktemp("colqwen3"))


@pytest.fixture(scope="module")
def web() -> Iterator[Source]:
    """A host of pictures: two good ones, a slow one, and what is none."""

    def slow(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(SLOW_SECONDS)
        whole(PNG)(handler)

    answers = {"/page.png": PNG, "/page.jpg": JPEG, "/slow.png": slow, "/page.html": b"<html>not a picture</html>"}
    with source(answers) as web:
        yield web


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    """As the documentation starts it, with one inside host to fetch from, and at most two pictures per prompt."""
    server = Server(
        *(str(checkpoint), "--served-model-name", MODEL, "--max-model-len", "4096"),
        *("--allowed-media-domains", "127.0.0.1", "--limit-mm-per-prompt", '{"image": 2}'),
    )
    yield server
    status, log = server.stop()
    assert status == 0
    assert "Traceback" not in log


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(checkpoint), max_model_len=4096) as llm:
        yield llm


def ask(http: httpx.Client, path: str, **body: Any) -> Any:
    reply = http.post(path, json={"model": MODEL, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


def message(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def same(found: Any, wanted: Any) -> bool:
    """Within 1e-4 of the largest entry."""
    ours, theirs = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
    return ours.shape == theirs.shape and bool(np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max())


def test_texts_are_scored_and_ranked(http: httpx.Client, llm: LLM) -> None:
    documents = [
        "Machine learning is a subset of artificial intelligence.",
        "Python is a programming language.",
        "Deep learning uses neural networks.",
    ]
    query = "What is machine learning?"
    wanted = [output.outputs.score for output in llm.score(query, documents)]
    ranked = ask(http, "/rerank", query=query, documents=documents)["results"]
    assert [one["index"] for one in ranked] == np.argsort(-np.array(wanted), kind="stable").tolist()
    assert same([one["relevance_score"] for one in ranked], sorted(wanted, reverse=True))
    scored = ask(http, "/score", text_1=query, text_2=documents)["data"]
    assert same([one["score"] for one in scored], wanted)


def test_pictures_are_scored_and_ranked(http: httpx.Client, llm: LLM) -> None:
    query = "Retrieve the city of Beijing"
    pages: list[Any] = [{"content": [{"type": "image", "image": file}, PROMPT]} for file in (PNG, JPEG)]
    wanted = [output.outputs.score for output in llm.score(query, pages)]
    scored = ask(http, "/score", data_1=query, data_2=PAGES)["data"]
    assert same([one["score"] for one in scored], wanted)
    reply = ask(http, "/rerank", query=query, documents=PAGES, top_n=2)
    best = int(np.argmax(wanted))
    assert [one["index"] for one in reply["results"]] == [best, 1 - best]
    assert same([one["relevance_score"] for one in reply["results"]], sorted(wanted, reverse=True))
    assert reply["results"][0]["document"] == {"text": None, "multi_modal": PAGES[best]["content"]}


def test_token_vectors_of_texts_and_of_messages_with_pictures(http: httpx.Client, llm: LLM) -> None:
    text = "What is machine learning?"
    reply = ask(http, "/pooling", input=text, task="token_embed")
    (wanted,) = llm.encode([text], pooling_task="token_embed")
    assert same(reply["data"][0]["data"], wanted.outputs.data)
    messages = message(shown(uri(PNG, "PNG")), PROMPT)
    reply = ask(http, "/pooling", messages=messages)
    (wanted,) = llm.encode([{"messages": messages}], pooling_task="token_embed")
    rows = reply["data"][0]["data"]
    assert same(rows, wanted.outputs.data)
    assert reply["usage"]["prompt_tokens"] == len(rows) == len(wanted.prompt_token_ids)
    # 300 x 200 pixels in merged patches of 32: 9 x 6 of them.
    assert len(rows) > 54
    answered = ask(http, "/pooling", messages=messages, add_generation_prompt=True)
    assert len(answered["data"][0]["data"]) > len(rows)


def test_a_picture_is_the_same_wherever_it_comes_from(http: httpx.Client, web: Source) -> None:
    for file, name, form in ((PNG, "/page.png", "PNG"), (JPEG, "/page.jpg", "JPEG")):
        forms = [shown(uri(file, form)), shown(web.url(name)), {"image_url": uri(file, form)}]
        rows = [ask(http, "/pooling", messages=message(part))["data"][0]["data"] for part in forms]
        assert all(same(one, rows[0]) for one in rows)


def test_conversations_and_contents_come_in_lists(http: httpx.Client) -> None:
    png, jpeg = shown(uri(PNG, "PNG")), shown(uri(JPEG, "JPEG"))
    alone = [
        ask(http, "/pooling", messages=message(*parts))["data"][0]["data"]
        for parts in ((png,), ("a text",), (jpeg, PROMPT, png))
    ]
    together = ask(http, "/v1/embeddings", messages=[message(png), message("a text"), message(jpeg, PROMPT, png)])
    assert all(same(one["embedding"], wanted) for one, wanted in zip(together["data"], alone, strict=True))
    mixed = ask(http, "/pooling", input=[{"content": [png]}, "a text", {"content": [jpeg]}])
    assert len({len(one["data"]) for one in mixed["data"]}) == 3


def test_a_request_may_ask_for_smaller_pictures(http: httpx.Client) -> None:
    body = {"messages": message(shown(uri(PNG, "PNG")))}
    whole_rows = ask(http, "/pooling", **body)["usage"]["prompt_tokens"]
    fewer = ask(http, "/pooling", **body, mm_processor_kwargs={"max_pixels": 16 * 32 * 32})["usage"]["prompt_tokens"]
    assert whole_rows - 54 + 4 <= fewer < whole_rows


REFUSED: list[tuple[str, str, int, str, str]] = [
    ("base64", "data:image/png;base64,!!!!", 400, "BadRequestError", "base64"),
    ("no picture", uri(b"no picture at all", "PNG"), 400, "BadRequestError", "picture"),
    ("truncated", uri(PNG[: len(PNG) // 2], "PNG"), 400, "BadRequestError", "truncated"),
    ("SVG", uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg+xml"), 400, "BadRequestError", "picture"),
    ("no base64", "data:image/png,abc", 400, "BadRequestError", "base64"),
    ("a file", "file:///etc/passwd", 400, "BadRequestError", "allowed_local_media_path"),
    ("a path", "/etc/passwd", 400, "BadRequestError", "URL"),
    (
        "another scheme",
        "ftp://127.0.0.1/page.png",
        400,
        "BadRequestError",
        "The URL must be either a HTTP, data or file URL.",
    ),
    ("a thin picture", uri(encoded(Image.new("RGB", (900, 2)), "PNG"), "PNG"), 400, "BadRequestError", "200"),
    ("another host", "http://localhost:1/page.png", 400, "BadRequestError", "allowed_media_domains"),
    ("no such page", "http://127.0.0.1:PORT/none.png", 422, "UnprocessableEntityError", "404"),
    ("nobody listens", "http://127.0.0.1:1/page.png", 422, "UnprocessableEntityError", "127.0.0.1"),
    ("a page of text", "http://127.0.0.1:PORT/page.html", 400, "BadRequestError", "picture"),
]


@pytest.mark.parametrize(
    ("url", "status", "kind", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_a_wrong_picture_is_refused_by_its_place_and_others_go_on(
    http: httpx.Client, web: Source, url: str, status: int, kind: str, words: str
) -> None:
    url = url.replace("PORT", str(web.port))
    documents = [PAGES[0], "a text", {"content": [PROMPT, shown(url)]}, PAGES[1]]
    with ThreadPoolExecutor(3) as others:
        good = [others.submit(ask, http, "/rerank", query="q", documents=PAGES) for _ in range(2)]
        reply = http.post("/rerank", json={"query": "q", "documents": documents})
        assert all(len(one.result()["results"]) == 2 for one in good)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error["type"] == kind
    assert error["message"].count("documents[2].content[1]") == 1
    assert words.lower() in error["message"].lower()
    assert "not a picture</html>" not in reply.text
    assert "root:" not in reply.text


def test_prompts_have_no_more_pictures_than_the_limit(http: httpx.Client) -> None:
    png = shown(uri(PNG, "PNG"))
    reply = http.post("/pooling", json={"messages": message(png, png, png)})
    assert reply.status_code == 400
    assert "At most 2 image(s) may be provided in one prompt." in reply.json()["error"]["message"]
    assert ask(http, "/pooling", messages=message(png, png))


def test_too_long_a_prompt_with_pictures_is_refused(http: httpx.Client) -> None:
    long = {"type": "text", "text": "word " * 2000}
    for body in (
        {"messages": message(shown(uri(PNG, "PNG")), long)},
        {"messages": message(long, shown(uri(PNG, "PNG")))},
    ):
        reply = http.post("/pooling", json=body)
        assert reply.status_code == 400, reply.text
        assert "4096" in reply.json()["error"]["message"]


def test_what_else_is_answered(http: httpx.Client) -> None:
    (model,) = http.get("/v1/models").json()["data"]
    assert model["modalities"] == ["text", "image"]
    reply = http.post("/tokenize", json={"messages": message(shown(uri(PNG, "PNG")))})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "messages")
    assert http.post("/tokenize", json={"messages": message(PROMPT)}).status_code == 200


def test_health_answers_while_a_source_is_slow_and_many_ask(server: Server, http: httpx.Client, web: Source) -> None:
    """50 requests with pictures, 10 of which wait for a slow source, and as many with texts."""
    pages = {
        "slow": {"messages": message(shown(web.url("/slow.png")))},
        "png": {"messages": message(shown(uri(PNG, "PNG")))},
        "jpeg": {"messages": message(shown(web.url("/page.jpg")), PROMPT)},
    }
    wanted = {name: ask(http, "/pooling", **body)["data"][0]["data"] for name, body in pages.items()}
    text = ask(http, "/pooling", input="a text")["data"][0]["data"]
    names = (["slow"] + ["png", "jpeg"] * 2) * 10
    waits: list[float] = []
    done = threading.Event()

    def probe() -> None:
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
            while not done.is_set():
                started = time.monotonic()
                assert client.get("/health").status_code == 200
                waits.append(time.monotonic() - started)
                time.sleep(0.01)

    with (
        ThreadPoolExecutor(101) as clients,
        httpx.Client(
            base_url=server.url, timeout=120, trust_env=False, limits=httpx.Limits(max_connections=None)
        ) as many,
    ):
        probing = clients.submit(probe)
        started = time.monotonic()
        asked = [clients.submit(ask, many, "/pooling", **pages[name]) for name in names]
        texts = [clients.submit(ask, many, "/pooling", input="a text") for _ in range(50)]
        assert all(same(one.result()["data"][0]["data"], text) for one in texts)
        for name, one in zip(names, asked, strict=True):
            assert same(one.result()["data"][0]["data"], wanted[name]), name
        assert time.monotonic() - started > 0.9 * SLOW_SECONDS
        done.set()
        probing.result()
    # The first may wait for a hundred clients of this process to begin; a server that waits for a source takes all of its time.
    assert np.median(waits) < 0.1
    assert np.quantile(waits, 0.9) < SLOW_SECONDS / 4
    assert max(waits) < SLOW_SECONDS


def test_a_client_that_hangs_up_leaves_no_prompt_behind(server: Server, web: Source) -> None:
    client = Client(server.url)
    client.send("/pooling", {"messages": message(shown(web.url("/slow.png?hung-up")))})
    wait_until(lambda: load(server.url) == 1, "the request")
    wait_until(lambda: any("hung-up" in path for path, _ in web.asked), "the fetch")
    client.hang_up()
    started = time.monotonic()
    wait_until(lambda: load(server.url) == 0, "the end of the request")
    assert time.monotonic() - started < SLOW_SECONDS
