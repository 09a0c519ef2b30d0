"""Poolhouse: an inference engine for pooling models.

from poolhouse import LLM

llm = LLM("intfloat/e5-small")
(output,) = llm.embed("Hello, my name is")
output.outputs.embedding
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from poolhouse.errors import (
    CheckpointError,
    ConfigError,
    EngineClosed,
    EngineError,
    InputTooLong,
    InvalidRequest,
    NonFiniteResult,
    NoStep,
    PoolhouseError,
    UnknownModel,
    UnsupportedDimensions,
    UnsupportedTask,
)
from poolhouse.lora import LoRARequest
from poolhouse.outputs import (
    ChunkedEmbeddingRequestOutput,
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddedChunk,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Entity,
    LateChunk,
    LateChunkingMetadata,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
    SparseMatrix,
    SparseRequestOutput,
    SparseVector,
    TokenClassificationOutput,
    TokenClassificationRequestOutput,
)
from poolhouse.params import LateChunkingParams, PoolerConfig, PoolingParams
from poolhouse.token_embeddings import TokenEmbeddings

if TYPE_CHECKING:
    from poolhouse.llm import LLM

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CheckpointError",
    "ChunkedEmbeddingRequestOutput",
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "ConfigError",
    "EmbeddedChunk",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineClosed",
    "EngineError",
    "Entity",
    "InputTooLong",
    "InvalidRequest",
    "LateChunk",
    "LateChunkingMetadata",
    "LateChunkingParams",
    "LoRARequest",
    "NoStep",
    "NonFiniteResult",
    "PoolerConfig",
    "PoolhouseError",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "RequestOutput",
    "ScoringOutput",
    "ScoringRequestOutput",
    "SparseMatrix",
    "SparseRequestOutput",
    "SparseVector",
    "TokenClassificationOutput",
    "TokenClassificationRequestOutput",
    "TokenEmbeddings",
    "UnknownModel",
    "UnsupportedDimensions",
    "UnsupportedTask",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # LLM draws in torch, which takes a second; the rest of the package's surface does not need it.
    if name == "LLM":
        from poolhouse.llm import LLM

        return LLM
    raise AttributeError(f"module 'poolhouse' has no attribute '{name}'")
