"""LlamaIndex's integrations of OpenAI, of Text Embeddings Inference and of Cohere."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference
from llama_index.postprocessor.cohere_rerank import CohereRerank
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

from tests.clients.asked import DOCUMENTS, EMBEDDER, KEY, QUERY, RERANKER, TEXTS, Calls
from tests.clients.conftest import Embedded, Ranked


def openai(url: str, **options: Any) -> OpenAIEmbedding:
    return OpenAIEmbedding(model_name=EMBEDDER, api_base=f"{url}/v1", api_key=KEY, max_retries=0, **options)


def tei(url: str) -> TextEmbeddingsInference:
    return TextEmbeddingsInference(model_name=EMBEDDER, base_url=url, auth_token=KEY)


def rerank_as_cohere(url: str, top_n: int) -> list[NodeWithScore]:
    return CohereRerank(model=RERANKER, base_url=url, api_key=KEY, top_n=top_n).postprocess_nodes(
        nodes(), query_str=QUERY
    )


def rerank_as_tei(url: str, top_n: int) -> list[NodeWithScore]:
    return TextEmbeddingInference(base_url=url, auth_token=f"Bearer {KEY}", top_n=top_n).postprocess_nodes(
        nodes(), query_str=QUERY
    )


def nodes() -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(text=text, id_=str(place))) for place, text in enumerate(DOCUMENTS)]


CALLS: Calls = {
    "OpenAIEmbedding.get_text_embedding_batch": lambda url: openai(url).get_text_embedding_batch(TEXTS),
    "OpenAIEmbedding.get_query_embedding": lambda url: openai(url, dimensions=64).get_query_embedding(TEXTS[0]),
    "TextEmbeddingsInference.get_text_embedding_batch": lambda url: tei(url).get_text_embedding_batch(TEXTS),
    "TextEmbeddingsInference.get_query_embedding": lambda url: tei(url).get_query_embedding(TEXTS[0]),
    "CohereRerank.postprocess_nodes": lambda url: rerank_as_cohere(f"{url}/cohere", 2),
    "TextEmbeddingInference.postprocess_nodes": lambda url: rerank_as_tei(url, 2),
}


def test_llama_index_embeds_through_openai(embedder: str, embedded: Embedded) -> None:
    assert np.abs(np.array(openai(embedder).get_text_embedding_batch(TEXTS)) - embedded.vectors).max() < 1e-5
    short = openai(embedder, dimensions=64).get_query_embedding(TEXTS[0])
    assert np.abs(np.array(short) - embedded.short[0]).max() < 1e-5


def test_llama_index_embeds_through_tei(embedder: str, embedded: Embedded) -> None:
    for at in ("", "/tei"):
        assert np.abs(np.array(tei(embedder + at).get_text_embedding_batch(TEXTS)) - embedded.vectors).max() < 1e-5
        assert np.abs(np.array(tei(embedder + at).get_query_embedding(TEXTS[0])) - embedded.vectors[0]).max() < 1e-5


def test_llama_index_embeds_through_tei_without_waiting(embedder: str, embedded: Embedded) -> None:
    later = asyncio.run(tei(embedder).aget_text_embedding_batch(TEXTS))
    assert np.abs(np.array(later) - embedded.vectors).max() < 1e-5


def test_llama_index_reranks_through_cohere(reranker: str, ranked: Ranked) -> None:
    for at in ("", "/cohere"):
        found = rerank_as_cohere(reranker + at, 3)
        assert [int(node.node_id) for node in found] == ranked.order[:3]
        assert np.allclose([node.score for node in found], ranked.scores[:3], atol=1e-5)


def test_llama_index_reranks_through_tei(reranker: str, ranked: Ranked) -> None:
    for at in ("", "/tei"):
        found = rerank_as_tei(reranker + at, 3)
        assert [int(node.node_id) for node in found] == ranked.order[:3]
        assert np.allclose([node.score for node in found], ranked.scores[:3], atol=1e-5)
