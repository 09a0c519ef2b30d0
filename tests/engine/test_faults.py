"""What goes wrong hurts whom it must, and nobody else."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from poolhouse.engine.engine import Engine
from poolhouse.engine.request import Answer, Request
from poolhouse.errors import EngineError
from poolhouse.inputs.prompts import Prompt
from poolhouse.packing.pack import Batch

BROKEN = 7


class Panic(BaseException):
    """What native code raises that panicked: no Exception."""


class Held:
    """A backbone that waits for `go_on` at its first pack, and loses the device where it meets BROKEN."""

    def __init__(self, engine: Engine) -> None:
        self.backbone = engine.model.backbone
        self.entered, self.go_on = threading.Event(), threading.Event()

    def __call__(self, batch: Batch) -> Tensor:
        self.entered.set()
        assert self.go_on.wait(60)
        if bool((batch.ids == BROKEN).any()):
            raise torch.AcceleratorError("device lost")
        return self.backbone(batch)


def held(engine: Engine) -> tuple[Held, Engine]:
    backbone = Held(engine)
    # With one worker, what comes after the first pack waits for it.
    options = replace(engine.options, workers=1)
    return backbone, Engine(replace(engine.model, backbone=backbone), engine.tokenizer, options)


def ids(*tokens: int, **options: Any) -> Request:
    return Request(Prompt(None, np.array(tokens)), "embed", **options)


def texts(count: int) -> list[Request]:
    return [Request(Prompt(f"the moon {number}"), "embed") for number in range(count)]


def done(futures: list[Future[Answer]]) -> bool:
    return not wait(futures, timeout=60).not_done


@pytest.mark.parametrize("count", [1, 300], ids=["by its caller", "in threads"])
@pytest.mark.parametrize("failure", [Panic("native code panicked"), RuntimeError("no memory")])
def test_a_tokenizer_call_that_dies_fails_its_own_requests(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, failure: BaseException, count: int
) -> None:
    encode, calls = engine.tokenizer.encode, []

    def dying(prompts: Any, limits: Any) -> Any:
        calls.append(len(prompts))
        if any(prompt.text == "the moon 0" for prompt in prompts):
            raise failure
        return encode(prompts, limits)

    monkeypatch.setattr(engine.tokenizer, "encode", dying)
    for _ in range(3):  # more than there are threads
        futures = engine.submit(texts(count))
        assert done(futures)
        for future in futures[:128]:
            with pytest.raises(EngineError, match=str(failure)):
                future.result(0)
        for future in futures[128:]:
            assert future.result(0).array.shape == (32,)
    assert len(calls) == 3 * (1 + count // 128)
    assert engine.pending == 0
    assert engine.submit([ids(3, 4)])[0].result(60).array.shape == (32,)


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_reaches_the_caller_and_leaves_no_request_behind(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, end: type[BaseException]
) -> None:
    def interrupted(*_: Any) -> Any:
        raise end

    request = ids(3, 4)
    with monkeypatch.context() as patch:
        patch.setattr(engine.tokenizer, "encode", interrupted)
        with pytest.raises(end):
            engine.submit([request])
        futures = engine.submit(texts(100))  # too many for the caller's own thread
        assert done(futures)
    for future in (request.future, *futures):
        with pytest.raises(EngineError, match="interrupted"):
            future.result(0)
    assert done(engine.submit(texts(3)))
    assert engine.pending == 0


def test_a_lost_device_is_told_to_all_who_asked_and_refuses_all_that_comes(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    backbone, broken = held(engine)
    heard: list[tuple[str, EngineError, bool]] = []
    told = threading.Event()
    futures: list[Future[Answer]] = []

    def hear(error: EngineError) -> None:
        heard.append(("first", error, all(future.done() for future in futures)))
        raise RuntimeError("this callback fails")

    def hear_too(error: EngineError) -> None:
        heard.append(("second", error, all(future.done() for future in futures)))
        told.set()

    broken.on_fatal(hear)
    broken.on_fatal(hear_too)
    assert broken.fatal is None
    futures += broken.submit([ids(3, BROKEN)])
    assert backbone.entered.wait(60)
    futures += broken.submit([ids(3, 4) for _ in range(300)])
    while len(broken._scheduler) < 300:
        time.sleep(0.01)  # what is still being tokenised hears of it only after that
    backbone.go_on.set()
    assert told.wait(60)
    assert isinstance(broken.fatal, EngineError)
    assert heard == [("first", broken.fatal, True), ("second", broken.fatal, True)]
    assert not broken.alive
    for future in futures:
        with pytest.raises(EngineError, match="device lost"):
            future.result(0)
    broken.on_fatal(hear_too)
    assert len(heard) == 3
    for requests in (texts(1), texts(300)):
        for future in broken.submit(requests):
            assert future.exception(0) is broken.fatal
    assert broken.pending == 0
    assert "this callback fails" in caplog.text
    broken.close()


@pytest.mark.parametrize("count", [1, 200])
def test_cancelled_futures_never_block(engine: Engine, count: int) -> None:
    backbone, slow = held(engine)
    with slow:
        (first,) = slow.submit([ids(3, 4)])
        assert backbone.entered.wait(60)
        futures = slow.submit(texts(count))
        assert slow.pending == count + 1
        cancelled = [future for future in futures if future.cancel()]
        assert len(cancelled) == count
        assert slow.pending == 1
        early = ids(3, 4)
        early.future.cancel()
        assert slow.submit([early]) == [early.future]
        (last,) = slow.submit([ids(5, 6)])
        backbone.go_on.set()
        assert done([first, last, *cancelled, early.future])
        assert first.result(0).array.shape == last.result(0).array.shape
        assert slow.pending == 0


def test_pending_counts_what_has_no_answer_yet(engine: Engine) -> None:
    backbone, slow = held(engine)
    with slow:
        assert slow.pending == 0
        waiting = slow.submit([ids(3, 4)])
        assert backbone.entered.wait(60)
        waiting += slow.submit([ids(3, 4) for _ in range(5)])
        assert slow.pending == 6
        (bad,) = slow.submit([ids(10**6)])
        assert isinstance(bad.exception(60), Exception)
        assert slow.pending == 6
        backbone.go_on.set()
        assert done(waiting)
        assert slow.pending == 0


def test_a_request_that_is_submitted_twice_kills_nobody(engine: Engine) -> None:
    twice = ids(3, 4)
    futures = engine.submit([twice, ids(5, 6), twice])
    assert done(futures)
    engine.submit([twice])
    assert engine.submit([ids(3, 4)])[0].result(60).array.shape == (32,)
    assert engine.alive


def test_what_is_urgent_goes_first(engine: Engine) -> None:
    backbone, slow = held(engine)
    order: list[str] = []
    with slow:
        slow.submit([ids(3, 4)])
        assert backbone.entered.wait(60)
        for name, priority in (("late", 1), ("soon", 0), ("now", -1)):
            request = ids(3, 4, priority=priority)
            request.future.add_done_callback(lambda _, name=name: order.append(name))
            slow.submit([request])
        backbone.go_on.set()
    assert order == ["now", "soon", "late"]
