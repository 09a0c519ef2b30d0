"""Data: a small corpus in the package, questions about it, and texts of varied or given length from it."""

from __future__ import annotations

import random
from importlib.resources import files


def passages() -> list[str]:
    """The corpus, from three words to over a hundred."""
    return _lines("passages.txt")


def queries() -> list[str]:
    """Questions about the corpus."""
    return [question for question, _ in queries_with_answers()]


def queries_with_answers() -> list[tuple[str, int]]:
    """Questions, each with the index of the passage that answers it."""
    corpus = passages()
    pairs = [line.split("\t") for line in _lines("queries.txt")]
    return [
        (question, next(index for index, passage in enumerate(corpus) if passage.startswith(beginning)))
        for question, beginning in pairs
    ]


def ragged_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of real sentences with lengths as in documents: from 3 words to some hundreds, 70 on average."""
    source = random.Random(seed)  # noqa: S311 - repeatable, not secret
    sentences = [sentence.strip() for passage in passages() for sentence in passage.replace("; ", ". ").split(". ")]
    texts = []
    for _ in range(count):
        words = source.lognormvariate(3.9, 0.85)
        text = source.choice(sentences)
        while text.count(" ") + 1 < words:
            text += ". " + source.choice(sentences)
        texts.append(text)
    return texts


def short_texts(count: int, min_words: int, max_words: int, seed: int = 0) -> list[str]:
    """Pieces of the corpus of min_words to max_words, lengths drawn evenly; hardly any two are equal."""
    source = random.Random(seed)  # noqa: S311 - repeatable, not secret
    words = " ".join(passages()).split()
    texts = []
    for _ in range(count):
        start, size = source.randrange(len(words)), source.randint(min_words, max_words)
        texts.append(" ".join(words[(start + step) % len(words)] for step in range(size)))
    return texts


def _lines(name: str) -> list[str]:
    text = (files(__name__) / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line]
