"""LangChain's integrations of OpenAI and Cohere."""

from __future__ import annotations

from typing import Any

import numpy as np
from langchain_cohere import CohereEmbeddings, CohereRerank
from langchain_core.documents import Document
from langchain_openai import OpenAIEmbeddings

from tests.clients.asked import DOCUMENTS, EMBEDDER, KEY, QUERY, RERANKER, TEXTS, Calls
from tests.clients.conftest import Embedded, Ranked


def openai(url: str, **options: Any) -> OpenAIEmbeddings:
    # Otherwise it would send OpenAI's token ids, which mean other words to every other model.
    return OpenAIEmbeddings(
        model=EMBEDDER, base_url=f"{url}/v1", api_key=KEY, check_embedding_ctx_length=False, **options
    )


def cohere(url: str) -> CohereEmbeddings:
    return CohereEmbeddings(model=EMBEDDER, base_url=url, cohere_api_key=KEY)


def rerank(url: str, top_n: int) -> list[Document]:
    documents = [Document(page_content=text, metadata={"place": place}) for place, text in enumerate(DOCUMENTS)]
    return CohereRerank(model=RERANKER, base_url=url, cohere_api_key=KEY, top_n=top_n).compress_documents(
        documents, QUERY
    )


CALLS: Calls = {
    "OpenAIEmbeddings.embed_documents": lambda url: openai(url).embed_documents(TEXTS),
    "OpenAIEmbeddings.embed_query": lambda url: openai(url, dimensions=64).embed_query(TEXTS[0]),
    "CohereEmbeddings.embed_documents": lambda url: cohere(url).embed_documents(TEXTS),
    "CohereEmbeddings.embed_query": lambda url: cohere(url).embed_query(TEXTS[0]),
    "CohereRerank.compress_documents": lambda url: rerank(f"{url}/cohere", 2),
}


def test_langchain_embeds_through_openai(embedder: str, embedded: Embedded) -> None:
    assert np.abs(np.array(openai(embedder).embed_documents(TEXTS)) - embedded.vectors).max() < 1e-5
    short = openai(embedder, dimensions=64).embed_query(TEXTS[0])
    assert np.abs(np.array(short) - embedded.short[0]).max() < 1e-5
    in_parts = openai(embedder, chunk_size=2).embed_documents(TEXTS)
    assert np.abs(np.array(in_parts) - embedded.vectors).max() < 1e-5


def test_langchain_embeds_through_cohere(embedder: str, embedded: Embedded) -> None:
    for at in ("", "/cohere"):
        assert np.abs(np.array(cohere(embedder + at).embed_documents(TEXTS)) - embedded.vectors).max() < 1e-5
        assert np.abs(np.array(cohere(embedder + at).embed_query(TEXTS[0])) - embedded.vectors[0]).max() < 1e-5


def test_langchain_reranks_through_cohere(reranker: str, ranked: Ranked) -> None:
    for at in ("", "/cohere"):
        documents = rerank(reranker + at, 3)
        assert [document.metadata["place"] for document in documents] == ranked.order[:3]
        scores = [document.metadata["relevance_score"] for document in documents]
        assert np.allclose(scores, ranked.scores[:3], atol=1e-5)
