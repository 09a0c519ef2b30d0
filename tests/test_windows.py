"""Large calls: their requests are made in windows, which share the engine as one call, and nothing else changes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
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
