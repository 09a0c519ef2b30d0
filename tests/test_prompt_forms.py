"""Every method of LLM takes every kind of column, once, and says which prompt is wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest

from poolhouse import LLM, InvalidRequest
from tests.models.tiny import save_m3

TEXTS = ["w1 w2 w3", "w4", "w5 w6"]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """A model that has most tasks: BGE-M3's."""
    folder = tmp_path_factory.mktemp("m3")
    save_m3(folder)
    with LLM(str(folder)) as llm:
        yield llm


FORMS: dict[str, Callable[[list[Any]], Any]] = {
    "series": lambda texts: pd.Series(texts, index=range(5, 5 + len(texts))),
    "array": np.array,
    "objects": lambda texts: np.array(texts, dtype=object),
    "generator": lambda texts: (text for text in texts),
    "column": lambda texts: datasets.Dataset.from_dict({"text": texts})["text"],
    "tuple": tuple,
}


def arrays(outputs: Any) -> list[np.ndarray]:
    return [output.outputs.array for output in outputs]


CALLS: dict[str, Callable[[LLM, Any], Any]] = {
    "embed": lambda llm, prompts: arrays(llm.embed(prompts)),
    "embed_async": lambda llm, prompts: arrays(asyncio.run(llm.embed_async(prompts))),
    "embed_array": lambda llm, prompts: list(llm.embed_array(prompts)),
    "encode": lambda llm, prompts: arrays(llm.encode(prompts, pooling_task="token_embed")),
    "encode_async": lambda llm, prompts: arrays(asyncio.run(llm.encode_async(prompts, pooling_task="token_embed"))),
    "reward": lambda llm, prompts: arrays(llm.reward(prompts)),
    "embed_tokens": lambda llm, prompts: [np.array(vectors) for vectors in llm.embed_tokens(prompts)],
    "embed_tokens_in_blocks": lambda llm, prompts: [
        np.array(vectors) for block in llm.embed_tokens_in_blocks(prompts, prompts_per_block=2) for vectors in block
    ],
    "embed_sparse": lambda llm, prompts: [output.outputs.weights for output in llm.embed_sparse(prompts)],
    "embed_sparse_array": lambda llm, prompts: [llm.embed_sparse_array(prompts).values],
    "embed_chunks": lambda llm, prompts: [
        chunk.array for output in llm.embed_chunks(prompts, chunk_size=1) for chunk in output.outputs
    ],
    "score, documents": lambda llm, prompts: [[pair.outputs.score for pair in llm.score("w1", prompts)]],
    "score, queries": lambda llm, prompts: [[pair.outputs.score for pair in llm.score(prompts, TEXTS)]],
    "score, mode": lambda llm, prompts: [[pair.outputs.score for pair in llm.score("w1", prompts, mode="weighted")]],
}


@pytest.mark.parametrize("call", CALLS)
def test_a_column_is_a_list_of_prompts(call: str, llm: LLM) -> None:
    expected = CALLS[call](llm, TEXTS)
    assert expected
    for name, form in FORMS.items():
        got = CALLS[call](llm, form(TEXTS))
        assert len(got) == len(expected), name
        for ours, theirs in zip(got, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6, err_msg=name)


# Longer than the model reads, at the third place.
LONG = [*TEXTS[:2], "w1 " * 100, TEXTS[2]]
TAKES_LONG = {"embed_chunks", "score, queries"}


@pytest.mark.parametrize("call", [call for call in CALLS if call not in TAKES_LONG])
def test_the_prompt_that_cannot_be_answered_is_named(call: str, llm: LLM) -> None:
    place = "data_2" if call.startswith("score") else "prompts"
    with pytest.raises(InvalidRequest, match=rf"^{place}\[2\]: .*maximum context length"):
        CALLS[call](llm, LONG)
    with pytest.raises(InvalidRequest, match=rf"^{place}\[2\] is NaN, a missing value"):
        CALLS[call](llm, pd.Series([*TEXTS[:2], None]))
    with pytest.raises(InvalidRequest, match=f"^{place} is a table"):
        CALLS[call](llm, pd.DataFrame({"text": TEXTS}))


def test_the_query_that_cannot_be_answered_is_named(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"^data_1\[2\]: .*maximum context length"):
        llm.score(LONG, [*TEXTS, "w1"])
    with pytest.raises(InvalidRequest, match=r"^data_2\[0\]: .*maximum context length"):
        llm.score("w1", LONG[2])
    with pytest.raises(InvalidRequest, match=r"^This model's maximum context length"):
        llm.embed(LONG[2])


def test_chunks_of_a_column_are_a_list_per_text(llm: LLM) -> None:
    spans = [[(0, 2)], [(0, 2)], [(3, 5)]]
    expected = llm.embed_chunks(TEXTS, chunks=spans)
    got = llm.embed_chunks(pd.Series(TEXTS), chunks=spans)
    assert [chunk.text for output in got for chunk in output.outputs] == ["w1", "w4", "w6"]
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours.outputs[0].array, theirs.outputs[0].array, atol=1e-6)


def test_weights_of_tokens_are_one_number_each(llm: LLM) -> None:
    (output,) = llm.encode(TEXTS[0], pooling_task="token_classify")
    # <s> and </s> have none.
    assert output.outputs.array.shape == output.outputs.data.shape == (3,)
    (asked,) = asyncio.run(llm.encode_async(TEXTS[0], pooling_task="token_classify"))
    assert asked.outputs.array.shape == (3,)


def test_a_model_may_be_named_by_a_path(tmp_path: Path) -> None:
    save_m3(tmp_path)
    with LLM(tmp_path, tokenizer=tmp_path) as llm:
        assert llm.engine.facts.name == str(tmp_path)
