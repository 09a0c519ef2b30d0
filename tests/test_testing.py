"""The test double that ships with the package."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from poolhouse import InvalidRequest, PoolingParams
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


def test_it_needs_no_torch() -> None:
    code = "import sys, poolhouse.testing, poolhouse.server.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
