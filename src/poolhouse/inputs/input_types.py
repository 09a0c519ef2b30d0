"""What callers say a text is (a query, a document), and which of a checkpoint's prompts that means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from poolhouse.errors import InvalidRequest, did_you_mean

Role = Literal["query", "document"]

# One idea, as sentence-transformers, Cohere, Voyage, NVIDIA, Jina and Google write it; checkpoints name prompts likewise.
_WORDS: Mapping[Role, tuple[str, ...]] = {
    "query": ("query", "search_query", "retrieval.query", "retrieval_query", "s2p_query"),
    "document": ("document", "passage", "search_document", "corpus", "retrieval.passage", "retrieval_document"),
}
# Words of Cohere's and Jina's APIs that a model without such a prompt may ignore: its vectors serve every use, unless
# it has tasks.
_OTHER_USES = ("classification", "clustering", "separation", "text-matching", "semantic_similarity")


def role_of(input_type: str | None) -> Role | None:
    """The side of a search that a text stands on, or None where the word says no side."""
    word = (input_type or "").lower()
    return next((role for role, words in _WORDS.items() if word in words), None)


def prompt_of(input_type: str, prompts: Mapping[str, str], others: Sequence[str] = ()) -> str | None:
    """The name of the prompt that this input type means, or None where the model has none for it.

    prompts: those of the checkpoint, by name. others: its tasks, where it has a way of its own to read for each.

    Raises:
        InvalidRequest: neither a known input type nor the name of a prompt.
    """
    names = {name.lower(): name for name in prompts}
    word = input_type.lower()
    role = role_of(word)
    for candidate in (word, *(_WORDS[role] if role else ())):
        if candidate in names:
            return names[candidate]
    if role is None and word not in (map(str.lower, others) if others else _OTHER_USES):
        known = sorted({*prompts, *others, "query", "document"})
        raise InvalidRequest(
            f"Unsupported input_type '{input_type}'.{did_you_mean(input_type, known)} Supported values: {known}",
            "input_type",
            input_type,
        )
    return None
