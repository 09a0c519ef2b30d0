"""Workers: batches side by side, whose turn it is, and what the end of one means for the others."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from poolhouse import LLM, ConfigError, EngineError
from poolhouse.engine.engine import Engine
from poolhouse.engine.queue import CallerQueue, WaitingRequest
from poolhouse.engine.request import Answer, Request
from poolhouse.engine.scheduler import Scheduler
from poolhouse.inputs.prompts import Prompt
from poolhouse.packing.pack import Batch
from poolhouse.packing.tokens import Tokens
from poolhouse.params import PoolingParams
from tests.checkpoints import save_checkpoint

BROKEN = 7


def submission(*lengths: int) -> list[WaitingRequest]:
    queue = CallerQueue()
    return [
        WaitingRequest(Tokens(np.arange(length)), "embed", PoolingParams(), Future(), queue=queue) for length in lengths
    ]


def total(batch: list[WaitingRequest] | None) -> int:
    assert batch is not None
    return sum(ready.length for ready in batch)


class Taker:
    """The thread of a worker that asks for one batch; None is the all-core worker."""

    def __init__(self, scheduler: Scheduler, worker: int | None) -> None:
        self.batch: list[WaitingRequest] | None = None
        self._scheduler, self._worker = scheduler, worker
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()

    def _take(self) -> None:
        self.batch = self._scheduler.next(self._worker)

    def result(self) -> list[WaitingRequest] | None:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.batch

    @property
    def waits(self) -> bool:
        self._thread.join(0.3)
        return self._thread.is_alive()


def all_waiting(scheduler: Scheduler) -> list[Taker]:
    """Both one-core workers, and the all-core worker."""
    takers = [Taker(scheduler, worker) for worker in (0, 1, None)]
    assert all(taker.waits for taker in takers)
    return takers


def test_what_comes_while_all_are_idle_is_shared_out() -> None:
    scheduler = Scheduler(2048, workers=2)
    first, second, all_core = all_waiting(scheduler)
    scheduler.add(submission(*[100] * 10))
    assert (total(first.result()), total(second.result())) == (500, 500)
    assert all_core.waits
    scheduler.close()
    assert all_core.result() is None


@pytest.mark.parametrize("lengths", [(20, 30, 40), (500,), (5000,)], ids=["little", "one text", "one long text"])
def test_little_work_goes_to_the_worker_with_all_cores(lengths: tuple[int, ...]) -> None:
    scheduler = Scheduler(2048, workers=2)
    first, second, all_core = all_waiting(scheduler)
    scheduler.add(submission(*lengths))
    assert total(all_core.result()) == sum(lengths)
    assert first.waits
    assert second.waits
    # It counts as one of the two workers.
    scheduler.add(submission(*[1000] * 4))
    assert total(first.result()) == 2000
    assert second.waits
    scheduler.close()
    assert total(second.result()) == 2000


def test_the_rest_of_what_is_shared_out_is_not_waited_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("poolhouse.engine.scheduler._LONGEST_PAUSE", 3600.0)
    monkeypatch.setattr("poolhouse.engine.scheduler._PAUSE_SHARE", 1e9)
    scheduler = Scheduler(2048, workers=2)
    scheduler.add(submission(1))
    scheduler.next(None)  # so that there was a batch
    scheduler.finished(None)
    first, second, all_core = all_waiting(scheduler)
    scheduler.add(submission(100, 100, 100))
    assert total(first.result()) + total(second.result()) == 300
    assert all_core.waits
    scheduler.close()


def test_a_batch_is_no_larger_than_the_budget_and_the_rest_waits_for_a_worker() -> None:
    scheduler = Scheduler(300, workers=2)
    first, second, _ = all_waiting(scheduler)
    scheduler.add(submission(*[100] * 10))
    assert [total(taker.result()) for taker in (first, second)] == [300, 300]
    assert len(scheduler) == 4
    assert total(scheduler.next(0)) == 300
    assert total(scheduler.next(1)) == 100


def working(tokens: int, monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    """A scheduler in which work of so many tokens is under way, and whose first worker may wait for an hour."""
    monkeypatch.setattr("poolhouse.engine.scheduler._LONGEST_PAUSE", 3600.0)
    monkeypatch.setattr("poolhouse.engine.scheduler._PAUSE_SHARE", 1e9)
    scheduler = Scheduler(2048, workers=2)
    scheduler.add(submission(1))
    scheduler.next(None)  # so that there was a batch
    scheduler.add(submission(tokens))
    assert total(scheduler.next(None)) == tokens
    return scheduler


def test_a_free_worker_waits_for_as_much_as_the_other_has(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = working(100, monkeypatch)
    free = Taker(scheduler, 0)
    scheduler.add(submission(60))
    assert free.waits
    scheduler.add(submission(40))
    assert total(free.result()) == 100


def test_a_free_worker_goes_on_when_the_other_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = working(100, monkeypatch)
    free = Taker(scheduler, 0)
    scheduler.add(submission(60))
    assert free.waits
    assert total(scheduler.next(None)) == 60  # the other one is quicker to hear of it
    assert free.waits
    scheduler.add(submission(70))
    assert total(free.result()) == 70


def test_a_free_worker_does_not_wait_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = working(100, monkeypatch)
    monkeypatch.setattr("poolhouse.engine.scheduler._LONGEST_PAUSE", 0.05)
    started = time.monotonic()
    scheduler.add(submission(60))
    assert total(scheduler.next(0)) == 60
    assert time.monotonic() - started >= 0.05


def test_callers_who_were_just_answered_find_their_worker_free() -> None:
    scheduler = Scheduler(2048, workers=2)
    first, second, all_core = all_waiting(scheduler)
    scheduler.add(submission(40))
    assert total(all_core.result()) == 40
    scheduler.finished(None)
    scheduler.add(submission(50))
    assert first.waits
    assert second.waits
    assert total(scheduler.next(None)) == 50
    scheduler.close()


def test_a_closed_scheduler_hands_out_what_waits_to_every_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = working(100, monkeypatch)
    free = Taker(scheduler, 0)
    scheduler.add(submission(60))
    assert free.waits
    scheduler.close()
    assert total(free.result()) == 60
    assert scheduler.next(0) is None
    assert scheduler.next(1) is None


class Meeting:
    """A backbone in which batches wait for each other, `parties` of them, and note torch's threads."""

    def __init__(self, engine: Engine, parties: int) -> None:
        self.backbone = engine.model.backbone
        self.barrier = threading.Barrier(parties)
        self.threads: list[int] = []

    def __call__(self, batch: Batch) -> Tensor:
        self.barrier.wait(60)
        self.threads.append(torch.get_num_threads())
        if bool((batch.ids == BROKEN).any()):
            raise torch.AcceleratorError("device lost")
        return self.backbone(batch)


