"""Large calls: their requests are made in windows, which share the engine as one call, and nothing else changes."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poolhouse import LLM, InvalidRequest
from poolhouse.engine.queue import Caller, FairQueue, WaitingRequest
from poolhouse.engine.request import Answer, Request
from poolhouse.inputs.prompts import Prompt
from poolhouse.llm import calls
from poolhouse.packing.tokens import Tokens
from poolhouse.params import PoolingParams
from tests.checkpoints import save_checkpoint
from tests.models.tiny import save_m3

TEXTS = [f"text {number} " * (1 + number * 7 % 5) for number in range(9)]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM() as llm:
        yield llm


@pytest.fixture
def windows(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, object]]:
    """Of each submission from now on, how many requests it had and whose it was; a window has four."""
    seen: list[tuple[int, object]] = []
    submit = llm.engine.submit

    def watched(requests: Sequence[Request], waits: bool, caller: Caller) -> list[Future[Answer]]:
        seen.append((len(requests), caller))
        return submit(requests, waits, caller)

    monkeypatch.setattr(calls, "window_of", lambda _: 4)
    monkeypatch.setattr(llm.engine, "submit", watched)
    return seen


def test_the_windows_of_a_call_are_one_caller_and_give_what_one_gives(
    llm: LLM, windows: list[tuple[int, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, outputs = llm.embed_array(TEXTS), llm.embed(TEXTS)
    assert [size for size, _ in windows] == [4, 4, 1] * 2
    assert len({caller for _, caller in windows}) == 2
    monkeypatch.undo()
    assert np.abs(matrix - llm.embed_array(TEXTS)).max() < 1e-5
    assert np.abs(matrix - [output.outputs.embedding for output in outputs]).max() < 1e-5
    ids = [output.prompt_token_ids for output in llm.embed(TEXTS)]
    assert [output.prompt_token_ids for output in outputs] == ids


def test_no_more_than_two_windows_are_there_at_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted: list[weakref.ref[Future[Answer]]] = []
    alive: list[int] = []

    def answer_at_once(requests: Sequence[Request], waits: bool, caller: Caller) -> list[Future[Answer]]:
        submitted.extend(weakref.ref(request.future) for request in requests)
        alive.append(sum(future() is not None for future in submitted))
        for request in requests:
            request.future.set_result(Answer(np.ones(384, np.float32), Tokens(np.array([1]))))
        return [request.future for request in requests]

    monkeypatch.setattr(calls, "window_of", lambda _: 4)
    monkeypatch.setattr(llm.engine, "submit", answer_at_once)
    for method in (llm.embed_array, llm.embed):
        submitted.clear()
        alive.clear()
        answer: Any = method(TEXTS * 3)
        assert len(answer) == 27
        # And the one whose output was made last.
        assert len(alive) == 7
        assert max(alive) <= 9


@pytest.mark.usefixtures("windows")
def test_a_wrong_prompt_is_named_by_its_place_in_the_call(llm: LLM) -> None:
    # The last window holds this prompt alone.
    with pytest.raises(InvalidRequest, match=r"^prompts\[8\]: "):
        llm.embed_array([*TEXTS[:8], "far too long " * 1000])
    with pytest.raises(InvalidRequest, match=r"^prompts\[5\]"):
        llm.embed_array([*TEXTS[:5], 7, *TEXTS])  # type: ignore[list-item]


def test_a_wrong_type_is_found_before_anything_is_computed(llm: LLM, windows: list[tuple[int, object]]) -> None:
    with pytest.raises(InvalidRequest, match=r"prompts\[8\]"):
        llm.embed([*TEXTS[:8], None])  # type: ignore[list-item]
    assert windows == []


@pytest.mark.usefixtures("windows")
def test_the_first_failure_cancels_what_waits(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"prompts\[1\]"):
        llm.embed(["a", "far too long " * 1000, *TEXTS * 100])
    assert llm.embed_array(["a"]).shape == (1, 384)
    # A batch that was under way is computed to its end.
    ends = time.monotonic() + 10
    while llm.engine.pending and time.monotonic() < ends:
        time.sleep(0.01)
    assert llm.engine.pending == 0


@pytest.mark.usefixtures("windows")
def test_progress_is_of_the_whole_call(llm: LLM) -> None:
    drawn: list[tuple[int, int]] = []

    def bar(items: Any, total: int, desc: str) -> Iterator[Any]:
        for number, item in enumerate(items, 1):
            drawn.append((number, total))
            yield item

    llm.embed_array(TEXTS, use_tqdm=bar)
    assert drawn == [(number, 9) for number in range(1, 10)]


@pytest.mark.usefixtures("windows")
def test_options_of_each_prompt_stay_with_it(llm: LLM) -> None:
    params = [PoolingParams(truncate_prompt_tokens=3 + number) for number in range(9)]
    outputs = llm.embed(["one two three four five six seven eight nine ten eleven twelve"] * 9, pooling_params=params)
    assert [len(output.prompt_token_ids) for output in outputs] == list(range(3, 12))


def test_what_one_caller_submits_at_several_times_has_one_turn() -> None:
    waiting, callers = FairQueue(), (Caller(), Caller())
    for caller in (*callers, callers[0]):
        queue = caller.submitting([0])[0]
        waiting.add(WaitingRequest(Tokens(np.arange(5)), "embed", PoolingParams(), Future(), queue=queue))
    assert len(waiting) == 2
    assert [len(waiting.take(5)) for _ in range(3)] == [1, 1, 1]
    assert len(waiting) == 0


def test_a_matrix_has_vectors_of_one_length() -> None:
    answers = [Answer(np.ones(width, np.float32), Tokens(np.array([1]))) for width in (3, 3, 1)]
    assert calls.stacked(answers[:2], 2).tolist() == [[1.0] * 3] * 2
    with pytest.raises(InvalidRequest, match=r"prompts\[0\] has 3 dimensions, prompts\[2\] 1"):
        calls.stacked(answers, 3)


def test_prompts_wait_as_texts(llm: LLM) -> None:
    """A `Prompt` of each, and all the more a request, would take many times the memory."""
    from poolhouse.llm.requests import CallOptions, asked_of

    asked = asked_of(llm.engine, [*TEXTS, {"prompt": "one"}], "embed", CallOptions())
    assert [*asked.prompts[:9]] == TEXTS
    assert [request.prompt.text for request in asked] == [*TEXTS, "one"]
    assert isinstance(asked.prompts[9], Prompt)


def test_the_windows_of_a_coroutine_are_one_caller_too(llm: LLM, windows: list[tuple[int, object]]) -> None:
    outputs = asyncio.run(llm.embed_async(TEXTS))
    assert [size for size, _ in windows] == [4, 4, 1]
    assert len({caller for _, caller in windows}) == 1
    found = [output.outputs.embedding for output in outputs]
    assert np.abs(np.array(found) - llm.embed_array(TEXTS)).max() < 1e-5
    with pytest.raises(InvalidRequest, match=r"^prompts\[8\]: "):
        asyncio.run(llm.embed_async([*TEXTS[:8], "far too long " * 1000]))


def test_a_large_coroutine_that_is_cancelled_leaves_nothing_behind(llm: LLM, windows: list[tuple[int, object]]) -> None:
    async def cancelled() -> None:
        release = llm.engine.hold(time.monotonic() + 30)
        try:
            task = asyncio.create_task(llm.embed_async(TEXTS * 100))
            while len(windows) < 2:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        finally:
            # Before the loop ends, which waits for its threads.
            release()

    asyncio.run(cancelled())
    deadline = time.monotonic() + 60
    while llm.engine.pending and time.monotonic() < deadline:
        time.sleep(0.01)
    assert llm.engine.pending == 0
    assert len(windows) == 2


@pytest.mark.parametrize("one_query", [True, False])
@pytest.mark.parametrize("kind", ["embedder", "reranker", "late"])
def test_scores_are_planned_in_windows(
    kind: str, one_query: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending, options = {
        "embedder": ("Model", {}),
        "reranker": ("ForSequenceClassification", {"num_labels": 1}),
        "late": ("Model", {}),
    }[kind]
    save_checkpoint(tmp_path / "model", "bert, wordpiece", ending, **options)
    more: dict[str, Any] = {"pooler_config": {"task": "token_embed"}} if kind == "late" else {}
    queries: Any = TEXTS[3] if one_query else TEXTS[::-1]
    long = "far too long " * 1000
    with LLM(str(tmp_path / "model"), **more) as llm:
        whole = llm.score(queries, TEXTS)
        monkeypatch.setattr(calls, "window_of", lambda _: 4)
        sizes: list[int] = []
        drawn: list[int] = []
        submit = llm.engine.submit

        def watched(requests: Sequence[Request], waits: bool, caller: Caller) -> list[Future[Answer]]:
            sizes.append(len(requests))
            return submit(requests, waits, caller)

        def bar(items: Any, total: int, desc: str) -> Any:
            drawn.append(total)
            return items

        monkeypatch.setattr(llm.engine, "submit", watched)
        for outputs in (llm.score(queries, TEXTS, use_tqdm=bar), asyncio.run(llm.score_async(queries, TEXTS))):
            scores = [output.outputs.score for output in outputs]
            assert np.abs(np.array(scores) - [output.outputs.score for output in whole]).max() < 1e-5
            assert [output.prompt_token_ids for output in outputs] == [output.prompt_token_ids for output in whole]
        requests = 9 if kind == "reranker" else 12 if one_query else 18
        assert drawn == [requests]
        assert sum(sizes) == 2 * requests
        assert max(sizes) == 4
        for place in (0, 5, 8):
            with pytest.raises(InvalidRequest, match=rf"^data_2\[{place}\]: "):
                llm.score(queries, [*TEXTS[:place], long, *TEXTS[place + 1 :]])
            if not one_query and kind != "reranker":
                with pytest.raises(InvalidRequest, match=rf"^data_1\[{place}\]: "):
                    llm.score([*TEXTS[:place], long, *TEXTS[place + 1 :]], TEXTS)
        with pytest.raises(InvalidRequest, match="got 7:9"):
            llm.score(TEXTS[:7], TEXTS)
        assert len(llm.score(queries, TEXTS)) == 9


def test_sparse_requests_are_made_in_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_m3(tmp_path)
    with LLM(str(tmp_path)) as llm:
        whole = llm.embed_sparse(TEXTS)
        monkeypatch.setattr("poolhouse.llm.llm._window", lambda _: 4)
        for outputs in (llm.embed_sparse(TEXTS), asyncio.run(llm.embed_sparse_async(TEXTS))):
            assert [one.outputs.ids.tolist() for one in outputs] == [one.outputs.ids.tolist() for one in whole]
