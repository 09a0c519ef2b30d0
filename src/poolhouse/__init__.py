"""Poolhouse: an inference engine for pooling models.

from poolhouse import LLM

llm = LLM("intfloat/e5-small")
(output,) = llm.embed("Hello, my name is")
output.outputs.embedding
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from poolhouse.cli.serve import asgi
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
    from poolhouse.inputs.prompts import PromptInput, PromptsInput
    from poolhouse.llm import LLM
    from poolhouse.outputs import (
        ChunkedEmbeddingRequestOutput,
        ClassificationOutput,
        ClassificationRequestOutput,
        EmbeddedChunk,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        Entity,
        ExtractionOutput,
        ExtractionRequestOutput,
        LateChunk,
        LateChunkingMetadata,
        PoolingOutput,
        PoolingRequestOutput,
        RequestOutput,
        ScoringOutput,
        ScoringRequestOutput,
        Sentence,
        SparseMatrix,
        SparseRequestOutput,
        SparseVector,
        TokenClassificationOutput,
        TokenClassificationRequestOutput,
    )
    from poolhouse.params import LateChunkingParams, LoRARequest, PoolerConfig, PoolingParams, PruningParams
    from poolhouse.vectors.muvera import Muvera
    from poolhouse.vectors.token_embeddings import TokenEmbeddings
    from poolhouse.version import __version__

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
    "ExtractionOutput",
    "ExtractionRequestOutput",
    "InputTooLong",
    "InvalidRequest",
    "LateChunk",
    "LateChunkingMetadata",
    "LateChunkingParams",
    "LoRARequest",
    "Muvera",
    "NoStep",
    "NonFiniteResult",
    "PoolerConfig",
    "PoolhouseError",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "PromptInput",
    "PromptsInput",
    "PruningParams",
    "RequestOutput",
    "ScoringOutput",
    "ScoringRequestOutput",
    "Sentence",
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
    "asgi",
]

# Where names stand. Nothing is drawn in before it is used: the command line must hear a signal at once, and torch takes long.
_HOMES = ("errors", "params", "outputs", "vectors.muvera", "vectors.token_embeddings")
_LATE = {
    "LLM": "llm",
    "PromptInput": "inputs.prompts",
    "PromptsInput": "inputs.prompts",
    "__version__": "version",
    "asgi": "cli.serve",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in (_LATE[name],) if name in _LATE else _HOMES:
            module = import_module(f"{__name__}.{home}")
            if hasattr(module, name):
                return globals().setdefault(name, getattr(module, name))
    elif not name.startswith("_"):
        # A module is an attribute, whether somebody has imported it or not.
        try:
            return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
