"""Short texts in their caller's thread: who may, on how many cores, and what happens when something goes wrong there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from poolhouse import EngineClosed, EngineError, kernels
from poolhouse.engine.engine import Engine
from poolhouse.engine.observing import BatchRun
from poolhouse.engine.process import has_one_core, one_core
from poolhouse.engine.request import Answer, Request
from poolhouse.engine.scheduler import Scheduler
from poolhouse.inputs.prompts import Prompt
from poolhouse.packing.pack import Batch
from tests.engine.test_workers import BROKEN, Taker, ids, submission, total

INTERRUPTED, WRONG = 8, 9


class Noting:
    """A backbone that notes in which thread it runs, and waits where it is told to."""

    def __init__(self, engine: Engine) -> None:
        self.backbone = engine.model.backbone
        self.threads: list[str] = []
        self.counts: list[tuple[int, int]] = []
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def __call__(self, batch: Batch) -> Tensor:
        self.threads.append(threading.current_thread().name)
        self.counts.append((torch.get_num_threads(), kernels.helpers.count))
        self.entered.set()
        assert self.go_on.wait(60)
        for token, error in (
            (BROKEN, torch.AcceleratorError("device lost")),
            (INTERRUPTED, KeyboardInterrupt()),
            (WRONG, ValueError("wrong")),
        ):
            if bool((batch.ids == token).any()):
                raise error
        return self.backbone(batch)


def noted(engine: Engine, workers: int = 2, **options: Any) -> tuple[Engine, Noting]:
    backbone: Any = Noting(engine)
    model = replace(engine.model, backbone=backbone)
    chosen = replace(engine.options, workers=workers, one_core_tokens=16, **options)
    return Engine(model, engine.tokenizer, chosen), backbone


def asked(engine: Engine, *tokens: int) -> Answer:
    (future,) = engine.submit([ids(*tokens)], waits=True)
    return future.result(60)


def in_thread(call: Callable[[], object], name: str = "another") -> threading.Thread:
    thread = threading.Thread(target=call, name=name, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("workers", [1, 2])
def test_who_only_waits_computes_a_short_text_itself(engine: Engine, workers: int) -> None:
    me = threading.current_thread().name
    own, backbone = noted(engine, workers)
    with own:
        for request, expected in ((ids(3, 4, 5), me), (ids(*range(10, 26)), me), (ids(*range(10, 27)), "poolhouse")):
            (future,) = own.submit([request], waits=True)
            (other,) = own.submit([replace(request, future=Future())])
            np.testing.assert_allclose(future.result(60).array, other.result(60).array, atol=2e-6)
            mine, theirs = backbone.threads[-2:]
            assert mine.startswith(expected)
            assert theirs.startswith("poolhouse-device")
        # Several, together no more than is worth one core.
        futures = own.submit([ids(*range(10, 10 + length)) for length in (7, 3, 6)], waits=True)
        assert all(future.done() for future in futures)
        assert backbone.threads[-1] == me
        assert own.pending == 0
        while own.running:  # the worker has yet to note that its last batch is done
            time.sleep(0.001)


def test_a_turn_holds_no_more_than_a_batch(engine: Engine) -> None:
    own, backbone = noted(engine, max_batch_tokens=8)
    with own:
        futures = own.submit([ids(3, 4, 5, 6, 2) for _ in range(2)], waits=True)
        assert all(np.isfinite(future.result(60).array).all() for future in futures)
        assert len(backbone.threads) == 2
        assert all(name.startswith("poolhouse-device") for name in backbone.threads)


def test_it_runs_on_one_core_and_no_setting_of_the_caller_changes(engine: Engine) -> None:
    assert has_one_core()
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        own, backbone = noted(engine)
        with own, ThreadPoolExecutor(1) as new:
            asked(own, 3, 4, 5)
            new.submit(asked, own, 3, 4, 5).result(60)
            (future,) = own.submit([ids(3, 4, 5)])
            future.result(60)
            assert backbone.counts == [(1, 3)] * 3
            assert (torch.get_num_threads(), kernels.helpers.count) == (4, 0)
            assert new.submit(torch.get_num_threads).result(60) == 4
        with one_core(), ThreadPoolExecutor(1) as newer:
            assert newer.submit(torch.get_num_threads).result(60) == 4
            with one_core():
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [1, 2])
def test_while_anything_runs_a_worker_computes(engine: Engine, workers: int) -> None:
    own, backbone = noted(engine, workers)
    with own:
        backbone.go_on.clear()
        first = in_thread(lambda: asked(own, 3, 4, 5), "first")
        assert backbone.entered.wait(60)
        assert own.running == 1
        answers: list[Answer] = []
        second = in_thread(lambda: answers.append(asked(own, 6, 4, 2)), "second")
        while own.pending < 2:
            time.sleep(0.001)
        backbone.go_on.set()
        first.join(60)
        second.join(60)
        assert len(answers) == 1
        assert backbone.threads[0] == "first"
        assert backbone.threads[1].startswith("poolhouse-device")


def test_a_turn_is_given_only_where_nothing_runs_or_waits() -> None:
    scheduler = Scheduler(64, workers=2)
    scheduler.add(submission(5))
    # However often callers ask, what waits goes first.
    assert not any(scheduler.begin_turn(4) for _ in range(100))
    assert total(scheduler.next(None)) == 5
    assert not any(scheduler.begin_turn(4) for _ in range(100))
    scheduler.finished(None)
    assert scheduler.begin_turn(4)
    assert not scheduler.begin_turn(4)
    scheduler.end_turn()
    scheduler.end_turn()
    assert scheduler.begin_turn(4)
    scheduler.end_turn()
    scheduler.close()
    assert not scheduler.begin_turn(4)


def test_only_who_has_the_turn_ends_it() -> None:
    scheduler = Scheduler(64, workers=2)
    assert scheduler.begin_turn(4)
    with ThreadPoolExecutor(1) as other:
        other.submit(scheduler.end_turn).result(60)
    assert not scheduler.begin_turn(4)


def test_what_comes_during_a_turn_goes_to_a_worker_at_once() -> None:
    scheduler = Scheduler(64, workers=2)
    assert scheduler.begin_turn(4)
    taker = Taker(scheduler, 0)
    assert taker.waits
    scheduler.add(submission(7))
    assert total(taker.result()) == 7


def test_what_comes_during_a_turn_is_next_where_one_batch_runs_at_a_time() -> None:
    scheduler = Scheduler(64, workers=1)
    assert scheduler.begin_turn(4)
    taker = Taker(scheduler, 0)
    scheduler.add(submission(7))
    assert taker.waits
    scheduler.end_turn()
    assert total(taker.result()) == 7


def test_many_threads_are_all_answered_and_others_have_their_share(engine: Engine) -> None:
    """Callers that ask again and again pass nobody: what waits is taken before any of them gets another turn."""
    own, _ = noted(engine, max_batch_tokens=16)
    expected = [asked(own, 3, 4, number).array for number in range(10, 18)]
    stopped = threading.Event()
    counts = [0] * 8

    def ask(number: int) -> None:
        while not stopped.is_set():
            np.testing.assert_allclose(asked(own, 3, 4, 10 + number).array, expected[number], atol=2e-6)
            counts[number] += 1

    with own, ThreadPoolExecutor(8) as threads:
        asking = [threads.submit(ask, number) for number in range(8)]
        large = own.submit([ids(*range(10, 22)) for _ in range(60)])
        for future in large:
            assert np.isfinite(future.result(60).array).all()
        while min(counts) == 0 and not any(one.done() for one in asking):
            time.sleep(0.001)
        stopped.set()
        for one in asking:
            one.result(60)
    assert own.pending == 0


def test_an_interrupt_is_the_callers_and_the_engine_goes_on(engine: Engine) -> None:
    own, backbone = noted(engine, workers=1)
    with own:
        request = ids(INTERRUPTED, 4, 5)
        with pytest.raises(KeyboardInterrupt):
            own.submit([request], waits=True)
        with pytest.raises(EngineError, match="interrupted"):
            request.future.result(60)
        assert own.alive
        assert (own.pending, own.running) == (0, 0)
        asked(own, 3, 4, 5)
        assert backbone.threads[-1] == threading.current_thread().name


def test_a_failing_text_fails_alone(engine: Engine) -> None:
    own, _ = noted(engine)
    with own:
        good, bad = own.submit([ids(3, 4, 5), ids(WRONG, 4, 5)], waits=True)
        assert np.isfinite(good.result(60).array).all()
        with pytest.raises(EngineError, match="wrong"):
            bad.result(60)
        asked(own, 3, 4, 5)


def test_a_lost_device_ends_the_engine(engine: Engine) -> None:
    own, _ = noted(engine)
    died: list[EngineError] = []
    own.on_fatal(died.append)
    (future,) = own.submit([ids(BROKEN, 4, 5)], waits=True)
    with pytest.raises(EngineError, match="device lost"):
        future.result(60)
    assert not own.alive
    assert len(died) == 1
    own.close()


def test_a_cancelled_text_is_not_computed(engine: Engine) -> None:
    own, backbone = noted(engine)
    with own:
        request = ids(3, 4, 5)
        request.future.cancel()
        own.submit([request], waits=True)
        assert request.future.cancelled()
        assert backbone.threads == []
        assert own.pending == 0


def test_closing_waits_for_a_turn(engine: Engine) -> None:
    own, backbone = noted(engine)
    backbone.go_on.clear()
    answers: list[Answer] = []
    asking = in_thread(lambda: answers.append(asked(own, 3, 4, 5)))
    assert backbone.entered.wait(60)
    closing = in_thread(own.close)
    closing.join(0.3)
    assert closing.is_alive()
    backbone.go_on.set()
    closing.join(60)
    asking.join(60)
    assert len(answers) == 1
    with pytest.raises(EngineClosed):
        asked(own, 3, 4, 5)


def test_who_closes_within_a_turn_does_not_wait_for_itself(engine: Engine) -> None:
    own, _ = noted(engine)
    first, second = ids(3, 4, 5), ids(6, 4, 5, 3)
    first.future.add_done_callback(lambda _: own.close(60))
    began = time.monotonic()
    own.submit([first, second], waits=True)
    assert time.monotonic() - began < 30
    assert np.isfinite(second.future.result(60).array).all()


def test_a_fork_waits_for_a_turn(engine: Engine) -> None:
    own, backbone = noted(engine)
    with own:
        backbone.go_on.clear()
        asking = in_thread(lambda: asked(own, 3, 4, 5))
        assert backbone.entered.wait(60)
        holding = in_thread(lambda: own.hold(time.monotonic() + 60)())
        holding.join(0.3)
        assert holding.is_alive()
        backbone.go_on.set()
        holding.join(60)
        assert not holding.is_alive()
        asking.join(60)
        release = own.hold(time.monotonic() + 60)
        backbone.entered.clear()
        asking = in_thread(lambda: asked(own, 3, 4, 5))
        assert not backbone.entered.wait(0.3)
        release()
        asking.join(60)
        assert backbone.entered.is_set()


def test_an_observer_sees_the_batch(engine: Engine) -> None:
    class Observer:
        def __init__(self) -> None:
            self.runs: list[BatchRun] = []

        def tokenized(self, texts: int, seconds: float) -> None: ...

        def ran(self, run: BatchRun) -> None:
            self.runs.append(run)

    own, _ = noted(engine)
    observer = Observer()
    own.observe(observer)
    with own:
        own.submit([ids(3, 4, 5), ids(6, 4)], waits=True)
        (run,) = observer.runs
        assert (run.sequences, run.tokens) == (2, 5)


@pytest.mark.parametrize(
    "mode", [lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta")], ids=["autocast", "device"]
)
def test_settings_of_the_callers_thread_reach_no_answer(engine: Engine, mode: Callable[[], Any]) -> None:
    own, backbone = noted(engine)
    with own:
        expected = asked(own, 3, 4, 5).array
        with mode():
            got = asked(own, 3, 4, 5).array
        np.testing.assert_array_equal(got, expected)
        assert backbone.threads[-1].startswith("poolhouse-device")


def test_methods_of_llm_that_wait_compute_themselves(engine: Engine) -> None:
    own, backbone = noted(engine)
    with own:
        (future,) = own.submit([Request(Prompt("the sea"), "embed")], waits=True)
        assert future.done()
        assert backbone.threads == [threading.current_thread().name]
