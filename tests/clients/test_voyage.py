"""Voyage's own client, under /voyage/v1."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import voyageai

from tests.clients.asked import DOCUMENTS, EMBEDDER, KEY, QUERY, RERANKER, TEXTS, Calls
from tests.clients.conftest import Embedded, Ranked


def embed(url: str, key: str = KEY, **options: Any) -> Any:
    return ask(url, key, lambda client: client.embed(TEXTS, **{"model": EMBEDDER} | options))


def rerank(url: str, **options: Any) -> Any:
    return ask(url, KEY, lambda client: client.rerank(QUERY, DOCUMENTS, model=RERANKER, **options))


def ask(url: str, key: str, call: Callable[[voyageai.Client], Any]) -> Any:
    """What a client is answered; in a thread of its own, because connections live as long as theirs."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call, voyageai.Client(api_key=key, base_url=f"{url}/voyage/v1")).result()


CALLS: Calls = {
    "Client.embed": embed,
    "Client.embed, int8": lambda url: embed(
        url, input_type="document", output_dtype="int8", output_dimension=64, truncation=False
    ),
    "Client.rerank": lambda url: rerank(url, top_k=2),
}


def test_voyage_embeds_texts(embedder: str, embedded: Embedded) -> None:
    reply = embed(embedder)
    assert np.abs(np.array(reply.embeddings) - embedded.vectors).max() < 1e-5
    assert reply.total_tokens == embedded.tokens
    short = embed(embedder, output_dimension=64)
    assert np.abs(np.array(short.embeddings) - embedded.short).max() < 1e-5


def test_voyage_gets_every_type_of_embedding(embedder: str, embedded: Embedded) -> None:
    def of(kind: str) -> np.ndarray:
        return np.array(embed(embedder, output_dtype=kind, output_dimension=64).embeddings)

    bits = np.packbits(embedded.short > 0, axis=1)
    assert np.array_equal(of("ubinary"), bits)
    assert np.array_equal(of("binary"), bits.astype(np.int16) - 128)
    signed = of("int8")
    assert signed.shape == embedded.short.shape
    assert np.array_equal(of("uint8"), signed + 128)


def test_voyage_reranks(reranker: str, ranked: Ranked) -> None:
    reply = rerank(reranker)
    assert [result.index for result in reply.results] == ranked.order
    assert np.allclose([result.relevance_score for result in reply.results], ranked.scores, atol=1e-5)
    assert reply.total_tokens == ranked.tokens
    assert [result.document for result in rerank(reranker, top_k=1).results] == [DOCUMENTS[ranked.order[0]]]


def test_voyage_calls_without_waiting(embedder: str, embedded: Embedded) -> None:
    connected = voyageai.AsyncClient(api_key=KEY, base_url=f"{embedder}/voyage/v1")
    reply = asyncio.run(connected.embed(TEXTS, model=EMBEDDER))
    assert np.abs(np.array(reply.embeddings) - embedded.vectors).max() < 1e-5


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"key": "wrong"}, voyageai.error.AuthenticationError, None),
        ({"output_dimension": 65}, voyageai.error.InvalidRequestError, "matryoshka"),
        ({"output_dtype": "float8"}, voyageai.error.InvalidRequestError, "output_dtype"),
        ({"model": "another"}, voyageai.error.InvalidRequestError, "another"),
    ],
)
def test_voyage_raises_its_own_errors(
    embedder: str, options: dict[str, Any], error: type[Exception], words: str | None
) -> None:
    with pytest.raises(error, match=words):
        embed(embedder, **options)
