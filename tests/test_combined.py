"""Modes of a score: what is asked of each text, how it is weighed, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from poolhouse import LLM, InvalidRequest, UnsupportedTask
from poolhouse.engine.request import Answer
from poolhouse.inputs.limits import Limit
from poolhouse.packing.tokens import Tokens
from poolhouse.params import PoolingParams
from poolhouse.plans.scoring import ScoreOptions, ScorePlan, plan
from poolhouse.tasks import SparseHead, Task
from poolhouse.testing import FakeEngine

HEAD = SparseHead("token_classify", "token", 99, (0, 2), frozenset((0, 1, 2)))
ALL: tuple[Task, ...] = ("embed", "token_embed", "token_classify")
QUERY, DOCUMENTS = "a query", ["a document", "another"]


class Engine(FakeEngine):
    """What scoring asks of an engine, beside what a FakeEngine has."""

    score_template = None
    listwise = None

    def limit(self, params: PoolingParams) -> Limit:
        return Limit(64)


def answer(task: Task, dense: Any, weights: Any, rows: Any, ids: Any) -> Answer:
    arrays: dict[Task, Any] = {
        "embed": np.array(dense, dtype=np.float32),
        "token_classify": np.array(weights, dtype=np.float32)[:, None],
        "token_embed": np.array(rows, dtype=np.float32),
    }
    return Answer(arrays[task], Tokens(np.array(ids)), further=arrays)


def scores(made: ScorePlan) -> list[float]:
    task = made.requests[0].task
    answers = [
        answer(task, [3, 4], [0.5, 2], [[1, 0], [0, 1]], [0, 7, 8, 2]),
        answer(task, [4, 3], [1, 0.25], [[0.5, 0.5], [0, 0.25]], [0, 8, 9, 2]),
        answer(task, [0, -1], [3], [[-1, 0.5]], [0, 7, 2]),
    ]
    return [score.score for score in made.finish(answers)]


# Cosines; products of the weights of tokens that both have; the mean over query vectors of the best product.
DENSE, SPARSE, COLBERT = np.array([0.96, -0.8]), np.array([2.0, 1.5]), np.array([0.5, -0.25])


@pytest.mark.parametrize(
    ("mode", "weights", "asked", "expected"),
    [
        ("dense", None, ("embed",), DENSE),
        ("sparse", None, ("token_classify",), SPARSE),
        ("colbert", None, ("token_embed",), COLBERT),
        ("sparse+dense", None, ("embed", "token_classify"), (DENSE + SPARSE) / 2),
        ("sparse+dense", (1, 3, 9), ("embed", "token_classify"), (DENSE + 3 * SPARSE) / 4),
        ("colbert+sparse+dense", None, ("embed", "token_classify", "token_embed"), (DENSE + SPARSE + COLBERT) / 3),
        ("weighted", (0.4, 0.2, 0.4), ("embed", "token_classify", "token_embed"), 0.4 * DENSE + 0.2 * SPARSE + 0.4 * COLBERT),
        # A part that weighs nothing is not computed.
        ("weighted", (1, 0, 3), ("embed", "token_embed"), (DENSE + 3 * COLBERT) / 4),
        ("weighted", (0, 2, 0), ("token_classify",), SPARSE),
    ],
)  # fmt: skip
def test_a_mode_compares_its_parts_from_one_pass(mode: str, weights: Any, asked: Any, expected: Any) -> None:
    made = plan(Engine(tasks=ALL, sparse=HEAD), [QUERY], DOCUMENTS, ScoreOptions(mode=mode, weights=weights))
    assert [(request.task, *request.further) for request in made.requests] == [asked] * 3
    assert [request.input_type for request in made.requests] == ["query", "document", "document"]
    assert scores(made) == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("asked", "message", "parameter"),
    [
        (ScoreOptions(mode="lexical"), "Unknown mode 'lexical'.*Modes of a score", "mode"),
        (ScoreOptions(mode="spars"), "Did you mean 'sparse'", "mode"),
        (ScoreOptions(mode="weighted", weights=(1, 1)), "must be 3 numbers, of the dense, sparse and colbert.*got 2", "weights"),
        (ScoreOptions(mode="weighted", weights=(1, -1, 1)), "numbers from 0", "weights"),
        (ScoreOptions(mode="weighted", weights=(1, float("nan"), 1)), "numbers from 0", "weights"),
        (ScoreOptions(mode="weighted", weights=(0, 0, 0)), "nothing to compare", "weights"),
        (ScoreOptions(mode="sparse+dense", weights=(0, 0, 1)), "nothing to compare", "weights"),
        (ScoreOptions(mode="dense", weights=(1, 1, 1)), "weights are for 'weighted'", "weights"),
        (ScoreOptions(weights=(1, 1, 1)), "weights are for mode='weighted'", "weights"),
        (ScoreOptions(mode="dense", instruction="Judge."), "reads no instruction", "instruction"),
    ],
)  # fmt: skip
def test_modes_and_weights_that_mean_nothing_are_refused(asked: ScoreOptions, message: str, parameter: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as raised:
        plan(Engine(tasks=ALL, sparse=HEAD), [QUERY], DOCUMENTS, asked)
    assert raised.value.parameter == parameter


def test_a_model_that_lacks_a_part_says_which_modes_it_has() -> None:
    expected = r"mode='weighted' compares sparse answers, which this model does not give.*\['dense', 'colbert'\]"
    with pytest.raises(UnsupportedTask, match=expected):
        plan(Engine(), [QUERY], DOCUMENTS, ScoreOptions(mode="weighted"))
    with pytest.raises(UnsupportedTask, match=r"compares dense answers.*none"):
        plan(Engine(tasks=("classify",)), [QUERY], DOCUMENTS, ScoreOptions(mode="dense"))
    splade = Engine(sparse=SparseHead("embed", "vocabulary", 8))
    with pytest.raises(UnsupportedTask, match=r"compares colbert answers.*\['dense', 'sparse', 'sparse\+dense'\]"):
        plan(splade, [QUERY], DOCUMENTS, ScoreOptions(mode="colbert"))


def test_the_default_of_a_dense_model_is_its_dense_mode() -> None:
    with LLM() as llm:
        default = [output.outputs.score for output in llm.score(QUERY, DOCUMENTS)]
        dense = [output.outputs.score for output in llm.score(QUERY, DOCUMENTS, mode="dense")]
    assert dense == pytest.approx(default, abs=1e-6)
