"""The engine on the embedded model: futures, faults, cancellation, shutdown."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from poolhouse.engine.engine import Engine
from poolhouse.engine.open import open_engine
from poolhouse.engine.options import EngineOptions
from poolhouse.engine.queue import WaitingRequest
from poolhouse.engine.request import Request
from poolhouse.engine.runner import FatalDeviceError, Launched
from poolhouse.engine.waiting import gather
from poolhouse.errors import EngineClosed, EngineError, InputTooLong, InvalidRequest, NonFiniteResult, UnsupportedTask
from poolhouse.inputs.prompts import Prompt
from poolhouse.models.model import Model
from poolhouse.packing.pack import Batch
from poolhouse.params import PoolingParams
from poolhouse.settings import Settings

TEXTS = ["a short text", "a rather longer text about the weather in the mountains", "third", "x " * 120]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with open_engine(Settings.parse()) as engine:
        yield engine


def embed(text: str, **params: Any) -> Request:
    return Request(Prompt(text=text, ids=None), "embed", PoolingParams(**params))


class Hurt:
    """A backbone that does something to the packs that hold a token."""

    def __init__(self, model: Model, token: int, harm: Any) -> None:
        self.model, self.token, self.harm = model, token, harm

    def __call__(self, batch: Batch) -> Tensor:
        hidden = self.model.backbone(batch)
        where = batch.ids == self.token
        return self.harm(hidden, where) if bool(where.any()) else hidden


def hurt_engine(engine: Engine, harm: Any, token: int = 101010 % 30000) -> Engine:
    model = engine.model
    return Engine(
        Model(Hurt(model, token, harm), model.pipelines, model.facts, model.plan),
        engine.tokenizer,
        EngineOptions(max_batch_tokens=512),
    )


def ids(*tokens: int) -> Request:
    return Request(Prompt(text=None, ids=np.array(tokens)), "embed")


def test_packed_equals_alone(engine: Engine) -> None:
    together = [future.result(60).array for future in engine.submit([embed(text) for text in TEXTS])]
    for text, array in zip(TEXTS, together, strict=True):
        (future,) = engine.submit([embed(text)])
        assert np.abs(future.result(60).array - array).max() < 1e-6


def test_tasks_and_params_may_mix_in_one_pack(engine: Engine) -> None:
    requests = [
        embed("one"),
        Request(Prompt(text="two words", ids=None), "token_embed"),
        embed("three", use_activation=False),
    ]
    one, two, three = (future.result(60).array for future in engine.submit(requests))
    assert one.shape == (384,)
    assert two.shape == (4, 384)
    assert np.linalg.norm(one) == pytest.approx(1, abs=1e-5)
    assert abs(np.linalg.norm(three) - 1) > 1e-2


def test_a_bad_request_fails_alone(engine: Engine) -> None:
    requests = [
        embed("good"),
        embed("long " * 400),
        ids(5, 10**6),
        Request(Prompt(text="x", ids=None), "classify"),
        Request(Prompt(text="x", ids=None), "embed", prompt_name="query"),
        embed("good"),
    ]
    good, long, vocabulary, task, prompt, again = engine.submit(requests)
    assert np.allclose(good.result(60).array, again.result(60).array, atol=1e-6)
    with pytest.raises(InputTooLong, match="maximum context length is 256 tokens"):
        long.result(60)
    with pytest.raises(InvalidRequest, match="Token id 1000000 is out of vocabulary"):
        vocabulary.result(60)
    with pytest.raises(UnsupportedTask, match="Supported tasks"):
        task.result(60)
    with pytest.raises(InvalidRequest, match="no prompt named 'query'"):
        prompt.result(60)


def test_an_input_that_breaks_the_model_fails_alone(engine: Engine) -> None:
    def harm(hidden: Tensor, where: Tensor) -> Tensor:
        raise RuntimeError("broken kernel")

    with hurt_engine(engine, harm, token=7777) as broken:
        futures = broken.submit([ids(101, 2000 + n, 102) for n in range(5)] + [ids(101, 7777, 102)] + [embed("fine")])
        for future in [*futures[:5], futures[6]]:
            assert np.isfinite(future.result(60).array).all()
        with pytest.raises(EngineError, match="broken kernel"):
            futures[5].result(60)
        assert broken.alive


def test_nan_is_an_error_for_that_item_alone(engine: Engine) -> None:
    def harm(hidden: Tensor, where: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[where] = torch.nan
        return hidden

    with hurt_engine(engine, harm, token=7777) as broken:
        good, bad = broken.submit([ids(101, 2000, 102), ids(101, 7777, 102)])
        assert np.isfinite(good.result(60).array).all()
        with pytest.raises(NonFiniteResult, match="NaN or infinity"):
            bad.result(60)


def test_a_lost_device_fails_what_waits_and_the_engine_says_it_is_dead(engine: Engine) -> None:
    def harm(hidden: Tensor, where: Tensor) -> Tensor:
        raise torch.AcceleratorError("device lost")

    broken = hurt_engine(engine, harm, token=7777)
    (future,) = broken.submit([ids(101, 7777, 102)])
    with pytest.raises(EngineError):
        future.result(60)
    broken._workers.join(60)
    assert not broken.alive
    (late,) = broken.submit([embed("anyone there?")])
    with pytest.raises(EngineError):
        late.result(60)
    broken.close()


@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt])
def test_a_device_thread_that_dies_answers_everybody_with_an_error(engine: Engine, end: type[BaseException]) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def harm(hidden: Tensor, where: Tensor) -> Tensor:
        entered.set()
        go_on.wait(60)
        raise end

    broken = hurt_engine(engine, harm, token=7777)
    (running,) = broken.submit([ids(101, 7777, 102)])
    assert entered.wait(60)
    waiting = broken.submit([ids(101, 2000, 102), ids(101, 3000, 102)])
    go_on.set()
    for future in (running, *waiting):
        with pytest.raises(EngineError, match="The engine failed"):
            future.result(60)
    broken._workers.join(60)
    assert not broken.alive
    (late,) = broken.submit([embed("anyone there?")])
    with pytest.raises(EngineError, match="The engine failed"):
        late.result(60)
    broken.close()


def test_a_device_that_is_lost_with_two_batches_on_it_fails_both(engine: Engine) -> None:
    def launch(batch: list[WaitingRequest]) -> Launched:
        for ready in batch:
            ready.future.set_running_or_notify_cancel()
        return Launched(batch, [], None)

    def finish(launched: Launched) -> None:
        raise FatalDeviceError("The device is lost.")

    # Two prompts do not fit into one batch of this size.
    broken = Engine(engine.model, engine.tokenizer, EngineOptions(max_batch_tokens=4))
    runner: Any = broken._runner
    runner.asynchronous, runner.launch, runner.finish = True, launch, finish
    for future in broken.submit([ids(101, 2000, 102), ids(101, 3000, 102)]):
        with pytest.raises(FatalDeviceError):
            future.result(60)
    broken._workers.join(60)
    assert not broken.alive
    broken.close()


def test_a_cancelled_prompt_in_pieces_takes_its_pieces_out_of_the_queue(engine: Engine) -> None:
    entered, go_on = threading.Event(), threading.Event()
    seen: list[int] = []

    def harm(hidden: Tensor, where: Tensor) -> Tensor:
        entered.set()
        go_on.wait(60)
        return hidden

    def watched(batch: Batch) -> Tensor:
        seen.append(len(batch.ids))
        return hurt(batch)

    hurt = Hurt(engine.model, 7777, harm)
    model = Model(watched, engine.model.pipelines, engine.model.facts, engine.model.plan)
    with Engine(model, engine.tokenizer, EngineOptions(max_batch_tokens=512, overflow="chunk")) as slow:
        (first,) = slow.submit([ids(101, 7777, 102)])
        assert entered.wait(60)
        (long,) = slow.submit([ids(*[2000] * 1000)])
        assert long.cancel()
        go_on.set()
        first.result(60)
        slow.submit([ids(101, 102)])[0].result(60)
    assert seen == [3, 2]


def test_a_cancelled_request_leaves_the_queue(engine: Engine) -> None:
    entered, go_on = threading.Event(), threading.Event()
    seen: list[int] = []

    def harm(hidden: Tensor, where: Tensor) -> Tensor:
        entered.set()
        go_on.wait(60)
        seen.append(len(hidden))
        return hidden

    with hurt_engine(engine, harm, token=101) as slow:
        (first,) = slow.submit([ids(101, 2000, 102)])
        assert entered.wait(60)
        waiting = slow.submit([ids(101, *range(2000, 2050), 102), ids(101, 3000, 3001, 102)])
        assert waiting[0].cancel()
        go_on.set()
        first.result(60)
        assert len(waiting[1].result(60).array) == 384
        with pytest.raises(CancelledError):
            waiting[0].result(60)
    assert seen == [3, 4]


def test_close_answers_what_was_accepted_and_refuses_the_rest(engine: Engine) -> None:
    model = engine.model
    other = Engine(model, engine.tokenizer, EngineOptions(max_batch_tokens=512))
    futures = other.submit([embed(text) for text in TEXTS * 20])
    other.close()
    assert all(future.result(0).array.shape == (384,) for future in futures)
    assert not other.alive
    for requests in ([embed("late")], [embed("late"), embed("later")]):
        for future in other.submit(requests):
            with pytest.raises(EngineClosed):
                future.result(10)


def test_several_threads_get_the_answers_to_their_own_questions(engine: Engine) -> None:
    texts = [f"text number {n} " + "word " * (n % 17) for n in range(120)]
    expected = [future.result(60).array for future in engine.submit([embed(text) for text in texts])]
    wrong: list[str] = []

    def ask(start: int) -> None:
        for index in range(start, len(texts), 8):
            (future,) = engine.submit([embed(texts[index])])
            if np.abs(future.result(60).array - expected[index]).max() > 1e-5:
                wrong.append(texts[index])

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert wrong == []


def test_what_is_answered_is_kept_by_nobody(engine: Engine) -> None:
    async def ask() -> tuple[weakref.ref[Any], weakref.ref[Any]]:
        requests = [embed(text) for text in TEXTS]
        answers = await gather(engine.submit(requests))
        return weakref.ref(requests[0].future), weakref.ref(answers[-1].array)

    # Nor does it wait for the collector of garbage, which an idle process never calls.
    gc.collect()
    gc.disable()
    try:
        kept = asyncio.run(ask())
        end = time.monotonic() + 60
        # A worker lets go of its batch just after the callers hear.
        while [one for one in kept if one() is not None]:
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        gc.enable()
