"""One engine asked for everything at once: what each gets is what it gets alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poolhouse import LLM, NonFiniteResult, PoolingParams
from poolhouse.engine import runner
from poolhouse.engine.request import Answer, Request
from poolhouse.inputs.prompts import Prompt
from poolhouse.llm import calls
from poolhouse.tasks import Task
from tests.models.adapters import save_adapter
from tests.models.tiny import LAYERS, TEXTS, save, tokenizer
from tests.test_not_finite import break_token

# Sums of a pack come in another order than those of one text, in float32.
TOLERANCE = 1e-5
RAW = PoolingParams(use_activation=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cross-encoder")
    tokenizer(folder)
    save(folder, "BertForSequenceClassification", "BertConfig", LAYERS, num_labels=1)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    modules = {}
    for seed, name in enumerate(("law", "art")):
        modules[name] = str(tmp_path_factory.mktemp(name))
        save_adapter(folder, Path(modules[name]), "BertModel", seed, target_modules=["query", "value", "output.dense"])
    with LLM(str(folder), lora_modules=modules) as llm:
        yield llm


@pytest.fixture(scope="module")
def requests() -> list[dict[str, Any]]:
    """Texts and pairs, of every task, through every adapter or none, with and without activation."""
    tasks: tuple[Task, ...] = ("classify", "token_classify")
    return [
        {"prompt": Prompt(text, pair=pair), "task": task, "params": params, "adapter": adapter}
        for text, pair in ((TEXTS[0], None), (TEXTS[1], TEXTS[2]), (TEXTS[4], None))
        for task in tasks
        for adapter in (None, "law", "art")
        for params in (PoolingParams(), RAW)
    ]


def test_a_pack_of_tasks_adapters_and_pairs_equals_each_alone(llm: LLM, requests: list[dict[str, Any]]) -> None:
    alone = [llm.engine.submit([Request(**one)])[0].result(60).array for one in requests]
    together = [future.result(60).array for future in llm.engine.submit([Request(**one) for one in requests])]
    assert len({array.tobytes() for array in alone}) == len(alone), "each request must have an answer of its own"
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() < TOLERANCE * max(1, np.abs(theirs).max())


def test_large_answers_are_pooled_in_slices_that_equal_the_whole(
    llm: LLM, requests: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [future.result(60).array for future in llm.engine.submit([Request(**one) for one in requests])]
    rows: list[int] = []
    pool = runner.Runner._pool
    monkeypatch.setattr(
        runner.Runner, "_pool", lambda self, *asked: rows.append(len(asked[0].requests)) or pool(self, *asked)
    )
    monkeypatch.setattr(runner, "_MAX_NUMBERS", 15)
    sliced = [future.result(60).array for future in llm.engine.submit([Request(**one) for one in requests])]
    assert len(rows) > len({(one["task"], one["params"]) for one in requests})
    for ours, theirs in zip(sliced, whole, strict=True):
        assert np.abs(ours - theirs).max() < TOLERANCE * max(1, np.abs(theirs).max())


def asked(llm: LLM, number: int) -> list[float]:
    """One of four calls."""
    text, other = TEXTS[number % 6], TEXTS[number % 5]
    if number % 4 == 0:
        return [output.outputs.score for output in llm.score(text, [other, TEXTS[3]])]
    if number % 4 == 1:
        return llm.classify(text, lora_request="law")[0].outputs.probs
    if number % 4 == 2:
        return llm.reward(text)[0].outputs.array.ravel().tolist()
    return [output.outputs.score for output in llm.score(text, other, lora_request="art")]


async def asked_async(llm: LLM, number: int) -> list[float]:
    text, other = TEXTS[number % 6], TEXTS[number % 5]
    if number % 4 == 0:
        return [output.outputs.score for output in await llm.score_async(text, [other, TEXTS[3]])]
    if number % 4 == 1:
        return (await llm.classify_async(text, lora_request="law"))[0].outputs.probs
    if number % 4 == 2:
        return (await llm.encode_async(text, pooling_task="token_classify"))[0].outputs.array.ravel().tolist()
    return [output.outputs.score for output in await llm.score_async(text, other, lora_request="art")]


def test_threads_and_coroutines_get_what_one_caller_gets(llm: LLM) -> None:
    serial = [asked(llm, number) for number in range(96)]

    async def all_at_once() -> list[list[float]]:
        return await asyncio.gather(*(asked_async(llm, number) for number in range(96)))

    with ThreadPoolExecutor(12) as pool:
        threaded = list(pool.map(lambda number: asked(llm, number), range(96)))
    for many in (threaded, asyncio.run(all_at_once())):
        assert all(ours == pytest.approx(theirs, abs=TOLERANCE) for ours, theirs in zip(many, serial, strict=True))


def test_a_cancelled_score_leaves_the_queue(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, futures = llm.engine.submit, list[Future[Answer]]()

    def noted(*asked: Any) -> list[Future[Answer]]:
        own = submit(*asked)
        futures.extend(own)
        return own

    monkeypatch.setattr(llm.engine, "submit", noted)

    async def cancelled() -> float:
        large = asyncio.ensure_future(llm.score_async(TEXTS[3], [TEXTS[3]] * 5000))
        await asyncio.sleep(0.02)
        large.cancel()
        with pytest.raises(asyncio.CancelledError):
            await large
        monkeypatch.undo()
        return (await asyncio.wait_for(llm.score_async(TEXTS[0], TEXTS[1]), 20))[0].outputs.score

    score = asyncio.run(cancelled())
    # Pairs are asked in windows, of which two are there at once; those that were not computed yet wait no longer.
    assert 0 < len(futures) <= 2 * calls.window_of(llm.engine)
    assert sum(future.cancelled() for future in futures) > len(futures) // 2
    # A batch that was under way is computed to its end.
    wait(futures, 20)
    assert all(future.done() for future in futures)
    assert score == pytest.approx(llm.score(TEXTS[0], TEXTS[1])[0].outputs.score, abs=TOLERANCE)


def test_one_pair_that_is_not_a_number_fails_alone(folder: Path, tmp_path: Path) -> None:
    tokenizer(tmp_path)
    save(tmp_path, "BertForSequenceClassification", "BertConfig", LAYERS, num_labels=1)
    break_token(tmp_path, float("nan"))
    pairs = [("w1 w2", "w3"), ("w1 w2", "w5"), ("w5", "w3"), ("w7", "w8 w9")]
    with LLM(str(folder)) as whole, LLM(str(tmp_path)) as llm:
        assert llm.engine.token_strings([9]) == ["w5"]
        futures = llm.engine.submit([Request(Prompt(query, pair=document), "classify") for query, document in pairs])
        for (query, document), future in zip(pairs, futures, strict=True):
            if "w5" in query + document:
                with pytest.raises(NonFiniteResult):
                    future.result(60)
            else:
                (expected,) = whole.score(query, document)
                assert future.result(60).array[0] == pytest.approx(expected.outputs.score, abs=TOLERANCE)
