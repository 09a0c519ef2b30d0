"""Pictures in the bodies of every dialect: what reaches the engine, and what comes back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
from starlette.testclient import TestClient

from poolhouse.errors import FetchFailed
from poolhouse.inputs.content import Content, Image
from poolhouse.inputs.prompts import Prompt, images_of
from poolhouse.server.app import create_app
from poolhouse.settings import ServerSettings
from poolhouse.testing import FakeEngine
from tests.server.documented import checked

PNG = "data:image/png;base64,iVBORw0KGgo="
BARE = "iVBORw0KGgo="
# What bare base64 becomes.
URI = f"data:;base64,{BARE}"
WEB = "https://example.org/page.jpg"
# Fake engines count four tokens for a picture, and one for a word.
PICTURE = {"type": "image_url", "image_url": {"url": PNG}}
LINK = {"type": "image_url", "image_url": {"url": WEB}}
TEXT = {"type": "text", "text": "two words"}


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine("pages", pictures=True, tasks=("embed", "token_embed"))


@pytest.fixture
def pages(engine: FakeEngine) -> Iterator[FakeEngine]:
    """The engine, which has received nothing yet."""
    engine.received.clear()
    facts = engine.facts
    yield engine
    engine.failure, engine.facts = None, facts


@pytest.fixture(scope="module")
def http(engine: FakeEngine) -> Iterator[TestClient]:
    others = [
        FakeEngine("texts"),
        FakeEngine("reranker", tasks=("classify",), label_names={0: "fits"}, pictures=True),
    ]
    with TestClient(create_app([engine, *others], ServerSettings(max_client_batch_size=4))) as client:
        checked(client)
        yield client


def parts_of(content: Content | None) -> list[str] | None:
    """The parts, each picture by its source."""
    if content is None:
        return None
    return [f"<{part.source!s}>" if isinstance(part, Image) else part for part in content.parts]


def read(prompt: Prompt) -> Any:
    """A prompt as a list of texts and <pictures>, or as its one text; a conversation by its pictures."""
    if prompt.conversation is not None:
        return [f"<{image.source!s}>" for image in images_of(prompt)]
    return parts_of(prompt.content) if prompt.text is None else prompt.text


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


READS: list[tuple[str, dict[str, Any], list[Any]]] = [
    ("/v1/embeddings", {"messages": user(PICTURE, TEXT)}, [[f"<{PNG}>"]]),
    ("/v1/embeddings", {"messages": [user(PICTURE), user(TEXT), user(LINK, PICTURE)]}, [[f"<{PNG}>"], [], [f"<{WEB}>", f"<{PNG}>"]]),
    ("/v1/embeddings", {"input": [user(PICTURE), user(LINK)]}, [[f"<{PNG}>"], [f"<{WEB}>"]]),
    ("/v1/embeddings", {"input": [{"content": [PICTURE, TEXT, LINK]}, "alone"]}, [[f"<{PNG}>", "two words", f"<{WEB}>"], "alone"]),
    ("/v1/embeddings", {"input": [{"image": BARE}, {"image": WEB}, {"text": "a"}, "b"]}, [[f"<{URI}>"], [f"<{WEB}>"], "a", "b"]),
    ("/v1/embeddings", {"input": [PNG, WEB], "modality": "image"}, [[f"<{PNG}>"], [f"<{WEB}>"]]),
    ("/v1/embeddings", {"input": PNG}, [PNG]),
    ("/openai/deployments/pages/embeddings", {"messages": user(PICTURE)}, [[f"<{PNG}>"]]),
    ("/pooling", {"messages": user({"image_url": PNG}, TEXT), "task": "token_embed"}, [[f"<{PNG}>"]]),
    ("/pooling", {"messages": user({**PICTURE, "uuid": "page-1"}), "tasks": ["embed", "token_embed"]}, [[f"<{PNG}>"]]),
    ("/invocations", {"messages": user(PICTURE)}, [[f"<{PNG}>"]]),
    ("/score", {"data_1": "q", "data_2": [{"content": [PICTURE, TEXT]}, "d"]}, ["q", [f"<{PNG}>", "two words"], "d"]),
    ("/v1/score", {"text_1": {"content": [PICTURE]}, "text_2": {"content": [LINK, PICTURE]}}, [[f"<{PNG}>"], [f"<{WEB}>", f"<{PNG}>"]]),
    ("/score", {"queries": ["a", "b"], "documents": ["c", {"content": [PICTURE]}]}, ["a", "b", "c", [f"<{PNG}>"]]),
    ("/rerank", {"query": {"content": [TEXT, PICTURE]}, "documents": [{"content": [LINK]}, "d"]}, [["two words", f"<{PNG}>"], [f"<{WEB}>"], "d"]),
    ("/v1/rerank", {"query": "q", "documents": {"content": [PICTURE]}}, ["q", [f"<{PNG}>"]]),
    ("/v2/rerank", {"query": "q", "documents": [{"content": [PICTURE]}]}, ["q", [f"<{PNG}>"]]),
    ("/v2/embed", {"images": [PNG], "input_type": "image"}, [[f"<{PNG}>"]]),
    ("/cohere/v2/embed", {"inputs": [{"content": [PICTURE, TEXT]}, {"content": [TEXT]}]}, [[f"<{PNG}>", "two words"], "two words"]),
    ("/v1/embed", {"images": [PNG, PNG], "input_type": "image"}, [[f"<{PNG}>"], [f"<{PNG}>"]]),
    ("/jina/v1/embeddings", {"input": ["a", {"text": "b"}, {"image": BARE}, {"image": WEB}]}, ["a", "b", [f"<{URI}>"], [f"<{WEB}>"]]),
    ("/jina/v1/embeddings", {"input": {"image": PNG}, "return_multivector": True}, [[f"<{PNG}>"]]),
    ("/v1/multi-vector", {"input": [{"image": PNG}]}, [[f"<{PNG}>"]]),
    ("/jina/v1/rerank", {"query": {"image": PNG}, "documents": [{"text": "a"}, {"image": WEB}, "b"]}, [[f"<{PNG}>"], "a", [f"<{WEB}>"], "b"]),
    ("/v1/multimodalembeddings", {"inputs": [{"content": [TEXT, {"type": "image_url", "image_url": WEB}, {"type": "image_base64", "image_base64": PNG}]}]}, [["two words", f"<{WEB}>", f"<{PNG}>"]]),
    ("/voyage/v1/multimodalembeddings", {"inputs": [{"content": [TEXT]}, {"content": [{"type": "image_base64", "image_base64": PNG}]}], "input_type": "document"}, ["two words", [f"<{PNG}>"]]),
    ("/infinity/embeddings", {"input": [WEB, PNG], "modality": "image"}, [[f"<{WEB}>"], [f"<{PNG}>"]]),
    ("/infinity/embeddings_image", {"input": PNG}, [[f"<{PNG}>"]]),
    ("/infinity/embeddings", {"input": PNG}, [PNG]),
    ("/v1/ranking", {"query": {"text": "q"}, "passages": [{"text": "a", "image": PNG}, {"image": PNG}, {"text": "b"}]}, ["q", [f"<{PNG}>", "a"], [f"<{PNG}>"], "b"]),
    ("/vectorize", {"texts": ["a"], "images": [BARE, BARE]}, ["a", [f"<{URI}>"], [f"<{URI}>"]]),
    ("/weaviate/vectorize", {"images": [BARE]}, [[f"<{URI}>"]]),
    ("/v1/encode/pages", {"items": [{"images": [{"data": BARE, "format": "png"}], "text": "a"}, {"text": "b"}]}, [[f"<{URI}>", "a"], "b"]),
    ("/v1/score/pages", {"query": {"text": "q"}, "items": [{"images": [{"data": BARE}, {"data": BARE}]}]}, ["q", [f"<{URI}>", f"<{URI}>"]]),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "expected"), READS, ids=[f"{path} {list(body)}" for path, body, _ in READS])
def test_texts_and_pictures_reach_the_engine_in_order(
    http: TestClient, pages: FakeEngine, path: str, body: dict[str, Any], expected: list[Any]
) -> None:
    reply = http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    assert [read(request.prompt) for request in pages.received] == expected
    assert not any(request.local_files for request in pages.received)


def test_a_picture_is_a_document_where_cohere_says_image(http: TestClient, pages: FakeEngine) -> None:
    http.post("/v2/embed", json={"images": [PNG], "input_type": "image"}).raise_for_status()
    assert [request.input_type for request in pages.received] == ["image"]
    pages.describe(prompts={"document": "d: "})
    assert http.post("/v1/embeddings", json={"input": "x", "input_type": "image"}).status_code == 200


def test_sie_sends_the_bytes_of_pictures_in_msgpack(http: TestClient, pages: FakeEngine) -> None:
    body = {"items": [{"id": "a", "images": [{"data": b"\x89PNG", "format": "png"}]}]}
    reply = http.post("/v1/encode/pages", content=msgpack.packb(body), headers={"content-type": "application/msgpack"})
    assert reply.status_code == 200, reply.text
    (image,) = images_of(pages.received[0].prompt)
    assert (image.source, image.path) == (b"\x89PNG", "items[0].images[0]")


def test_pairs_of_a_reranker_keep_their_pictures(http: TestClient) -> None:
    body = {"model": "reranker", "query": "q", "documents": [{"content": [PICTURE, TEXT]}, "d"]}
    reply = http.post("/rerank", json=body)
    assert reply.status_code == 200, reply.text
    assert len(reply.json()["results"]) == 2


def test_usage_counts_the_tokens_of_pictures(http: TestClient) -> None:
    usage = {
        path: http.post(path, json=body).json()
        for path, body in {
            "/v1/embeddings": {"input": [{"content": [PICTURE, TEXT]}]},
            "/rerank": {"query": "q", "documents": [{"content": [PICTURE]}]},
            "/v2/embed": {"inputs": [{"content": [PICTURE, TEXT]}]},
            "/cohere/v2/embed": {"texts": ["two words"]},
            "/voyage/v1/multimodalembeddings": {"inputs": [{"content": [PICTURE, TEXT]}]},
            "/jina/v1/embeddings": {"input": [{"image": PNG}]},
        }.items()
    }
    # An empty text has a token of its own.
    assert usage["/v1/embeddings"]["usage"]["prompt_tokens"] == 6
    assert usage["/rerank"]["usage"]["prompt_tokens"] == 6
    assert usage["/v2/embed"]["meta"]["billed_units"] == {"input_tokens": 2, "image_tokens": 4}
    assert usage["/cohere/v2/embed"]["meta"]["billed_units"] == {"input_tokens": 2}
    assert usage["/voyage/v1/multimodalembeddings"]["usage"] == {
        "text_tokens": 2, "image_pixels": 4 * 560, "video_pixels": 0, "total_tokens": 6
    }  # fmt: skip
    assert usage["/jina/v1/embeddings"]["usage"]["total_tokens"] == 5


def test_rerank_shows_the_parts_of_a_document_with_pictures(http: TestClient) -> None:
    documents = [{"content": [{**PICTURE, "uuid": "p"}, TEXT]}, "plain", {"content": [TEXT]}]
    body: dict[str, Any] = {"query": "q", "documents": documents}
    results = {one["index"]: one for one in http.post("/v1/rerank", json=body).json()["results"]}
    assert results[0]["document"] == {"text": None, "multi_modal": documents[0]["content"]}  # type: ignore[index]
    assert results[1]["document"] == {"text": "plain", "multi_modal": None}
    assert results[2]["document"] == {"text": "two words", "multi_modal": None}
    without = http.post("/v1/rerank", json={**body, "return_documents": False}).json()["results"]
    assert all("document" not in one for one in without)
    one = http.post("/v1/rerank", json={"query": "q", "documents": documents[0]}).json()["results"]
    assert one[0]["document"]["multi_modal"] == documents[0]["content"]  # type: ignore[index]


def test_weaviates_scores_are_of_texts_alone(http: TestClient) -> None:
    texts = http.post("/rerank", json={"query": "q", "documents": ["d"]}).json()
    pictures = http.post("/rerank", json={"query": "q", "documents": [{"content": [PICTURE]}]}).json()
    assert "scores" in texts
    assert "scores" not in pictures


def test_jinas_rerank_shows_documents_as_they_were_given(http: TestClient) -> None:
    body = {"query": "q", "documents": [{"image": PNG}, "b", {"text": "c"}]}
    results = {one["index"]: one["document"] for one in http.post("/jina/v1/rerank", json=body).json()["results"]}
    assert results == {0: {"image": PNG}, 1: {"text": "b"}, 2: {"text": "c"}}


def test_coheres_reply_has_texts_where_there_are_nothing_but_texts(http: TestClient) -> None:
    assert http.post("/v2/embed", json={"texts": ["a"]}).json()["texts"] == ["a"]
    assert http.post("/v2/embed", json={"inputs": [{"content": [TEXT]}]}).json()["texts"] == ["two words"]
    assert "texts" not in http.post("/v2/embed", json={"images": [PNG]}).json()
    assert "texts" not in http.post("/v2/embed", json={"inputs": [{"content": [TEXT, PICTURE]}]}).json()


def test_a_picture_and_its_text_have_other_vectors_than_either_alone(http: TestClient) -> None:
    def vector(content: Any) -> list[float]:
        reply = http.post("/v1/embeddings", json={"input": [{"content": content}]})
        return reply.json()["data"][0]["embedding"]  # type: ignore[no-any-return]

    vectors = [vector(content) for content in ([PICTURE], [PICTURE, TEXT], [TEXT], [LINK])]
    assert len({tuple(one) for one in vectors}) == 4
    assert vector([PICTURE]) == vectors[0]


@pytest.mark.parametrize(
    "options",
    [{"max_pixels": 65536}, {"min_pixels": 3136, "max_pixels": 65536}, {"size": {"shortest_edge": 4096, "longest_edge": 65536}}],
)  # fmt: skip
def test_requests_may_say_how_large_pictures_are_read(
    http: TestClient, pages: FakeEngine, options: dict[str, Any]
) -> None:
    for path, body in {
        "/v1/embeddings": {"messages": user(PICTURE)},
        "/pooling": {"input": [{"content": [PICTURE]}, "text"]},
        "/score": {"queries": "q", "documents": {"content": [PICTURE]}},
    }.items():
        pages.received.clear()
        assert http.post(path, json={**body, "mm_processor_kwargs": options}).status_code == 200
        assert {bool(images_of(one.prompt)): one.prompt.processor_options for one in pages.received}[True] == options
        assert all(not one.prompt.processor_options for one in pages.received if not images_of(one.prompt))


REFUSED: list[tuple[str, dict[str, Any], str | None, str]] = [
    ("/v1/embeddings", {"messages": user(PICTURE), "mm_processor_kwargs": {"do_resize": False}}, "mm_processor_kwargs", "'do_resize' is not for requests; they may set min_pixels, max_pixels, size."),
    ("/score", {"data_1": "q", "data_2": "d", "mm_processor_kwargs": {"images_kwargs": {}}}, "mm_processor_kwargs", "'images_kwargs' is not for requests"),
    ("/pooling", {"input": "x", "mm_processor_kwargs": {"min_pixels": 2**40}}, "mm_processor_kwargs", "from 1 to 16777216"),
    ("/pooling", {"input": "x", "mm_processor_kwargs": {"size": {"longest_edge": "9"}}}, "mm_processor_kwargs", "from 1 to 16777216"),
    ("/pooling", {"input": "x", "mm_processor_kwargs": {"max_pixels": True}}, "mm_processor_kwargs", "from 1 to 16777216"),
    ("/v1/embeddings", {"input": [{"content": [PICTURE], "mm_processor_kwargs": {"min_pixels": 2**40}}]}, "mm_processor_kwargs", "from 1 to 16777216"),
    ("/v1/embeddings", {"messages": user(PICTURE), "media_io_kwargs": {"image": {"image_mode": "L"}}}, "media_io_kwargs", "media_io_kwargs is not for requests"),
    ("/tokenize", {"messages": user(PICTURE)}, "messages", "Pictures are not tokenized here"),
    ("/v1/embeddings", {"input": [{"content": [{"type": "video_url", "video_url": {"url": WEB}}]}]}, None, "input[0].content[0]"),
    ("/rerank", {"query": "q", "documents": ["a", {"content": [{"type": "image_embeds", "image_embeds": "x"}]}]}, None, "documents[1].content[0]"),
    ("/score", {"data_1": "q", "data_2": {"content": []}}, None, "data_2"),
    ("/v1/embeddings", {"input": [{"image": 3}]}, "input[0].image", "must be a URL, a data URI or base64"),
    ("/v1/embeddings", {"input": [{"image": PNG, "text": "a"}]}, "input", "input[0] has text and image; give one of them."),
    ("/v1/embeddings", {"input": [[1, 2]], "modality": "image"}, "input[0]", "must be a URL"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "parameter", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_what_is_not_read_is_refused_by_name(
    http: TestClient, path: str, body: dict[str, Any], parameter: str | None, words: str
) -> None:
    reply = http.post(path, json=body)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert words in error["message"]
    assert parameter is None or error["param"] == parameter


IN_THEIR_SHAPES: list[tuple[str, dict[str, Any], Any]] = [
    ("/v2/embed", {"texts": ["a"], "images": [PNG]}, {"message": "Give one of texts, images and inputs, and not an empty one."}),
    ("/jina/v1/embeddings", {"input": [{"text": "a", "image": PNG}]}, {"detail": "input[0] has text and image; give one of them."}),
    ("/jina/v1/embeddings", {"input": [{"pdf": "x"}]}, {"detail": "input[0] is an pdf; texts and pictures are read here."}),
    ("/infinity/embeddings", {"input": "x", "modality": "audio"}, {"error": {"message": "modality 'audio': texts and pictures are read here.", "type": None, "param": "modality", "code": 400}}),
    ("/api/embed", {"input": "x", "images": [PNG]}, {"error": "images: this API embeds texts; /v1/embeddings reads pictures in messages."}),
    ("/api/embeddings", {"prompt": "x", "images": [PNG]}, {"error": "images: this API embeds texts; /v1/embeddings reads pictures in messages."}),
    ("/v1/encode/pages", {"items": [{"id": "a"}]}, {"detail": {"code": "INVALID_INPUT", "message": "items[0] has neither text nor images."}}),
    ("/v1/encode/pages", {"items": [{"audio": {"data": "x"}}]}, {"detail": {"code": "INVALID_INPUT", "message": "items[0] has audio; texts and pictures are read here."}}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "expected"), IN_THEIR_SHAPES)
def test_dialects_refuse_in_their_own_shapes(http: TestClient, path: str, body: dict[str, Any], expected: Any) -> None:
    reply = http.post(path, json=body)
    assert (reply.status_code, reply.json()) == (400, expected)


@pytest.mark.parametrize(("path", "body"), [(path, body) for path, body, _ in READS], ids=[path for path, *_ in READS])
def test_a_model_that_reads_texts_alone_refuses_pictures(http: TestClient, path: str, body: dict[str, Any]) -> None:
    reply = http.post(path.replace("pages", "texts"), json={**body, "model": "texts"})
    if (body == {"input": PNG} and not path.endswith("image")) or "vectorize" in path:
        # Bare texts; and Weaviate names no model.
        assert reply.status_code == 200
    else:
        assert reply.status_code == 400
        assert "MultiModalParam is not supported for texts" in reply.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/embed", {"inputs": {"image": PNG}}),
        ("/embed", {"inputs": [{"content": [PICTURE]}]}),
        ("/rerank", {"query": "q", "texts": [{"image": PNG}]}),
        ("/predict", {"inputs": [[{"image": PNG}]], "model": "reranker"}),
        ("/embedding", {"content": [{"prompt_string": "x", "multimodal_data": [BARE]}]}),
        ("/cohere/v2/rerank", {"query": "q", "documents": [{"image": PNG}]}),
        ("/voyage/v1/embeddings", {"input": [{"image": PNG}]}),
        ("/vectors", {"text": {"image": PNG}}),
    ],
)
def test_routes_without_pictures_refuse_them(http: TestClient, path: str, body: dict[str, Any]) -> None:
    reply = http.post(path, json=body)
    assert reply.status_code in (400, 422)
    assert len(reply.text) > 30


@pytest.mark.parametrize(
    ("path", "body", "error"),
    [
        ("/v1/embeddings", {"messages": user(LINK)}, lambda body: body["error"]["type"] == "UnprocessableEntityError"),
        ("/rerank", {"query": "q", "documents": [{"content": [LINK]}]}, lambda body: body["code"] == 422),
        ("/v2/embed", {"images": [WEB]}, lambda body: set(body) == {"message"}),
        ("/jina/v1/embeddings", {"input": [{"image": WEB}]}, lambda body: set(body) == {"detail"}),
        ("/v1/multimodalembeddings", {"inputs": [{"content": [LINK]}]}, lambda body: set(body) == {"detail"}),
        ("/infinity/embeddings_image", {"input": WEB}, lambda body: body["error"]["code"] == 422),
        ("/v1/encode/pages", {"items": [{"images": [{"data": BARE}]}]}, lambda body: body["detail"]["code"] == "INVALID_INPUT"),
        ("/vectorize", {"images": [BARE]}, lambda body: set(body) == {"error"}),
    ],
)  # fmt: skip
def test_a_picture_that_cannot_be_fetched_is_a_422_in_the_shape_of_the_dialect(
    http: TestClient, pages: FakeEngine, path: str, body: dict[str, Any], error: Any
) -> None:
    pages.failure = FetchFailed("messages[0].content[0]: example.org answered 404.", "messages[0].content[0]")
    reply = http.post(path, json=body)
    assert reply.status_code == 422
    assert "example.org answered 404" in reply.text
    assert error(reply.json())


def test_lists_are_limited_before_they_are_read(http: TestClient) -> None:
    for path, body in {
        "/v1/embeddings": {"input": [{"image": PNG}] * 5},
        "/v2/embed": {"images": [PNG] * 5},
        "/jina/v1/embeddings": {"input": [{"image": PNG}] * 5},
        "/v1/multimodalembeddings": {"inputs": [{"content": [PICTURE]}] * 5},
        "/infinity/embeddings": {"input": [PNG] * 5, "modality": "image"},
        "/rerank": {"query": "q", "documents": [{"content": [PICTURE]}] * 5},
    }.items():
        reply = http.post(path, json=body)
        assert reply.status_code == 400
        assert "one request may hold 4" in reply.text


def test_models_say_what_they_read(http: TestClient) -> None:
    listed = http.get("/v1/models").json()["data"]
    assert {one["id"]: one["modalities"] for one in listed} == {
        "pages": ["text", "image"], "texts": ["text"], "reranker": ["text", "image"]
    }  # fmt: skip
    infinity = {one["id"]: one["capabilities"] for one in http.get("/infinity/models").json()["data"]}
    assert "image_embed" in infinity["pages"]
    assert "image_embed" not in infinity["texts"] + infinity["reranker"]
