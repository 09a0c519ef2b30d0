"""Parts of an engine that fail behind a server: whose request is hurt, and what becomes of the process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from poolhouse import LLM
from poolhouse.engine.engine import Engine
from poolhouse.packing.pack import Batch
from poolhouse.params import PoolingParams
from poolhouse.pooling.pipeline import Pipeline
from poolhouse.pooling.rows import Rows
from tests.checkpoints import save_checkpoint
from tests.server.running import Running
from tests.server.sockets import Client, get, in_thread, load, wait_until

BROKEN = 7


class Held:
    """A backbone that waits for `go_on`, and does `harm` to the packs that hold BROKEN."""

    def __init__(self, engine: Engine, harm: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        self.backbone, self.harm = engine.model.backbone, harm
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.packs: list[int] = []

    def __call__(self, batch: Batch) -> Tensor:
        self.entered.set()
        assert self.go_on.wait(60)
        self.packs.append(len(batch.segments.lengths))
        hidden, broken = self.backbone(batch), batch.ids == BROKEN
        if batch.read is not None:
            broken = broken[batch.read.rows]
        return hidden if self.harm is None else self.harm(hidden, broken)


class Raising:
    """A pipeline that raises where BROKEN is in its rows, and is otherwise the one it stands for."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        if bool((rows.ids == BROKEN).any()):
            raise ZeroDivisionError("this pipeline fails")
        return self.pipeline(rows, params)


def not_a_number(hidden: Tensor, where: Tensor) -> Tensor:
    hidden = hidden.clone()
    hidden[where] = torch.nan
    return hidden


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("bert")
    save_checkpoint(folder, "bert, wordpiece")
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Iterator[Engine]:
    # With one worker, what comes after the first pack waits for it.
    with LLM(str(folder), lanes=1) as llm:
        yield llm.engine


def engine_that(fails: str, whole: Engine) -> tuple[Held, Engine]:
    backbone = Held(whole, not_a_number if fails == "is not a number" else None)
    pipelines: Any = dict(whole.model.pipelines)
    if fails == "raises":
        pipelines = {task: Raising(pipeline) for task, pipeline in pipelines.items()}
    return backbone, Engine(
        replace(whole.model, backbone=backbone, pipelines=pipelines), whole.tokenizer, whole.options
    )


@pytest.mark.parametrize(
    ("fails", "words"),
    [("raises", "The model failed on this input: this pipeline fails"), ("is not a number", "NaN or infinity")],
)
@pytest.mark.parametrize("task", ["embed", "token_embed"])
def test_one_input_that_fails_in_a_shared_batch_fails_alone(whole: Engine, fails: str, words: str, task: str) -> None:
    backbone, engine = engine_that(fails, whole)
    prompts = [[2, 5, 6, 8], [BROKEN] * 4, [2, 6, 8, 9], [2, 9, 9, 3]]
    with in_thread(engine) as running:
        url = running.url
        first = Client(url).send("/pooling", {"input": [2, 3], "task": task})
        assert backbone.entered.wait(60)
        clients = [Client(url).send("/pooling", {"input": ids, "task": task}) for ids in prompts]
        wait_until(lambda: load(url) == 5 and len(engine._scheduler) == 4, "all to wait")
        backbone.go_on.set()
        replies = [client.reply() for client in clients]
        assert first.reply().status == 200
        assert backbone.packs[:2] == [1, 4]
        assert [reply.status for reply in replies] == [200, 500, 200, 200]
        error = replies[1].json
        assert (error["type"], error["code"]) == ("InternalServerError", 500)
        assert words in error["message"]
        for ids, reply in zip(prompts, replies, strict=True):
            if reply.status == 200:
                alone = Client(url).ask("/pooling", {"input": ids, "task": task}).json["data"][0]["data"]
                assert np.abs(np.array(reply.json["data"][0]["data"]) - np.array(alone)).max() < 1e-5
        assert load(url) == 0
        assert get(url, "/health").status == 200


class Panic(BaseException):
    """What native code raises that panicked: no Exception."""


