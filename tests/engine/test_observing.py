"""What an engine tells of its work: the timing of an answer, and calls to an observer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from poolhouse import LLM
from poolhouse.engine.engine import Engine
from poolhouse.engine.observing import BatchRun
from poolhouse.engine.request import Request
from poolhouse.inputs.prompts import Prompt
from tests.checkpoints import save_checkpoint


class Notes:
    """An observer that keeps what it hears, or fails."""

    def __init__(self, failure: BaseException | None = None) -> None:
        self.failure = failure
        self.texts: list[int] = []
        self.batches: list[BatchRun] = []

    def tokenized(self, texts: int, seconds: float) -> None:
        assert seconds > 0
        self.texts.append(texts)
        if self.failure is not None:
            raise self.failure

    def ran(self, batch: BatchRun) -> None:
        self.batches.append(batch)
        if self.failure is not None:
            raise self.failure


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("bert")
    save_checkpoint(folder, "bert, wordpiece")
    return folder


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with LLM(str(folder), max_num_batched_tokens=128, overflow="chunk") as llm:
        yield llm.engine


def texts(count: int) -> list[Request]:
    return [Request(Prompt("the moon " * (1 + number % 4)), "embed") for number in range(count)]


def test_an_observer_hears_of_every_call_and_batch_once(engine: Engine) -> None:
    notes = Notes()
    engine.observe(notes)
    answers = [future.result(60) for future in engine.submit(texts(300))]
    engine.close()
    assert sorted(notes.texts) == [44, 128, 128]
    assert sum(batch.sequences for batch in notes.batches) == 300
    assert sum(batch.tokens for batch in notes.batches) == sum(len(answer.tokens) for answer in answers)
    for batch in notes.batches:
        assert batch.budget == 128
        assert batch.tokens <= 128
        assert sum(count for _, count in batch.waits) == batch.sequences
        # Texts of one tokenizer call wait together.
        assert len(batch.waits) <= 3
        assert min(seconds for seconds, _ in batch.waits) >= 0
        assert batch.forward_seconds > 0
        assert batch.pooling_seconds > 0


def test_nobody_observes_any_more_when_told_so(engine: Engine) -> None:
    notes = Notes()
    engine.observe(notes)
    engine.submit(texts(1))[0].result(60)
    engine.observe(None)
    engine.submit(texts(1))[0].result(60)
    engine.close()
    assert notes.texts == [1]
    assert len(notes.batches) == 1


@pytest.mark.parametrize("failure", [RuntimeError("no disk"), SystemExit()])
def test_an_observer_that_raises_hurts_no_request(
    engine: Engine, failure: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    notes = Notes(failure)
    engine.observe(notes)
    for _ in range(3):
        for future in engine.submit(texts(20)):
            assert np.isfinite(future.result(60).array).all()
    assert engine.alive
    assert len(notes.texts) == 3
    assert sum("observer failed" in record.message for record in caplog.records) == 1


def test_an_answer_says_where_its_time_went(engine: Engine) -> None:
    answers = [future.result(60) for future in engine.submit(texts(300))]
    for answer in answers:
        assert answer.timing.tokenize_seconds > 0
        assert answer.timing.queue_seconds >= 0
        assert answer.timing.run_seconds > 0
    # What went through together shares one object: three calls of the tokenizer, and batches of several texts.
    assert len({id(answer.timing) for answer in answers}) < 200
    waits = [answer.timing.queue_seconds for answer in answers]
    assert max(waits) > min(waits)
