"""Scores of pairs: who scores, what is run for it, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from poolhouse import LLM, InvalidRequest, PoolingParams, UnsupportedTask
from poolhouse.engine.request import Answer
from poolhouse.packing.tokens import Tokens
from poolhouse.plans.combined import mean_max_sim
from poolhouse.plans.scoring import ScoreOptions, plan
from poolhouse.tasks import Task
from poolhouse.testing import FakeEngine
from poolhouse.vectors.max_sim import max_sim

QUERY, DOCUMENTS = "what is a panda", ["a panda is a bear", "the capital of France is Paris", "pandas eat bamboo"]


def fake(tasks: tuple[Task, ...], **facts: Any) -> FakeEngine:
    engine = FakeEngine(tasks=tasks, max_tokens=64)
    engine.describe(**facts)
    return engine


@pytest.fixture(scope="module")
def llm():  # type: ignore[no-untyped-def]
    with LLM() as llm:
        yield llm


def answers(arrays: list[Any]) -> list[Answer]:
    return [Answer(np.array(array, dtype=np.float32), Tokens(np.array([1, 2]))) for array in arrays]


def scores(engine: FakeEngine, queries: list[str], documents: list[str], arrays: list[Any]) -> list[float]:
    made = plan(engine, queries, documents, ScoreOptions())
    assert len(made.requests) == len(arrays)
    return [score.score for score in made.finish(answers(arrays))]


def test_a_bi_encoder_embeds_each_text_once_and_scores_by_cosine(llm: LLM) -> None:
    vectors = llm.embed_array([QUERY, *DOCUMENTS])
    cosines = vectors[1:] @ vectors[0]
    got = llm.score(QUERY, DOCUMENTS)
    assert [output.outputs.score for output in got] == pytest.approx(cosines.tolist(), abs=1e-5)
    assert got[0].outputs.score > got[1].outputs.score
    (one,) = llm.score(QUERY, DOCUMENTS[0])
    assert one.outputs.score == pytest.approx(cosines[0], abs=1e-5)
    many = llm.score([QUERY, DOCUMENTS[0], QUERY], DOCUMENTS)
    expected = [cosines[0], vectors[1] @ vectors[2], cosines[2]]
    assert [output.outputs.score for output in many] == pytest.approx(expected, abs=1e-5)


def test_cosine_needs_no_unit_vectors() -> None:
    engine = fake(("embed", "token_embed"))
    assert scores(engine, ["q"], ["a", "b"], [[3, 0], [5, 0], [0, 2]]) == pytest.approx([1, 0])
    assert scores(engine, ["q"], ["a"], [[0, 0], [5, 0]]) == [0]


def test_a_query_of_many_documents_is_one_request() -> None:
    for task in ("embed", "token_embed"):
        made = plan(fake((task,)), ["q"], ["a", "b", "c"], ScoreOptions())
        assert [request.prompt.text for request in made.requests] == ["q", "a", "b", "c"]
    made = plan(fake(("classify",), labels=1), ["q"], ["a", "b"], ScoreOptions())
    assert [(request.prompt.text, request.prompt.pair) for request in made.requests] == [("q", "a"), ("q", "b")]


def test_max_sim_adds_the_best_product_of_each_query_vector_undivided() -> None:
    query, document = [[1, 0], [0, 2]], [[1, 1], [3, 0], [0, -1]]
    assert scores(fake(("token_embed",)), ["q"], ["d"], [query, document]) == [3 + 2]
    twice = scores(fake(("token_embed",)), ["q"], ["d"], [query * 2, document])
    assert twice == [10]
    # Further documents, one of them without vectors; then pairs.
    many = [query, document, np.empty((0, 2)), [[1, 1]]]
    assert scores(fake(("token_embed",)), ["q"], ["d", "e", "f"], many) == [5, 0, 3]
    assert scores(fake(("token_embed",)), ["q", "p"], ["d", "e"], [query, [[1, 0]], document, [[4, 1]]]) == [5, 4]
    averaging = fake(("token_embed",), mean_max_sim=True)
    assert scores(averaging, ["q"], ["d"], [query * 2, document]) == [2.5]
    assert scores(averaging, ["q"], ["d", "e"], [query * 2, document, np.empty((0, 2))]) == [2.5, 0]


def test_a_text_without_vectors_scores_0() -> None:
    query, nothing = np.ones((2, 3), dtype=np.float32), np.ones((0, 3), dtype=np.float32)
    for one, other in ((query, nothing), (nothing, query), (nothing, nothing)):
        assert max_sim(one, [other]) == mean_max_sim(one, other) == 0
    assert scores(fake(("token_embed",)), ["q"], ["d", "e"], [query, nothing, query]) == [0, 6]


def test_a_cross_encoder_reads_both_texts_together() -> None:
    assert scores(fake(("classify", "token_classify"), labels=1), ["q", "p"], ["a", "b"], [[0.25], [0.5]]) == [
        0.25,
        0.5,
    ]


def test_sides_are_cut_each_to_its_own_limit(llm: LLM) -> None:
    params = PoolingParams(max_tokens_per_query=2, max_tokens_per_doc=3)
    (output,) = llm.score(QUERY, DOCUMENTS[0], pooling_params=params)
    # [CLS] what is [SEP], then [CLS] a panda is [SEP].
    assert len(output.prompt_token_ids) == 4 + 5
    assert output.truncated
    (short,) = llm.score("what is", "a panda is")
    assert output.outputs.score == pytest.approx(short.outputs.score, abs=1e-6)


@pytest.mark.parametrize(
    ("queries", "documents", "message", "field"),
    [
        ([], ["a"], "At least one text element must be given", "data_1"),
        (["q"], [], "At least one text_pair element must be given", "data_2"),
        (["q", "p"], ["a"], "Input lengths must be either 1:1, 1:N or N:N, got 2:1", "data_1"),
        (["q", "p"], ["a", "b", "c"], "Input lengths must be either 1:1, 1:N or N:N, got 2:3", "data_1"),
    ],
)
@pytest.mark.parametrize("engine", [fake(("embed",)), fake(("classify",), labels=1), fake(("token_embed",))])
def test_lists_that_do_not_fit_are_refused(
    engine: FakeEngine, queries: list[str], documents: list[str], message: str, field: str
) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        plan(engine, queries, documents, ScoreOptions())
    assert refused.value.parameter == field


def test_models_that_cannot_score_say_why() -> None:
    with pytest.raises(UnsupportedTask, match=r"only enabled for num_labels == 1.*has 3 labels"):
        plan(fake(("classify",), labels=3), ["q"], ["a"], ScoreOptions())
    with pytest.raises(UnsupportedTask, match=r"does not support the Scoring API.*token_classify"):
        plan(fake(("token_classify",)), ["q"], ["a"], ScoreOptions())