@pytest.mark.parametrize("failure", [SystemExit(3), KeyboardInterrupt(), Panic("panicked"), MemoryError()])
@pytest.mark.parametrize("texts", ["the moon", ["the moon"] * 300], ids=["in the event loop", "in threads"])
def test_a_tokenizer_call_that_dies_fails_its_request_and_no_later_one(
    whole: Engine, monkeypatch: pytest.MonkeyPatch, failure: BaseException, texts: Any
) -> None:
    encode, fails = whole.tokenizer.encode, threading.Event()

    def dying(prompts: Any, limits: Any) -> Any:
        if fails.is_set():
            raise failure
        return encode(prompts, limits)

    monkeypatch.setattr(whole.tokenizer, "encode", dying)
    with in_thread(Engine(whole.model, whole.tokenizer, whole.options)) as running:
        client = Client(running.url)
        for _ in range(4):  # more than there are threads
            fails.set()
            reply = client.ask("/v1/embeddings", {"input": texts})
            fails.clear()
            assert reply.status == 500
            assert (reply.json["object"], reply.json["type"]) == ("error", "InternalServerError")
            assert client.ask("/v1/embeddings", {"input": texts}).status == 200
        assert load(running.url) == 0
        assert get(running.url, "/health").status == 200


# Both are asked at once; the one that lives takes its time.
TWO = """
    class Mortal(FakeEngine):
        def _work(self, request):
            super()._work(request)
            if request.prompt.text == "die": threading.Thread(target=self.die, args=(PoolhouseError("The device is gone."),)).start()
    engines = [FakeEngine('slow'), Mortal('mortal')]
    engines[0].open.clear()
    threading.Thread(target=lambda: (sys.stdin.readline(), engines[0].open.set()), daemon=True).start()"""


def test_a_fatal_error_of_one_engine_ends_the_process_after_what_the_other_has_in_flight() -> None:
    server = Running(TWO, stdin=True).ready()
    early = Client(server.url).send("/v1/embeddings", {"input": "early", "model": "slow"})
    wait_until(lambda: load(server.url) == 1, "the early request")
    dying = Client(server.url).ask("/v1/embeddings", {"input": "die", "model": "mortal"})
    assert dying.status == 200
    wait_until(lambda: get(server.url, "/health/ready").status == 503, "the death")
    wait_until(lambda: get(server.url, "/health/ready").json == {"status": "stopping"}, "the stop")
    late = Client(server.url).ask("/v1/embeddings", {"input": "late", "model": "slow"})
    assert (late.status, late.headers["retry-after"]) == (503, "5")
    assert get(server.url, "/health/live").status == 200
    assert server.process.stdin is not None
    server.process.stdin.write("now\n")
    server.process.stdin.flush()
    assert early.reply().status == 200
    status, log = server.ended()
    assert status == 1
    assert "poolhouse: The device is gone." in log


HOLDING = """
    class Holding(FakeEngine):
        def close(self, drain_seconds=30.0): pass
    engines = [Holding('holding')]
    engines[0].open.clear()"""


def test_what_a_batch_still_holds_when_a_stop_has_waited_long_enough_is_refused() -> None:
    server = Running(HOLDING, shutdown_seconds=0.2).ready()
    asked = Client(server.url).send("/v1/embeddings", {"input": "early"})
    wait_until(lambda: load(server.url) == 1, "the request")
    server.process.send_signal(signal.SIGTERM)
    reply = asked.reply()
    assert (reply.status, reply.json["message"]) == (503, "The server was stopped before it could answer.")
    server.process.kill()
    assert "Traceback" not in server.ended()[1]


LOSING = """
    import torch
    from dataclasses import replace
    from poolhouse import LLM
    from poolhouse.engine.engine import Engine
    whole = LLM({folder!r}).engine
    def losing(batch):
        if bool((batch.ids == {broken}).any()): raise torch.AcceleratorError("device lost")
        return whole.model.backbone(batch)
    engines = [Engine(replace(whole.model, backbone=losing), whole.tokenizer, whole.options)]"""


def test_a_lost_device_fails_what_it_ran_and_ends_the_process(folder: Path) -> None:
    server = Running(LOSING.format(folder=str(folder), broken=BROKEN), shutdown_seconds=60).ready()
    kept = Client(server.url)
    assert kept.ask("/v1/embeddings", {"input": [2, 5, 3]}).status == 200
    lost = kept.ask("/v1/embeddings", {"input": [2, BROKEN, 3]})
    assert lost.status == 500
    assert "device lost" in lost.json["message"]
    status, log = server.ended()
    assert status == 1
    assert "poolhouse: The device failed: device lost" in log
