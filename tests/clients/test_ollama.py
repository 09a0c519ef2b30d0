"""Ollama's own client, and LangChain's, which uses it."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import ollama
import pytest
from langchain_ollama import OllamaEmbeddings

from tests.clients.asked import EMBEDDER, KEY, TEXTS, Calls
from tests.clients.conftest import Embedded

HEADERS = {"Authorization": f"Bearer {KEY}"}


def client(url: str, headers: dict[str, str] | None = None) -> ollama.Client:
    return ollama.Client(host=url, headers=HEADERS if headers is None else headers)


def embed(url: str, **options: Any) -> Any:
    return client(url).embed(**{"model": EMBEDDER, "input": TEXTS} | options)


def langchain(url: str, **options: Any) -> OllamaEmbeddings:
    return OllamaEmbeddings(model=EMBEDDER, base_url=url, client_kwargs={"headers": HEADERS}, **options)


CALLS: Calls = {
    "Client.embed": embed,
    "Client.embed, one text": lambda url: embed(url, input=TEXTS[0], truncate=False, dimensions=64, keep_alive="5m"),
    "Client.embeddings": lambda url: client(url).embeddings(model=EMBEDDER, prompt=TEXTS[0]),
    "Client.list": lambda url: client(url).list(),
    "Client.show": lambda url: client(url).show(EMBEDDER),
    "Client.ps": lambda url: client(url).ps(),
    "OllamaEmbeddings.embed_documents": lambda url: langchain(url, num_ctx=128).embed_documents(TEXTS),
}


def test_ollama_gets_the_offline_vectors_and_counts(embedder: str, embedded: Embedded) -> None:
    reply = embed(embedder)
    assert np.abs(np.array(reply.embeddings) - embedded.vectors).max() < 1e-5
    assert (reply.model, reply.prompt_eval_count) == (EMBEDDER, embedded.tokens)
    assert reply.total_duration > 0
    short = embed(embedder, dimensions=64)
    assert np.abs(np.array(short.embeddings) - embedded.short).max() < 1e-5
    former = client(embedder).embeddings(model=EMBEDDER, prompt=TEXTS[1])
    assert np.abs(np.array(former.embedding) - embedded.vectors[1]).max() < 1e-5


def test_ollama_finds_the_model_by_the_names_that_it_was_told(embedder: str, embedded: Embedded) -> None:
    (listed,) = client(embedder).list().models
    (running,) = client(embedder).ps().models
    assert listed.model == running.model == f"{EMBEDDER}:latest"
    assert np.abs(np.array(embed(embedder, model=listed.model).embeddings) - embedded.vectors).max() < 1e-5
    shown = client(embedder).show(listed.model)
    assert shown.capabilities == ["embedding"]
    assert {"poolhouse.context_length": 256, "poolhouse.embedding_length": 384}.items() <= shown.modelinfo.items()


def test_ollama_calls_without_waiting(embedder: str, embedded: Embedded) -> None:
    async def ask() -> Any:
        async with ollama.AsyncClient(host=embedder, headers=HEADERS) as connected:
            return await asyncio.gather(*(connected.embed(model=EMBEDDER, input=text) for text in TEXTS * 5))

    got = np.array([reply.embeddings[0] for reply in asyncio.run(ask())])
    assert np.abs(got - np.tile(embedded.vectors, (5, 1))).max() < 1e-5


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({"input": "word " * 3000, "truncate": False}, 400, "the input length exceeds the context length"),
        ({"dimensions": 65}, 400, "matryoshka"),
    ],
)
def test_ollama_raises_its_own_errors(embedder: str, options: dict[str, Any], status: int, words: str) -> None:
    with pytest.raises(ollama.ResponseError, match=words) as raised:
        embed(embedder, **options)
    assert raised.value.status_code == status


def test_ollama_needs_a_key(embedder: str) -> None:
    with pytest.raises(ollama.ResponseError) as raised:
        client(embedder, headers={}).list()
    assert (raised.value.status_code, raised.value.error) == (401, "Unauthorized")


def test_langchain_embeds_through_ollama(embedder: str, embedded: Embedded) -> None:
    # It looks for the model in the list first.
    got = langchain(embedder, validate_model_on_init=True).embed_documents(TEXTS)
    assert np.abs(np.array(got) - embedded.vectors).max() < 1e-5
    assert np.abs(np.array(langchain(embedder).embed_query(TEXTS[1])) - embedded.vectors[1]).max() < 1e-5
