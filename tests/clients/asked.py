"""What every client asks: the same texts of the same models, with the same key."""

from __future__ import annotations

from collections.abc import Callable

KEY = "a-key-of-ours"
EMBEDDER = "all-MiniLM-L6-v2"
RERANKER = "tiny-reranker"
CLASSIFIER = "tiny-classifier"

TEXTS = ["The Eiffel Tower stands in Paris.", "Ünïcode, 数字 and UPPER CASE", "a"]
QUERY = "How do I reset my password?"
DOCUMENTS = [
    "To reset your password, open Settings.",
    "The Eiffel Tower is 330 metres tall.",
    "Paris",
    "Choose Reset password, and open Settings again.",
]

# What a client does to a server at a URL, by name.
Calls = dict[str, Callable[[str], object]]