def with_workers(engine: Engine, backbone: Any, workers: int = 2, one_core_tokens: int = 0, **options: Any) -> Engine:
    model = replace(engine.model, backbone=backbone)
    return Engine(
        model, engine.tokenizer, replace(engine.options, workers=workers, one_core_tokens=one_core_tokens, **options)
    )


def ids(*tokens: int) -> Request:
    return Request(Prompt(None, np.array(tokens)), "embed")


def answered(futures: list[Future[Answer]]) -> list[Answer]:
    assert not wait(futures, timeout=60).not_done
    return [future.result(0) for future in futures]


def test_two_batches_run_side_by_side_on_half_the_threads(engine: Engine) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        meeting = Meeting(engine, parties=2)
        with with_workers(engine, meeting, max_batch_tokens=4) as two:
            # No two of them fit into one batch.
            for answer in answered(two.submit([ids(3, 4, 5), ids(6, 4, 5)])):
                assert np.isfinite(answer.array).all()
        assert sorted(meeting.threads) == [2, 2]
        assert torch.get_num_threads() == 4
        with ThreadPoolExecutor(1) as new:
            assert new.submit(torch.get_num_threads).result() == 4
        alone = Meeting(engine, parties=1)
        with with_workers(engine, alone) as two:
            answered(two.submit([ids(3, 4, 5)]))
        assert alone.threads == [4]
    finally:
        torch.set_num_threads(before)


def test_workers_change_no_answer(engine: Engine) -> None:
    texts = [f"text {number} " + "sea " * (number % 12) for number in range(400)]
    requests = [[Request(Prompt(text), "embed") for text in texts] for _ in range(2)]
    with (
        with_workers(engine, engine.model.backbone, workers=1) as one,
        with_workers(engine, engine.model.backbone, workers=3, max_batch_tokens=256) as three,
        ThreadPoolExecutor(8) as callers,
    ):
        expected = answered(one.submit(requests[0]))
        parts = [requests[1][start : start + 7] for start in range(0, 400, 7)]
        got = [
            answer for answers in callers.map(lambda part: answered(three.submit(part)), parts) for answer in answers
        ]
        assert three.pending == 0
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine.array, theirs.array, atol=2e-6)


def test_when_one_worker_loses_the_device_nothing_is_taken_and_nobody_waits_for_ever(engine: Engine) -> None:
    meeting = Meeting(engine, parties=2)
    broken = with_workers(engine, meeting, max_batch_tokens=4)
    futures = broken.submit([ids(3, 4, 5), ids(BROKEN, 4, 5)])
    # The last is taken by the healthy worker, or fails with the other one.
    assert not wait(futures, timeout=60).not_done
    with pytest.raises(EngineError, match="device lost"):
        futures[1].result(0)
    assert not broken.alive
    (late,) = broken.submit([ids(3, 4, 5)])
    with pytest.raises(EngineError, match="device lost"):
        late.result(60)
    broken.close()


def test_closing_drains_all_workers(engine: Engine) -> None:
    meeting = Meeting(engine, parties=2)
    closing = with_workers(engine, meeting, max_batch_tokens=4)
    futures = closing.submit([ids(3, 4, 5) for _ in range(6)])
    closing.close()
    assert len(answered(futures)) == 6


def test_workers_are_for_native_models_on_cpus(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "bert, wordpiece")
    with pytest.raises(ConfigError, match=r"lanes=2: .* native models; this one is transformers"):
        LLM(str(tmp_path), model_impl="transformers", lanes=2)
    with LLM(str(tmp_path), model_impl="transformers") as llm:
        assert llm.engine.options.workers == 1
    with LLM(str(tmp_path), lanes=3) as llm:
        assert llm.engine.options.workers == 3
        assert len(llm.embed(["a", "b"])) == 2
    with pytest.raises(ConfigError, match="lanes"):
        LLM(str(tmp_path), lanes=0)
