"""The servers that can be measured: where each is asked, what its bodies look like, how its answers are counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Backend:
    """A route of a server.

    body: a query and the items of a request to its body; only rerankers look at the query.
    answers: a parsed reply to the list that holds an answer per item.
    base64: what a body holds more when vectors shall come in base64; none where that is not offered.
    float: the same for numbers, where they are not the default of the route.
    """

    path: str
    body: Callable[[str, Sequence[str]], Body]
    answers: Callable[[Any], Any]
    base64: Mapping[str, Any] | None = None
    float: Mapping[str, Any] | None = None


def _one_or_many(field: str) -> Callable[[str, Sequence[str]], Body]:
    """A single text stands alone, as clients send it."""
    return lambda _, items: {field: items[0] if len(items) == 1 else list(items)}


def _many(field: str) -> Callable[[str, Sequence[str]], Body]:
    return lambda _, items: {field: list(items)}


def _ranked(documents: str, query: str = "query", **fixed: Any) -> Callable[[str, Sequence[str]], Body]:
    return lambda asked, items: {query: asked, documents: list(items), **fixed}


def _under(field: str) -> Callable[[Any], Any]:
    return lambda reply: reply[field]


def _bare(reply: Any) -> Any:
    return reply


def _of_first_type(reply: Any) -> Any:
    """Cohere's vectors, by the type that was asked for; its replies name the other types too, as null."""
    return next(vectors for vectors in reply["embeddings"].values() if vectors)


_OPENAI_FORMS: Any = {"base64": {"encoding_format": "base64"}, "float": {"encoding_format": "float"}}

BACKENDS: Mapping[str, Backend] = {
    "openai-embeddings": Backend("/v1/embeddings", _one_or_many("input"), _under("data"), **_OPENAI_FORMS),
    "vllm-pooling": Backend("/pooling", _one_or_many("input"), _under("data"), **_OPENAI_FORMS),
    "vllm-classify": Backend("/classify", _one_or_many("input"), _under("data")),
    "vllm-score": Backend("/score", _ranked("text_2", query="text_1"), _under("data")),
    "vllm-rerank": Backend("/rerank", _ranked("documents"), _under("results")),
    # No input_type, which Cohere itself demands: servers refuse it for models without prompts.
    "cohere-embed": Backend(
        "/v2/embed",
        _many("texts"),
        _of_first_type,
        base64={"embedding_types": ["base64"]},
        float={"embedding_types": ["float"]},
    ),
    "cohere-rerank": Backend("/v2/rerank", _ranked("documents"), _under("results")),
    "jina-embeddings": Backend("/v1/embeddings", _many("input"), _under("data"), base64={"embedding_type": "base64"}),
    "jina-rerank": Backend("/v1/rerank", _ranked("documents", return_documents=False), _under("results")),
    "voyage-embeddings": Backend(
        "/v1/embeddings", _many("input"), _under("data"), base64={"encoding_format": "base64"}
    ),
    "voyage-rerank": Backend("/v1/rerank", _ranked("documents"), _under("data")),
    "tei-embed": Backend("/embed", _one_or_many("inputs"), _bare),
    "tei-embed-sparse": Backend("/embed_sparse", _one_or_many("inputs"), _bare),
    # Two bare texts would be a pair; a list of lists never is.
    "tei-predict": Backend("/predict", lambda _, items: {"inputs": [[item] for item in items]}, _bare),
    "tei-rerank": Backend("/rerank", _ranked("texts"), _bare),
    "infinity-embeddings": Backend("/embeddings", _many("input"), _under("data"), **_OPENAI_FORMS),
    "infinity-classify": Backend("/classify", _many("input"), _under("data")),
    "infinity-rerank": Backend("/rerank", _ranked("documents"), _under("results")),
    "nvidia-ranking": Backend(
        "/v1/ranking",
        lambda query, items: {"query": {"text": query}, "passages": [{"text": item} for item in items]},
        _under("rankings"),
    ),
}


class WrongReply(Exception):
    """A reply of status 200 that does not answer what was asked."""


def check_answers(backend: Backend, body: bytes, items: int) -> int:
    """The tokens that the reply counts, 0 where it counts none.

    Raises:
        WrongReply: no JSON, another shape, or not as many answers as items.
    """
    try:
        reply = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise WrongReply(f"The reply is no JSON; it begins with {body[:60]!r}.") from None
    try:
        answers = backend.answers(reply)
        count = len(answers) if isinstance(answers, list) else None
    except (KeyError, TypeError, AttributeError, StopIteration):
        count = None
    if count is None:
        raise WrongReply(f"The reply is of another shape than this backend's; it begins with {body[:60]!r}.")
    if count != items:
        raise WrongReply(f"The reply holds {count} answers to {items} items.")
    usage = reply.get("usage") if isinstance(reply, dict) else None
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    return tokens if isinstance(tokens, int) else 0


def said_by(body: bytes) -> str:
    """What a reply of failure says, in any dialect; at most 300 characters."""
    try:
        said = orjson.loads(body)
    except orjson.JSONDecodeError:
        said = body.decode("utf-8", "replace")
    while isinstance(said, dict):
        said = next((said[name] for name in ("message", "error", "detail") if said.get(name)), str(said))
    return str(said).strip()[:300]
