"""Warm-up: what is run before callers come."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from poolhouse import LLM, EngineError
from poolhouse.engine.engine import Engine
from poolhouse.packing.pack import Batch
from tests.checkpoints import save_checkpoint


def watched(engine: Engine, failure: Exception | None = None, **options: Any) -> tuple[list[tuple[int, ...]], Engine]:
    """An engine that notes the lengths of each pack, or fails."""
    packs: list[tuple[int, ...]] = []

    def backbone(batch: Batch) -> Tensor:
        packs.append(batch.segments.lengths)
        if failure is not None:
            raise failure
        return engine.model.backbone(batch)

    made = Engine(replace(engine.model, backbone=backbone), engine.tokenizer, replace(engine.options, **options))
    return packs, made


@pytest.fixture(params=["Model", "ForSequenceClassification", "ForTokenClassification"])
def llm(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    save_checkpoint(tmp_path, "bert, wordpiece", request.param)
    with LLM(str(tmp_path), max_num_batched_tokens=256) as llm:
        yield llm


def test_none_runs_nothing(llm: LLM) -> None:
    packs, engine = watched(llm.engine)
    with engine:
        engine.warm_up("none")
    assert packs == []


def test_fast_runs_a_short_prompt_for_each_task(llm: LLM) -> None:
    packs, engine = watched(llm.engine)
    with engine:
        engine.warm_up("fast")
        assert engine.pending == 0
    assert sum(map(len, packs)) == len(engine.facts.tasks)
    assert max(map(max, packs)) < 64


def test_full_fills_batches_of_every_length_up_to_the_limit(llm: LLM) -> None:
    packs, engine = watched(llm.engine)
    with engine:
        engine.warm_up("full")
        assert engine.pending == 0
    for length in (8, 16, 32, 64):
        assert (length,) in packs
        assert (length,) * (256 // length) in packs
    assert max(map(sum, packs)) == 256


@pytest.mark.parametrize(("options", "longest"), [({"max_batch_tokens": 40}, 40), ({"max_prompt_tokens": 20}, 20)])
def test_no_prompt_is_longer_than_a_batch_or_than_callers_may_send(
    llm: LLM, options: dict[str, int], longest: int
) -> None:
    packs, engine = watched(llm.engine, **options)
    with engine:
        engine.warm_up("full")
    assert max(map(max, packs)) == longest


def test_what_fails_is_raised(llm: LLM) -> None:
    _, engine = watched(llm.engine, RuntimeError("no kernel for this device"))
    with engine, pytest.raises(EngineError, match="no kernel for this device"):
        engine.warm_up("fast")


def test_a_model_that_answers_at_certain_tokens_only_is_warm_all_the_same(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "bert, wordpiece", "ForTokenClassification")
    with LLM(str(tmp_path), pooler_config={"tok_pooling_type": "STEP", "step_tag_id": 1}) as llm:
        packs, engine = watched(llm.engine)
        with engine:
            engine.warm_up("full")
    assert len(packs) > 3
