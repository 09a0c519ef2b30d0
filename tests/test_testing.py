"""The test double that ships with the package."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from poolhouse import InvalidRequest, PoolingParams
from poolhouse.engine.observing import BatchRun
from poolhouse.engine.request import Request
from poolhouse.errors import EngineClosed, EngineError, InputTooLong, UnsupportedTask
from poolhouse.inputs.prompts import Prompt
from poolhouse.testing import FakeEngine


def ask(engine: FakeEngine, text: str, **options: object) -> np.ndarray:
    request = Request(Prompt(text), options.pop("task", "embed"), PoolingParams(**options))  # type: ignore[arg-type]
    return engine.submit([request])[0].result(10).array


def test_vectors_follow_from_the_text_alone() -> None:
    one, two = FakeEngine(dimensions=(4,)), FakeEngine()
    assert np.array_equal(ask(one, "hello world"), ask(two, "hello world"))
    assert not np.array_equal(ask(one, "hello world"), ask(one, "hello moon"))
    assert np.linalg.norm(ask(one, "x")) == pytest.approx(1)
    assert ask(one, "hello world", dimensions=4).shape == (4,)
    assert ask(one, "hello wide world", task="token_embed").shape == (3, 8)
    one.close()
    two.close()


def test_it_refuses_what_an_engine_refuses() -> None:
    engine = FakeEngine(max_tokens=2)
    with pytest.raises(InputTooLong):
        ask(engine, "one two three")
    assert ask(engine, "one two three", truncate_prompt_tokens=-1).shape == (8,)
    with pytest.raises(UnsupportedTask):
        ask(engine, "x", task="classify")
    with pytest.raises(InvalidRequest, match="matryoshka"):
        ask(engine, "x", dimensions=4)
    engine.failure = EngineError("broken")
    with pytest.raises(EngineError, match="broken"):
        ask(engine, "x")
    engine.close()
    with pytest.raises(EngineClosed):
        ask(engine, "x")


def test_further_tasks_are_answered_as_they_are_alone() -> None:
    engine = FakeEngine(tasks=("embed", "token_embed", "classify"), dimensions=(4,), label_names={0: "no", 1: "yes"})
    request = Request(Prompt("two words"), "classify", PoolingParams(dimensions=4), further=("embed", "token_embed"))
    answer = engine.submit([request])[0].result(10)
    assert np.array_equal(answer.array, ask(engine, "two words", task="classify"))
    assert list(answer.further) == ["embed", "token_embed"]
    for task, array in answer.further.items():
        assert np.array_equal(array, ask(engine, "two words", task=task, dimensions=4))
    (future,) = engine.submit([Request(Prompt("x"), "embed", further=("token_classify",))])
    with pytest.raises(UnsupportedTask):
        future.result(10)
    engine.close()


def test_it_tells_how_much_waits_and_what_it_ran() -> None:
    heard: list[object] = []

    class Notes:
        def tokenized(self, texts: int, seconds: float) -> None:
            heard.append(texts)

        def ran(self, batch: BatchRun) -> None:
            heard.append((batch.sequences, batch.tokens))

    engine = FakeEngine()
    engine.observe(Notes())
    engine.warm_up("fast")
    assert engine.warmed_up == ["fast"]
    engine.open.clear()
    futures = engine.submit([Request(Prompt("two words"), "embed", priority=3), Request(Prompt("one"), "embed")])
    assert engine.pending == 2
    assert engine.received[0].priority == 3
    engine.open.set()
    for future in futures:
        future.result(10)
    engine.close()
    assert engine.pending == 0
    assert heard == [1, (1, 2), 1, (1, 1)]


def test_it_dies_of_what_it_is_told() -> None:
    engine, heard, error = FakeEngine(), list[EngineError](), EngineError("The device is lost.")
    engine.on_fatal(heard.append)
    engine.open.clear()
    waiting = engine.submit([Request(Prompt("x"), "embed")])
    assert engine.fatal is None
    engine.die(error)
    assert heard == [error]
    assert engine.fatal is error
    assert not engine.alive
    for future in (*waiting, *engine.submit([Request(Prompt("y"), "embed")])):
        assert future.exception(10) is error
    assert engine.pending == 0


def test_it_needs_no_torch() -> None:
    code = "import sys, poolhouse.testing, poolhouse.server.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
