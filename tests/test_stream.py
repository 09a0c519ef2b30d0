"""`LLM.stream`: what the methods answer, item by item, in order, ahead, and no further ahead than two windows."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poolhouse import LLM, InvalidRequest, PoolingParams, UnsupportedTask
from poolhouse.engine.queue import Caller
from poolhouse.engine.request import Answer, Request
from poolhouse.errors import EngineError, InputTooLong, PoolhouseError
from tests.checkpoints import save_checkpoint
from tests.models.tiny import save_m3

TEXTS = [f"text {number} " * (1 + number * 7 % 5) for number in range(23)]
LONG = "far too long " * 1000


def tiny(tmp_path_factory: pytest.TempPathFactory, kind: str, **config: Any) -> str:
    folder = tmp_path_factory.mktemp("models") / kind
    save_checkpoint(folder, "bert, wordpiece", kind, **config)
    return str(folder)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(tiny(tmp_path_factory, "Model")) as llm:
        yield llm


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(tiny(tmp_path_factory, "ForSequenceClassification", num_labels=1)) as llm:
        yield llm


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(tiny(tmp_path_factory, "ForTokenClassification", num_labels=3)) as llm:
        yield llm


@pytest.fixture(scope="module")
def m3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("m3")
    save_m3(folder)
    with LLM(str(folder)) as llm:
        yield llm


def close(found: Any, expected: Any) -> bool:
    return bool(np.abs(np.asarray(found) - np.asarray(expected)).max() < 1e-5)


@pytest.mark.parametrize("window", [1, 4, 23, 100, None])
def test_a_stream_gives_what_the_method_gives(llm: LLM, window: int | None) -> None:
    for options in ({}, {"pooling_params": PoolingParams(truncate_prompt_tokens=3)}):
        expected = llm.embed(TEXTS, **options)
        found: list[Any] = list(llm.stream(iter(TEXTS), "embed", window=window, **options))
        assert [type(one) for one in found] == [type(one) for one in expected]
        assert [one.prompt_token_ids for one in found] == [one.prompt_token_ids for one in expected]
        assert close([one.outputs.embedding for one in found], [one.outputs.embedding for one in expected])
    assert len({one.request_id for one in found}) == 23


def test_every_task_streams(llm: LLM, reranker: LLM, tagger: LLM, m3: LLM) -> None:
    found: list[Any] = list(llm.stream(TEXTS, "token_embed", window=5))
    for one, whole in zip(found, llm.encode(TEXTS, pooling_task="token_embed"), strict=True):
        assert close(one.outputs.data, whole.outputs.data)
    pairs = list(zip(TEXTS, reversed(TEXTS), strict=True))
    for model in (llm, reranker):
        found = list(model.stream(pairs, "score", window=5))
        scores = model.score(TEXTS, TEXTS[::-1])
        assert close([one.outputs.score for one in found], [one.outputs.score for one in scores])
        assert [one.prompt_token_ids for one in found] == [one.prompt_token_ids for one in scores]
    found = list(reranker.stream(TEXTS, "classify", window=5))
    assert close([one.outputs.probs for one in found], [one.outputs.probs for one in reranker.classify(TEXTS)])
    found = list(tagger.stream(TEXTS, "token_classify", window=5, aggregation_strategy="none"))
    for one, label in zip(found, tagger.token_classify(TEXTS, aggregation_strategy="none"), strict=True):
        assert [entity.label for entity in one.outputs.entities] == [entity.label for entity in label.outputs.entities]
    found = list(m3.stream(TEXTS, "embed_sparse", window=5, top_k=2))
    for one, sparse in zip(found, m3.embed_sparse(TEXTS, top_k=2), strict=True):
        assert one.outputs.ids.tolist() == sparse.outputs.ids.tolist()


def test_the_source_is_read_two_windows_ahead_and_no_further(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    alive: list[int] = []
    submitted: list[weakref.ref[Future[Answer]]] = []
    submit = llm.engine.submit

    def watched(requests: Sequence[Request], waits: bool, caller: Caller) -> list[Future[Answer]]:
        submitted.extend(weakref.ref(request.future) for request in requests)
        # A worker may still hold the batch that it has just answered, until it waits for the next one.
        deadline = time.monotonic() + 20
        while (held := sum(future() is not None for future in submitted)) > 8 and time.monotonic() < deadline:
            time.sleep(0.001)
        alive.append(held)
        return submit(requests, waits, caller)

    def source() -> Iterator[str]:
        # Without an end.
        for number in itertools.count():
            read.append(number)
            yield f"text {number % 10}"

    monkeypatch.setattr(llm.engine, "submit", watched)
    stream = llm.stream(source(), window=4)
    assert read == []
    for count, _ in enumerate(stream, 1):
        assert len(read) <= count + 8
        if count == 60:
            break
    assert max(alive) <= 8
    stream.close()
    before = len(read)
    assert next(stream, None) is None
    assert len(read) == before


def test_windows_of_a_stream_are_one_caller(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    callers: list[Caller] = []
    submit = llm.engine.submit

    def watched(requests: Sequence[Request], waits: bool, caller: Caller) -> list[Future[Answer]]:
        callers.append(caller)
        assert not waits
        return submit(requests, waits, caller)

    monkeypatch.setattr(llm.engine, "submit", watched)
    assert len(list(llm.stream(TEXTS, window=4))) == 23
    assert (len(callers), len(set(callers))) == (6, 1)


def test_the_first_wrong_item_ends_a_stream_in_its_turn(llm: LLM) -> None:
    stream = llm.stream([*TEXTS[:9], LONG, *TEXTS], window=4)
    assert len(list(itertools.islice(stream, 9))) == 9
    with pytest.raises(InputTooLong, match=r"^prompts\[9\]: "):
        next(stream)
    assert next(stream, None) is None
    stream = llm.stream([*TEXTS[:5], None, *TEXTS], window=4)
    assert len(list(itertools.islice(stream, 5))) == 5
    with pytest.raises(InvalidRequest, match=r"^prompts\[5\] is null"):
        next(stream)
    deadline = time.monotonic() + 60
    while llm.engine.pending and time.monotonic() < deadline:
        time.sleep(0.01)
    assert llm.engine.pending == 0


def test_errors_may_take_the_place_of_outputs(llm: LLM) -> None:
    items = [*TEXTS[:3], LONG, None, 7, *TEXTS[3:], "", {"no": "prompt"}, [1, 2, 3]]
    found = list(llm.stream(items, window=4, on_error="return"))
    wrong = {number: one for number, one in enumerate(found) if isinstance(one, PoolhouseError)}
    assert list(wrong) == [3, 4, 5, 27]
    for number, error in wrong.items():
        assert isinstance(error, InvalidRequest)
        assert f"prompts[{number}]" in str(error)
    right: list[Any] = [one for one in found if not isinstance(one, PoolhouseError)]
    expected = llm.embed_array([*TEXTS, "", {"prompt_token_ids": [1, 2, 3]}])
    assert close([one.outputs.embedding for one in right], expected)
    pairs = [("a", "b"), "ab", ("a", LONG), ("a", "b", "c"), (None, "a"), ("b", "a")]
    found = list(llm.stream(pairs, "score", window=2, on_error="return"))
    assert [isinstance(one, PoolhouseError) for one in found] == [False, True, True, True, True, False]
    assert str(found[1]) == "pairs[1]: a pair is a tuple of a query and a document."
    assert str(found[2]).startswith("pairs[2]: ")


def test_a_source_that_fails_ends_a_stream_behind_what_it_gave(llm: LLM) -> None:
    def source() -> Iterator[str]:
        yield from TEXTS[:6]
        raise OSError("the disk is gone")

    for on_error in ("raise", "return"):
        stream = llm.stream(source(), window=4, on_error=on_error)
        assert len(list(itertools.islice(stream, 6))) == 6
        with pytest.raises(OSError, match="the disk is gone"):
            next(stream)
    assert list(llm.stream([])) == []


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("embedd", {}, "Did you mean 'embed'"),
        ("classify", {}, "not supported by this model"),
        ("embed_sparse", {}, "no sparse vectors"),
        ("embed", {"window": 0}, "window must be a number from 1"),
        ("embed", {"on_error": "ignore"}, "on_error must be one of"),
        ("score", {"mode": "weird"}, "mode"),
    ],
)
def test_wrong_options_are_found_at_once(llm: LLM, task: str, options: dict[str, Any], message: str) -> None:
    def source() -> Iterator[str]:
        raise AssertionError("It must not be read.")
        yield ""

    with pytest.raises((InvalidRequest, UnsupportedTask), match=message):
        list(llm.stream(source(), task, **options))


def test_wrong_words_and_one_text_are_refused(llm: LLM) -> None:
    with pytest.raises(TypeError, match="promptname"):
        llm.stream(TEXTS, promptname="query")
    with pytest.raises(InvalidRequest, match="items must be many"):
        llm.stream("one text")
    # An option that is wrong for all is no item's error.
    with pytest.raises(InvalidRequest, match="query"):
        list(llm.stream(TEXTS, prompt_name="query", on_error="return"))


def test_a_lost_engine_ends_a_stream(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", "bert, wordpiece")
    llm = LLM(str(tmp_path / "model"))
    stream = llm.stream(TEXTS * 50, window=4, on_error="return")
    next(stream)
    llm.close()
    with pytest.raises(EngineError):
        list(stream)


def test_streams_of_several_threads_share_an_engine(llm: LLM) -> None:
    expected = llm.embed_array(TEXTS)
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        found[number] = [one.outputs.embedding for one in llm.stream(TEXTS, window=3 + number)]  # type: ignore[union-attr]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(close(found[number], expected) for number in range(4))
