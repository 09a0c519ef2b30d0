"""LiteLLM, through each of its providers that takes an address."""

from __future__ import annotations

import asyncio
from typing import Any

import litellm
import numpy as np
import pytest

from tests.clients.asked import DOCUMENTS, EMBEDDER, KEY, QUERY, RERANKER, TEXTS, Calls
from tests.clients.conftest import Embedded, Ranked

# The provider, and what it takes for its address.
EMBEDS = {
    "hosted_vllm": "/v1",
    "openai": "/v1",
    "infinity": "/infinity",
    "jina_ai": "/jina/v1",
    "voyage": "/voyage/v1",
    "cohere": "/v2/embed",
}
# For OpenAI it takes `dimensions` of models by certain names alone.
SHORTENED = [provider for provider in EMBEDS if provider != "openai"]
RERANKS = {
    "hosted_vllm": "",
    "infinity": "/infinity",
    "jina_ai": "",  # it drops the path of an address, and asks /v1/rerank
    "voyage": "/voyage/v1",
    "cohere": "/cohere",
    "huggingface": "/tei",
}


def embed(provider: str, url: str, key: str = KEY, **options: Any) -> Any:
    return litellm.embedding(f"{provider}/{EMBEDDER}", TEXTS, api_base=url + EMBEDS[provider], api_key=key, **options)


def embed_as_tei(url: str, route: str) -> Any:
    # Without input_type it would ask huggingface.co what the model does.
    model = f"huggingface/{EMBEDDER}"
    return litellm.embedding(model, TEXTS, api_base=f"{url}/{route}", api_key=KEY, input_type=route)


def rerank(provider: str, url: str, key: str = KEY, **options: Any) -> Any:
    asked = {"query": QUERY, "documents": DOCUMENTS, "api_base": url + RERANKS[provider], "api_key": key}
    return litellm.rerank(f"{provider}/{RERANKER}", **asked, **options)


def vectors(reply: Any) -> np.ndarray:
    return np.array([item["embedding"] for item in reply.data])


CALLS: Calls = {
    **{f"embedding, {provider}": lambda url, provider=provider: embed(provider, url) for provider in EMBEDS},
    **{
        f"embedding, {provider}, dimensions": lambda url, provider=provider: embed(provider, url, dimensions=64)
        for provider in SHORTENED
    },
    "embedding, huggingface": lambda url: embed_as_tei(url, "embed"),
    "embedding, huggingface, similarity": lambda url: embed_as_tei(url, "similarity"),
    **{f"rerank, {provider}": lambda url, provider=provider: rerank(provider, url, top_n=2) for provider in RERANKS},
}


@pytest.mark.parametrize("provider", EMBEDS)
def test_litellm_embeds_through(provider: str, embedder: str, embedded: Embedded) -> None:
    reply = embed(provider, embedder)
    assert np.abs(vectors(reply) - embedded.vectors).max() < 1e-5
    assert reply.usage.prompt_tokens == embedded.tokens


@pytest.mark.parametrize("provider", SHORTENED)
def test_litellm_gets_shorter_vectors_through(provider: str, embedder: str, embedded: Embedded) -> None:
    assert np.abs(vectors(embed(provider, embedder, dimensions=64)) - embedded.short).max() < 1e-5


def test_litellm_embeds_and_compares_through_tei(embedder: str, embedded: Embedded) -> None:
    assert np.abs(vectors(embed_as_tei(embedder, "embed")) - embedded.vectors).max() < 1e-5
    assert np.allclose(
        vectors(embed_as_tei(embedder, "similarity")), embedded.vectors[1:] @ embedded.vectors[0], atol=1e-5
    )


def test_litellm_embeds_without_waiting(embedder: str, embedded: Embedded) -> None:
    async def ask() -> Any:
        reply = await litellm.aembedding(f"hosted_vllm/{EMBEDDER}", TEXTS, api_base=f"{embedder}/v1", api_key=KEY)
        await litellm.close_litellm_async_clients()
        return reply

    assert np.abs(vectors(asyncio.run(ask())) - embedded.vectors).max() < 1e-5


@pytest.mark.parametrize("provider", RERANKS)
def test_litellm_reranks_through(provider: str, reranker: str, ranked: Ranked) -> None:
    results = rerank(provider, reranker, top_n=4).results
    assert [result["index"] for result in results] == ranked.order
    assert np.allclose([result["relevance_score"] for result in results], ranked.scores, atol=1e-5)


@pytest.mark.parametrize("provider", ["hosted_vllm", "infinity", "jina_ai", "voyage"])
def test_litellm_gets_as_many_documents_as_it_asked_for_through(provider: str, reranker: str, ranked: Ranked) -> None:
    results = rerank(provider, reranker, top_n=2, return_documents=True).results
    assert [result["document"]["text"] for result in results] == [DOCUMENTS[index] for index in ranked.order[:2]]


@pytest.mark.parametrize("address", ["", "/tei", "/tei/rerank"])
def test_litellm_gets_the_texts_of_tei(address: str, reranker: str, ranked: Ranked) -> None:
    asked = {"query": QUERY, "documents": DOCUMENTS, "api_base": reranker + address, "api_key": KEY}
    results = litellm.rerank(f"huggingface/{RERANKER}", **asked, return_documents=True).results
    assert [result["document"]["text"] for result in results] == [DOCUMENTS[index] for index in ranked.order]


@pytest.mark.parametrize("address", ["", "/cohere", "/v2/rerank", "/v1/rerank"])
def test_litellm_reranks_at_every_address_of_cohere(address: str, reranker: str, ranked: Ranked) -> None:
    asked = {"query": QUERY, "documents": DOCUMENTS, "api_base": reranker + address, "api_key": KEY}
    results = litellm.rerank(f"cohere/{RERANKER}", **asked).results
    assert [result["index"] for result in results] == ranked.order


def test_litellm_raises_its_own_errors(embedder: str) -> None:
    with pytest.raises(litellm.NotFoundError):
        litellm.embedding("hosted_vllm/another", TEXTS, api_base=f"{embedder}/v1", api_key=KEY)
    with pytest.raises(litellm.BadRequestError, match="matryoshka"):
        embed("hosted_vllm", embedder, dimensions=65)


@pytest.mark.parametrize("provider", EMBEDS)
def test_litellm_shows_its_key_through(provider: str, embedder: str) -> None:
    with pytest.raises(litellm.AuthenticationError):
        embed(provider, embedder, key="wrong")
