"""Cohere's own client: its first and its second interface, at the root and under /cohere."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import cohere
import numpy as np
import pytest

from tests.clients.asked import DOCUMENTS, EMBEDDER, KEY, QUERY, RERANKER, TEXTS, Calls
from tests.clients.conftest import Embedded, Ranked

AT = ["", "/cohere"]
BY_TEXT = [{"content": [{"type": "text", "text": text}]} for text in TEXTS]
TITLED = [{"title": f"number {place}", "text": text} for place, text in enumerate(DOCUMENTS)]


def embed_v1(url: str, **options: Any) -> Any:
    with cohere.Client(api_key=KEY, base_url=url) as client:
        return client.embed(**{"texts": TEXTS, "model": EMBEDDER, "input_type": "search_document"} | options)


def embed_v2(url: str, key: str = KEY, **options: Any) -> Any:
    asked = {} if "inputs" in options else {"texts": TEXTS}
    with cohere.ClientV2(api_key=key, base_url=url) as client:
        return client.embed(**{"model": EMBEDDER, "input_type": "search_document"} | asked | options)


def rerank_v1(url: str, **options: Any) -> Any:
    with cohere.Client(api_key=KEY, base_url=url) as client:
        return client.rerank(**{"query": QUERY, "documents": DOCUMENTS, "model": RERANKER} | options)


def rerank_v2(url: str, key: str = KEY, **options: Any) -> Any:
    with cohere.ClientV2(api_key=key, base_url=url) as client:
        return client.rerank(**{"query": QUERY, "documents": DOCUMENTS, "model": RERANKER} | options)


CALLS: Calls = {
    "Client.embed": embed_v1,
    "Client.embed, by type": lambda url: embed_v1(url, embedding_types=["float", "int8"], truncate="START"),
    "Client.rerank": lambda url: rerank_v1(f"{url}/cohere", top_n=2, return_documents=True, max_chunks_per_doc=3),
    "Client.rerank, objects": lambda url: rerank_v1(f"{url}/cohere", documents=TITLED, rank_fields=["text"]),
    "ClientV2.embed": embed_v2,
    "ClientV2.embed, by type": lambda url: embed_v2(
        url, embedding_types=["float", "int8", "uint8", "binary", "ubinary", "base64"], output_dimension=64
    ),
    "ClientV2.embed, inputs": lambda url: embed_v2(url, inputs=BY_TEXT, max_tokens=100, truncate="NONE"),
    "ClientV2.rerank": lambda url: rerank_v2(f"{url}/cohere"),
    "ClientV2.rerank, limits": lambda url: rerank_v2(f"{url}/cohere", top_n=2, max_tokens_per_doc=50),
}


@pytest.mark.parametrize("at", AT)
def test_cohere_embeds_texts_in_its_first_interface(embedder: str, embedded: Embedded, at: str) -> None:
    reply = embed_v1(embedder + at)
    assert reply.response_type == "embeddings_floats"
    assert np.abs(np.array(reply.embeddings) - embedded.vectors).max() < 1e-5
    assert reply.texts == TEXTS
    assert reply.meta.api_version.version == "1"
    assert reply.meta.billed_units.input_tokens == embedded.tokens
    by_type = embed_v1(embedder + at, embedding_types=["float", "int8"])
    assert by_type.response_type == "embeddings_by_type"
    assert np.abs(np.array(by_type.embeddings.float_) - embedded.vectors).max() < 1e-5
    assert np.array(by_type.embeddings.int8).shape == embedded.vectors.shape


@pytest.mark.parametrize("at", AT)
def test_cohere_embeds_texts_in_its_second_interface(embedder: str, embedded: Embedded, at: str) -> None:
    for options in ({}, {"inputs": BY_TEXT}):
        reply = embed_v2(embedder + at, **options)
        assert reply.response_type == "embeddings_by_type"
        assert np.abs(np.array(reply.embeddings.float_) - embedded.vectors).max() < 1e-5
        assert reply.meta.api_version.version == "2"
        assert reply.meta.billed_units.input_tokens == embedded.tokens


def test_cohere_gets_every_type_of_embedding(embedder: str, embedded: Embedded) -> None:
    kinds = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    got = embed_v2(embedder, embedding_types=kinds, output_dimension=64).embeddings
    assert np.abs(np.array(got.float_) - embedded.short).max() < 1e-5
    packed = np.stack([np.frombuffer(base64.b64decode(row), "<f4") for row in got.base64])
    assert np.abs(packed - embedded.short).max() < 1e-5
    bits = np.packbits(embedded.short > 0, axis=1)
    assert np.array_equal(got.ubinary, bits)
    assert np.array_equal(got.binary, bits.astype(np.int16) - 128)
    signed, unsigned = np.array(got.int8), np.array(got.uint8)
    assert signed.shape == unsigned.shape == embedded.short.shape
    assert (signed.min() >= -128, signed.max() <= 127, unsigned.min() >= 0, unsigned.max() <= 255) == (True,) * 4
    assert np.array_equal(unsigned, signed + 128)
    cosines = (signed * embedded.short).sum(1) / np.linalg.norm(signed, axis=1)
    assert cosines.min() > 0.99


@pytest.mark.parametrize("at", AT)
def test_cohere_reranks_in_its_first_interface(reranker: str, ranked: Ranked, at: str) -> None:
    reply = rerank_v1(reranker + at, top_n=2, return_documents=True)
    assert [result.index for result in reply.results] == ranked.order[:2]
    assert np.allclose([result.relevance_score for result in reply.results], ranked.scores[:2], atol=1e-5)
    assert [result.document.text for result in reply.results] == [DOCUMENTS[index] for index in ranked.order[:2]]


def test_cohere_says_no_documents_unless_asked_and_ranks_objects_by_their_text(reranker: str, ranked: Ranked) -> None:
    reply = rerank_v1(f"{reranker}/cohere")
    assert [result.index for result in reply.results] == ranked.order
    assert [result.document for result in reply.results] == [None] * 4
    assert reply.meta.api_version.version == "1"
    assert reply.meta.billed_units.search_units == 1
    objects = rerank_v1(f"{reranker}/cohere", documents=TITLED, rank_fields=["text"])
    assert np.allclose([result.relevance_score for result in objects.results], ranked.scores, atol=1e-5)


@pytest.mark.parametrize("at", AT)
def test_cohere_reranks_in_its_second_interface(reranker: str, ranked: Ranked, at: str) -> None:
    reply = rerank_v2(reranker + at)
    assert [result.index for result in reply.results] == ranked.order
    assert np.allclose([result.relevance_score for result in reply.results], ranked.scores, atol=1e-5)
    assert [result.index for result in rerank_v2(reranker + at, top_n=1).results] == ranked.order[:1]


def test_cohere_calls_without_waiting(embedder: str, embedded: Embedded, reranker: str, ranked: Ranked) -> None:
    async def ask() -> tuple[Any, Any]:
        async with (
            cohere.AsyncClientV2(api_key=KEY, base_url=embedder) as embeds,
            cohere.AsyncClientV2(api_key=KEY, base_url=reranker) as reranks,
        ):
            return await asyncio.gather(
                embeds.embed(texts=TEXTS, model=EMBEDDER, input_type="search_query"),
                reranks.rerank(query=QUERY, documents=DOCUMENTS, model=RERANKER),
            )

    vectors, reranked = asyncio.run(ask())
    assert np.abs(np.array(vectors.embeddings.float_) - embedded.vectors).max() < 1e-5
    assert [result.index for result in reranked.results] == ranked.order


@pytest.mark.parametrize(
    ("ask", "options", "error", "words"),
    [
        (embed_v2, {"key": "wrong"}, cohere.UnauthorizedError, ""),
        (rerank_v2, {"key": "wrong"}, cohere.UnauthorizedError, ""),
        (embed_v2, {"model": "another"}, cohere.NotFoundError, "another"),
        (embed_v2, {"embedding_types": ["float8"]}, cohere.BadRequestError, "embedding_types"),
        (embed_v2, {"output_dimension": 65}, cohere.BadRequestError, "matryoshka"),
        (embed_v2, {"texts": []}, cohere.BadRequestError, "texts"),
        (embed_v2, {"texts": ["word " * 600], "truncate": "NONE"}, cohere.BadRequestError, "256"),
        (rerank_v2, {"model": "another"}, cohere.NotFoundError, "another"),
        (rerank_v2, {"documents": []}, cohere.BadRequestError, "one text"),
    ],
)
@pytest.mark.parametrize("at", AT)
def test_cohere_raises_its_own_errors(
    at: str, ask: Any, options: dict[str, Any], error: type[Exception], words: str, embedder: str, reranker: str
) -> None:
    with pytest.raises(error) as raised:
        ask((embedder if ask is embed_v2 else reranker) + at, **options)
    assert words in str(raised.value.body)


def test_cohere_lists_the_models(embedder: str, reranker: str) -> None:
    for url, model, endpoints in ((embedder, EMBEDDER, ["embed", "rerank"]), (reranker, RERANKER, ["rerank"])):
        with cohere.Client(api_key=KEY, base_url=f"{url}/cohere") as client:
            (listed,) = client.models.list().models
            found = client.models.get(model)
            assert (listed.name, found.name) == (model, model)
            assert found.endpoints == endpoints
            assert client.models.list(endpoint="chat").models == []
            with pytest.raises(cohere.NotFoundError, match=model):
                client.models.get("another")
