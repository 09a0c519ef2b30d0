"""A small retrieval task on real weights: the embedded model finds what sentence-transformers finds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from poolhouse import LLM
from poolhouse.data import passages, queries, queries_with_answers
from poolhouse.models.files.hub import embedded_model


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM() as llm:
        yield llm


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    """Scores of sentence-transformers, [queries, passages]."""
    model = SentenceTransformer(str(embedded_model()))
    return np.asarray(model.similarity(model.encode(queries()), model.encode(passages())))


def test_every_question_ranks_the_passages_as_sentence_transformers_does(llm: LLM, reference: np.ndarray) -> None:
    scores = llm.embed_array(queries()) @ llm.embed_array(passages()).T
    assert np.array_equal(np.argsort(-scores, axis=1), np.argsort(-reference, axis=1))
    assert np.abs(scores - reference).max() < 1e-5


def test_the_answer_to_every_question_comes_first(llm: LLM) -> None:
    for question, answer in queries_with_answers():
        scores = [output.outputs.score for output in llm.score(question, passages())]
        assert int(np.argmax(scores)) == answer, question


def test_score_by_cosine_equals_the_reference(llm: LLM, reference: np.ndarray) -> None:
    for row, question in enumerate(queries()):
        scores = [output.outputs.score for output in llm.score(question, passages())]
        assert scores == pytest.approx(reference[row], abs=1e-5)
