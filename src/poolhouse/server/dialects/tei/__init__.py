"""Hugging Face's Text Embeddings Inference: its routes at their own paths, and all of them under /tei.

Source: text-embeddings-inference 1.9. Where ours can do more (pairs scored by any model), it does.
"""

from __future__ import annotations

from poolhouse.server.dialects.tei.errors import ERRORS, shape
from poolhouse.server.dialects.tei.fields import (
    EmbedFields,
    PredictFields,
    RerankFields,
    SimilarityFields,
    TokenFields,
    TokenizeFields,
)
from poolhouse.server.dialects.tei.routes import (
    OWN,
    PREFIXED,
    EmbedReply,
    EmbedSparseReply,
    PredictReply,
    RerankReply,
    SimilarityReply,
    by_model,
    rerank,
)
from poolhouse.server.dialects.tei.tokens import TokenizeReply, tokenize

__all__ = [
    "ERRORS",
    "OWN",
    "PREFIXED",
    "EmbedFields",
    "EmbedReply",
    "EmbedSparseReply",
    "PredictFields",
    "PredictReply",
    "RerankFields",
    "RerankReply",
    "SimilarityFields",
    "SimilarityReply",
    "TokenFields",
    "TokenizeFields",
    "TokenizeReply",
    "by_model",
    "rerank",
    "shape",
    "tokenize",
]
