"""Hugging Face's Text Embeddings Inference: its routes at their own paths, and all of them under /tei.

Source: text-embeddings-inference 1.9. Where ours can do more (pairs scored by any model), it does.
"""

from __future__ import annotations

from poolhouse.server.dialects.tei.errors import shape
from poolhouse.server.dialects.tei.fields import EmbedFields, PredictFields, RerankFields, SimilarityFields, TokenFields
from poolhouse.server.dialects.tei.routes import answer_rerank, by_model, prefixed_router, router
from poolhouse.server.dialects.tei.tokens import TokenizeFields, answer_tokenize

__all__ = [
    "EmbedFields",
    "PredictFields",
    "RerankFields",
    "SimilarityFields",
    "TokenFields",
    "TokenizeFields",
    "answer_rerank",
    "answer_tokenize",
    "by_model",
    "prefixed_router",
    "router",
    "shape",
]
