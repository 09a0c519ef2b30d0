"""Infinity's own client, whose last release wants an older httpx than anything else here.

To record it: an environment with `infinity-client` alone, and `python -m tests.clients.record infinity`.
"""

from __future__ import annotations

from infinity_client import AuthenticatedClient
from infinity_client.api.default import classify, embeddings, health, models, rerank
from infinity_client.models import ClassifyInput, RerankInput
from infinity_client.models.open_ai_embedding_input_text import OpenAIEmbeddingInputText

from tests.clients.asked import CLASSIFIER, DOCUMENTS, EMBEDDER, KEY, QUERY, RERANKER, TEXTS, Calls


def client(url: str) -> AuthenticatedClient:
    return AuthenticatedClient(f"{url}/infinity", KEY, raise_on_unexpected_status=True)


TEXT = OpenAIEmbeddingInputText
RERANK = RerankInput(QUERY, DOCUMENTS, model=RERANKER, top_n=2, return_documents=True, raw_scores=True)

CALLS: Calls = {
    "embeddings": lambda url: embeddings.sync(client=client(url), body=TEXT(TEXTS, model=EMBEDDER)),
    "embeddings, no model": lambda url: embeddings.sync(client=client(url), body=TEXT(TEXTS[0])),
    # It asks for base64 too, but cannot read the answer.
    "embeddings, dimensions": lambda url: embeddings.sync(
        client=client(url), body=TEXT(TEXTS, model=EMBEDDER, dimensions=64)
    ),
    "rerank": lambda url: rerank.sync(client=client(url), body=RerankInput(QUERY, DOCUMENTS)),
    "rerank, options": lambda url: rerank.sync(client=client(url), body=RERANK),
    "classify": lambda url: classify.sync(client=client(url), body=ClassifyInput(TEXTS, model=CLASSIFIER)),
    "models": lambda url: models.sync(client=client(url)),
    "health": lambda url: health.sync(client=client(url)),
}
