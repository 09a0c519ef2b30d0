"""Models on demand, over engines without a model that load when the test says so."""

from __future__ import annotations

import asyncio
import gc
import math
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message

from poolhouse.errors import CheckpointError, EngineError, InvalidRequest
from poolhouse.server import on_demand as module
from poolhouse.server.app import create_app
from poolhouse.server.dialects.ollama import _seconds
from poolhouse.server.models_dir import Checkpoint, ModelsDir
from poolhouse.server.on_demand import OnDemand
from poolhouse.settings import ServerSettings, Settings
from poolhouse.testing import FakeEngine
from tests.server.sockets import wait_until
from tests.server.test_models_dir import write

MEMORY = 100


class House:
    """A folder of models, and what became of them. Clear `gates[name]` to let a load of that model wait.

    opened: names in the order in which they were loaded. errors: what loading a model raises. takes: memory, else 100.
    prepare: what is done to every engine that is opened.
    """

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder = folder
        self.opened: list[str] = []
        self.engines: dict[str, FakeEngine] = {}
        self.gates: dict[str, threading.Event] = {}
        self.errors: dict[str, BaseException] = {}
        self.takes: dict[str, int] = {}
        self.prepare: Callable[[FakeEngine], None] = lambda _: None
        folder.mkdir(exist_ok=True)
        for name in names:
            self.add(name)

    def add(self, name: str) -> None:
        write(self.folder / name)

    def shut(self, name: str) -> threading.Event:
        self.gates[name] = threading.Event()
        return self.gates[name]

    def open(self, settings: Settings) -> FakeEngine:
        (name,) = settings.names
        self.opened.append(name)
        if name in self.gates:
            assert self.gates[name].wait(60)
        if name in self.errors:
            raise self.errors[name]
        engine = FakeEngine(name)
        self.prepare(engine)
        self.engines[name] = engine
        return engine

    def memory(self, _: Settings, checkpoint: Checkpoint) -> tuple[int, int]:
        return self.takes.get(checkpoint.name, MEMORY - 10), 10

    def on_demand(self, *always: FakeEngine, **settings: Any) -> tuple[OnDemand, ServerSettings]:
        server = ServerSettings.parse(**settings)
        models = ModelsDir((self.folder,), Settings(), {}, self.open, self.memory)
        return OnDemand.beside(always, models, server), server

    @contextmanager
    def served(self, *always: FakeEngine, **settings: Any) -> Iterator[TestClient]:
        on_demand, server = self.on_demand(*always, **settings)
        with TestClient(create_app(always, server, on_demand=on_demand)) as http:
            yield http


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path / "models", "a", "b", "c")


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


def embed(http: TestClient, model: str | None = None, **fields: Any) -> httpx.Response:
    return http.post("/v1/embeddings", json={"input": "the moon", **({"model": model} if model else {}), **fields})


def until(reached: Callable[[], bool]) -> None:
    wait_until(reached, "a state of the models")


def states(http: TestClient) -> dict[str, str]:
    return {one["id"]: one["state"] for one in http.get("/v1/models").json()["data"]}


def loaded(http: TestClient) -> set[str]:
    """As /api/ps has it, which does not look at the folders."""
    return {one["name"].removesuffix(":latest") for one in http.get("/api/ps").json()["models"]}


def metric(http: TestClient, series: str) -> float:
    found = [line.split()[-1] for line in http.get("/metrics").text.splitlines() if line.startswith(series)]
    return float(found[0]) if found else math.nan


# --- Loading ---


def test_a_model_is_loaded_at_its_first_request_and_once_for_all_of_them(
    house: House, threads: ThreadPoolExecutor
) -> None:
    gate = house.shut("a")
    with house.served() as http:
        assert states(http) == {"a": "available", "b": "available", "c": "available"}
        replies = [threads.submit(embed, http, "a") for _ in range(8)]
        until(lambda: house.opened == ["a"])
        assert states(http)["a"] == "loading"
        assert http.get("/health/ready").status_code == 200
        gate.set()
        assert {reply.result().status_code for reply in replies} == {200}
        assert {reply.result().json()["model"] for reply in replies} == {"a"}
        assert embed(http, "a").status_code == 200
        assert house.opened == ["a"]
        assert states(http) == {"a": "loaded", "b": "available", "c": "available"}
        assert house.engines["a"].warmed_up == ["fast"]
        assert metric(http, 'poolhouse_model_loads_total{model="a"}') == 1


def test_others_are_answered_while_a_model_loads(house: House, threads: ThreadPoolExecutor) -> None:
    always = FakeEngine("always")
    with house.served(always) as http:
        assert embed(http, "b").status_code == 200
        gate = house.shut("a")
        waiting = threads.submit(embed, http, "a")
        until(lambda: "a" in house.opened)
        assert {embed(http, name).status_code for name in ("b", "always", None)} == {200}
        assert not waiting.done()
        gate.set()
        assert waiting.result().status_code == 200


def test_models_are_loaded_one_after_the_other_as_they_were_asked_for(
    house: House, threads: ThreadPoolExecutor
) -> None:
    gate = house.shut("a")
    with house.served() as http:
        replies = []
        for name in ("a", "c", "b", "a"):
            replies.append(threads.submit(embed, http, name))
            until(lambda name=name: states(http)[name] == "loading")
        assert house.opened == ["a"]
        gate.set()
        assert [reply.result().json()["model"] for reply in replies] == ["a", "c", "b", "a"]
        assert house.opened == ["a", "c", "b"]


def test_a_load_that_takes_too_long_for_a_request_goes_on(house: House) -> None:
    gate = house.shut("a")
    with house.served(load_timeout=0.05) as http:
        reply = embed(http, "a")
        assert reply.status_code == 503
        assert "`a` was not loaded within 0.05 seconds (--load-timeout)" in reply.json()["message"]
        assert int(reply.headers["retry-after"]) >= 1
        gate.set()
        until(lambda: "a" in loaded(http))
        assert embed(http, "a").status_code == 200
        assert house.opened == ["a"]


def test_a_load_goes_on_when_its_client_is_gone(house: House) -> None:
    gate = house.shut("a")
    on_demand, settings = house.on_demand()
    app = create_app([], settings, on_demand=on_demand)

    async def leaves_then_another_comes() -> tuple[int, int]:
        gone = asyncio.Event()
        first = asyncio.create_task(_post(app, "a", gone))
        while not house.opened:
            await asyncio.sleep(0.01)
        gone.set()
        left = await first
        gate.set()
        return left, await _post(app, "a", asyncio.Event())

    assert asyncio.run(leaves_then_another_comes()) == (499, 200)
    assert house.opened == ["a"]
    # Neither holds it any more.
    resident = on_demand._models["a"].resident
    assert resident is not None
    assert resident.served.holds == 0


def test_a_request_that_is_cancelled_as_its_model_comes_holds_nothing(house: House) -> None:
    """Whichever step of the event loop it is."""
    on_demand, settings = house.on_demand()
    app = create_app([], settings, on_demand=on_demand)

    async def cancelled_after(steps: int) -> int:
        task = asyncio.create_task(_post(app, "a", asyncio.Event()))
        while "a" not in house.engines:
            await asyncio.sleep(0.001)
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        resident = on_demand._models["a"].resident
        while resident is None:
            await asyncio.sleep(0.001)
            resident = on_demand._models["a"].resident
        holds = resident.served.holds
        on_demand.unload("a")
        while on_demand._closing:
            await asyncio.sleep(0.001)
        house.engines.clear()
        return holds

    async def every_step() -> list[int]:
        return [await cancelled_after(steps) for steps in range(25)]

    assert asyncio.run(every_step()) == [0] * 25


async def _post(app: ASGIApp, model: str, gone: asyncio.Event) -> int:
    """The status of one embedding, whose client hangs up when `gone` is set."""
    body = b'{"input": "the moon", "model": "%s"}' % model.encode()
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    statuses: list[int] = []

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {
        "type": "http", "method": "POST", "path": "/v1/embeddings", "raw_path": b"/v1/embeddings", "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "scheme": "http", "http_version": "1.1",
        "server": ("here", 80), "client": ("there", 1), "root_path": "",
    }  # fmt: skip
    await app(scope, receive, send)
    return statuses[0]


def test_too_many_waiting_requests_are_refused(house: House, threads: ThreadPoolExecutor) -> None:
    gate = house.shut("a")
    with house.served(max_queued_prompts=2) as http:
        waiting = [threads.submit(embed, http, "a")]
        until(lambda: house.opened == ["a"])
        waiting.append(threads.submit(embed, http, "a"))
        refused = wait_for(lambda: embed(http, "a", dimensions=None), lambda reply: reply.status_code == 429, threads)
        assert "2 requests wait for `a` to be loaded" in refused.json()["message"]
        gate.set()
        assert {reply.result().status_code for reply in waiting} <= {200, 429}


def wait_for(
    call: Callable[[], httpx.Response], fits: Callable[[httpx.Response], bool], threads: ThreadPoolExecutor
) -> httpx.Response:
    """The first reply of several calls at a time that fits."""
    calls: list[Future[httpx.Response]] = []
    for _ in range(100):
        calls.append(threads.submit(call))
        time.sleep(0.01)
        for done in [one for one in calls if one.done()]:
            if fits(done.result()):
                return done.result()
    raise AssertionError("No reply fits.")


# --- Failures ---


def test_a_failed_load_names_its_reason_and_is_not_tried_again_at_once(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.errors["a"] = CheckpointError(f"{house.folder}/a has no tensor 'x'.")
    with house.served() as http:
        for _ in range(3):
            reply = embed(http, "a")
            assert reply.status_code == 503
            assert reply.json()["message"] == "The model `a` could not be loaded: a has no tensor 'x'."
            assert (reply.json()["type"], reply.json()["param"]) == ("ServiceUnavailableError", "model")
            assert 1 <= int(reply.headers["retry-after"]) <= 30
        assert house.opened == ["a"]
        (listed,) = [one for one in http.get("/v1/models").json()["data"] if one["id"] == "a"]
        assert (listed["state"], listed["reason"]) == ("failed", "a has no tensor 'x'.")
        assert metric(http, 'poolhouse_model_state{model="a",state="failed"}') == 1
        assert metric(http, 'poolhouse_model_load_failures_total{model="a"}') == 1
        assert embed(http, "b").status_code == 200
        # After a while it is tried again.
        del house.errors["a"]
        monkeypatch.setattr(module, "_SECONDS_TO_RETRY", 0.0)
        assert embed(http, "a").status_code == 200
        assert states(http)["a"] == "loaded"


def test_a_failed_load_is_tried_again_when_its_files_change(house: House) -> None:
    house.errors["a"] = ZeroDivisionError("a fault of ours")
    with house.served() as http:
        reply = embed(http, "a")
        assert "could not be loaded: ZeroDivisionError: a fault of ours" in reply.json()["message"]
        assert embed(http, "a").status_code == 503
        assert house.opened == ["a"]
        del house.errors["a"]
        (house.folder / "a" / "config.json").write_text('{"mended": 1}')
        assert embed(http, "a").status_code == 200


@pytest.mark.parametrize("error", [MemoryError(), SystemExit(3), KeyboardInterrupt(), EngineError("warm-up failed")])
def test_no_failure_ends_the_server(house: House, error: BaseException) -> None:
    house.errors["a"] = error
    with house.served() as http:
        assert embed(http, "a").status_code == 503
        assert embed(http, "b").status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "read"),
    [
        ("/v1/embeddings", {"input": "x"}, lambda body: body["message"]),
        ("/embed", {"inputs": "x"}, lambda body: body["error"]),
        ("/api/embed", {"input": "x"}, lambda body: body["error"]),
        ("/cohere/v2/embed", {"texts": ["x"], "input_type": "classification"}, lambda body: body["message"]),
        ("/infinity/embeddings", {"input": ["x"]}, lambda body: body["error"]["message"]),
        ("/jina/v1/embeddings", {"input": ["x"]}, lambda body: body["detail"]),
        ("/embedding", {"content": "x"}, str),
        ("/tokenize", {"prompt": "x"}, lambda body: body["message"]),
        ("/invocations", {"input": "x"}, lambda body: body["message"]),
    ],
)
def test_every_dialect_tells_it_in_its_shape(house: House, path: str, body: Any, read: Callable[[Any], str]) -> None:
    house.errors["a"] = CheckpointError("torn")
    with house.served() as http:
        reply = http.post(path, json={**body, "model": "a"})
        assert reply.status_code == 503, reply.text
        assert "could not be loaded: torn" in read(reply.json())
        assert http.post(path, json={**body, "model": "b"}).status_code == 200


def test_an_engine_that_dies_is_closed_and_the_others_go_on(house: House) -> None:
    with house.served() as http:
        assert {embed(http, name).status_code for name in "ab"} == {200}
        house.engines["a"].die(EngineError("the device is lost"))
        until(lambda: states(http)["a"] == "failed")
        reply = embed(http, "a")
        assert (reply.status_code, "its engine died: the device is lost" in reply.json()["message"]) == (503, True)
        assert embed(http, "b").status_code == 200
        assert http.get("/health").status_code == 200
        (house.folder / "a" / "note.txt").write_text("looked after")
        assert embed(http, "a").status_code == 200
        assert metric(http, 'poolhouse_model_unloads_total{model="a",reason="died"}') == 1


def test_where_a_device_is_lost_the_server_is_not_healthy(house: House) -> None:
    house.prepare = lambda engine: engine.describe(device="cuda")
    with house.served() as http:
        assert embed(http, "a").status_code == 200
        assert http.get("/health").status_code == 200
        house.engines["a"].die(EngineError("the device is lost"))
        until(lambda: http.get("/health").status_code == 503)
        assert http.get("/health/ready").json() == {"status": "failed"}
        assert http.get("/health/live").status_code == 200


# --- Folders ---


def test_names_out_of_the_folder_are_unknown(house: House) -> None:
    outside = write(house.folder.parent / "outside")
    with house.served() as http:
        for name in ("../outside", "a/../../outside", str(outside), "..", ".", "a/", "/a", "%2e%2e/outside", "a\0"):
            reply = embed(http, name)
            assert (reply.status_code, reply.json()["type"]) == (404, "NotFoundError"), name
        assert http.get("/v1/models/..%2Foutside").status_code == 404
        assert house.opened == []


def test_new_folders_appear_and_vanished_ones_go_without_a_restart(house: House) -> None:
    with house.served() as http:
        assert embed(http, "owner/späte, new one").status_code == 404
        house.add("owner/späte, new one")
        assert embed(http, "owner/späte, new one").json()["model"] == "owner/späte, new one"
        house.add("listed")
        assert "listed" in states(http)
        one = http.get("/v1/models/owner/sp%C3%A4te, new one").json()
        assert (one["id"], one["state"]) == ("owner/späte, new one", "loaded")
        shutil.rmtree(house.folder / "listed")
        assert "listed" not in states(http)
        assert embed(http, "listed").status_code == 404
        # What is in memory answers until it is closed.
        assert embed(http, "a").status_code == 200
        shutil.rmtree(house.folder / "a")
        assert states(http)["a"] == "loaded"
        assert embed(http, "a").status_code == 200
        http.post("/api/embed", json={"model": "a", "keep_alive": 0})
        until(lambda: "a" not in states(http))
        assert embed(http, "a").status_code == 404


def test_a_folder_that_vanishes_while_its_model_loads(house: House, threads: ThreadPoolExecutor) -> None:
    gate = house.shut("a")
    house.errors["a"] = CheckpointError("a does not exist.")
    with house.served() as http:
        waiting = threads.submit(embed, http, "a")
        until(lambda: house.opened == ["a"])
        shutil.rmtree(house.folder / "a")
        assert states(http)["a"] == "loading"
        gate.set()
        assert waiting.result().status_code == 503
        assert "a" not in states(http)
        assert embed(http, "a").status_code == 404


def test_a_folder_that_cannot_be_read_any_more_changes_nothing(house: House) -> None:
    with house.served() as http:
        house.folder.rename(house.folder.parent / "moved")
        assert set(states(http)) == {"a", "b", "c"}
        assert embed(http, "unknown").status_code == 404


def test_a_name_that_is_taken_means_the_model_that_is_always_loaded(house: House) -> None:
    with house.served(FakeEngine("a", width=5)) as http:
        assert states(http) == {"a": "loaded", "b": "available", "c": "available"}
        assert len(embed(http, "a").json()["data"][0]["embedding"]) == 5
        assert house.opened == []


def test_without_a_name_the_first_that_is_always_loaded_answers_or_the_only_one(tmp_path: Path) -> None:
    several = House(tmp_path / "several", "a", "b")
    with several.served(FakeEngine("first")) as http:
        assert embed(http).json()["model"] == "first"
    with several.served() as http:
        reply = embed(http)
        assert (reply.status_code, reply.json()["param"]) == (400, "model")
        assert "name one by `model`: a, b." in reply.json()["message"]
    only = House(tmp_path / "only", "owner/x")
    with only.served() as http:
        assert embed(http).json()["model"] == "owner/x"
        assert http.post("/api/embed", json={"model": "anything", "input": "x"}).json()["model"] == "owner/x"
        assert embed(http, "anything").status_code == 404
    with House(tmp_path / "empty").served() as http:
        assert embed(http).status_code == 400
        assert embed(http, "x").status_code == 404
        assert http.get("/v1/models").json()["data"] == []
        assert http.get("/weaviate/meta").status_code == 400


# --- Memory ---


def test_the_model_used_least_lately_goes_when_memory_is_needed(house: House) -> None:
    with house.served(memory_limit=2 * MEMORY) as http:
        for name in ("a", "b", "a", "c"):
            assert embed(http, name).status_code == 200
        assert loaded(http) == {"a", "c"}
        assert not house.engines["b"].alive
        assert metric(http, "poolhouse_models_bytes") == 2 * MEMORY
        assert metric(http, "poolhouse_memory_limit_bytes") == 2 * MEMORY
        assert metric(http, 'poolhouse_model_unloads_total{model="b",reason="memory"}') == 1
        assert embed(http, "b").status_code == 200
        assert loaded(http) == {"b", "c"}


def test_a_model_in_use_is_never_closed(house: House, threads: ThreadPoolExecutor) -> None:
    with house.served(memory_limit=2 * MEMORY) as http:
        assert {embed(http, name).status_code for name in "ab"} == {200}
        # Each has requests that run: the one with fewer takes no more, and the other goes on.
        house.engines["a"].open.clear()
        house.engines["b"].open.clear()
        of_a = [threads.submit(embed, http, "a", input=["x"] * 3) for _ in range(2)]
        of_b = threads.submit(embed, http, "b")
        until(lambda: len(house.engines["a"].received) == 7 and len(house.engines["b"].received) == 2)
        of_c = threads.submit(embed, http, "c")
        until(lambda: states(http)["b"] == "unloading")
        late = threads.submit(embed, http, "b")
        time.sleep(0.05)
        assert house.engines["b"].alive
        assert not any(reply.done() for reply in (of_b, of_c, late))
        first_b = house.engines["b"]
        first_b.open.set()
        assert of_b.result().status_code == of_c.result().status_code == 200
        assert not first_b.alive
        # b is wanted again, and c has nothing to do any more.
        assert late.result().status_code == 200
        assert house.opened == ["a", "b", "c", "b"]
        assert house.engines["a"].alive
        house.engines["a"].open.set()
        assert {reply.result().status_code for reply in of_a} == {200}


def test_a_model_that_cannot_fit_is_refused_and_nothing_is_closed_for_it(house: House) -> None:
    house.takes["c"] = 3 * 2**20
    always = FakeEngine("always")
    always.describe(weight_bytes=2**20)
    with house.served(always, memory_limit="3MiB") as http:
        assert {embed(http, name).status_code for name in "ab"} == {200}
        reply = embed(http, "c")
        assert reply.status_code == 503
        expected = "it needs 3.0 MiB of memory, and of the 3.0 MiB of --memory-limit 2.0 MiB can be had."
        assert reply.json()["message"] == f"The model `c` could not be loaded: {expected}"
        assert loaded(http) == {"always", "a", "b"}
        assert metric(http, "poolhouse_models_bytes") == 2**20 + 2 * MEMORY


def test_a_pinned_model_stays(house: House) -> None:
    with house.served(memory_limit=2 * MEMORY, pin="a", unload_after=0.01) as http:
        assert embed(http, "a").status_code == 200
        for name in ("b", "c", "b"):
            assert embed(http, name).status_code == 200
            until(lambda: loaded(http) == {"a"})
        http.post("/api/embed", json={"model": "a", "keep_alive": 0})
        assert house.opened == ["a", "b", "c", "b"]
        house.takes["b"] = 2 * MEMORY
        assert "100.0 MiB" not in (message := embed(http, "b").json()["message"])
        assert "can be had" in message


def test_what_a_model_takes_is_what_its_weights_take_once_they_are_there(house: House) -> None:
    house.prepare = lambda engine: engine.describe(weight_bytes=140)
    with house.served() as http:
        embed(http, "a")
        (one, *_) = http.get("/v1/models").json()["data"]
        assert (one["weight_bytes"], one["memory_bytes"]) == (140, 150)


def test_fifty_requests_for_five_models_with_memory_for_two(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    house = House(tmp_path / "models", *"abcde")
    most = 0
    with house.served(memory_limit=2 * MEMORY) as http:
        replies = [threads.submit(embed, http, "abcde"[index % 5], input=f"text {index}") for index in range(50)]
        while not all(reply.done() for reply in replies):
            most = max(most, metric(http, "poolhouse_models_bytes"))
        for index, reply in enumerate(replies):
            assert reply.result().status_code == 200, reply.result().text
            assert reply.result().json()["model"] == "abcde"[index % 5]
        assert most <= 2 * MEMORY
        assert len(loaded(http)) <= 2
        assert set(house.opened) == set("abcde")


def test_an_engine_that_was_closed_is_not_kept(house: House) -> None:
    with house.served(unload_after=0) as http:
        assert embed(http, "a").status_code == 200
        engine = weakref.ref(house.engines.pop("a"))
        until(lambda: states(http)["a"] == "available")

        def is_gone() -> bool:
            gc.collect()
            return engine() is None

        until(is_gone)


# --- Idle ---


def test_an_idle_model_is_closed_after_a_while(house: House) -> None:
    with house.served(unload_after=0.3) as http:
        assert embed(http, "a").status_code == 200
        (one, *_) = http.get("/v1/models").json()["data"]
        assert one["last_used"] < one["expires"] <= one["last_used"] + 0.3 + 1e-3
        until(lambda: states(http)["a"] == "available")
        assert not house.engines["a"].alive
        (one, *_) = http.get("/v1/models").json()["data"]
        # What it can do is known now.
        assert (one["tasks"], one["max_model_len"], one["memory_bytes"]) == (["embed", "token_embed"], 512, 0)
        assert one["last_used"] is not None
        assert metric(http, 'poolhouse_model_unloads_total{model="a",reason="idle"}') == 1
        assert metric(http, 'poolhouse_model_state{model="a",state="available"}') == 1


def test_a_model_does_not_expire_while_it_is_used(house: House, threads: ThreadPoolExecutor) -> None:
    with house.served(unload_after=0.05) as http:
        gate = house.shut("a")
        waiting = threads.submit(embed, http, "a")
        until(lambda: house.opened == ["a"])
        gate.set()
        assert waiting.result().status_code == 200
        house.gates.clear()
        until(lambda: not loaded(http))
        # A request runs for longer than the time.
        house.prepare = lambda engine: engine.open.clear()
        running = threads.submit(embed, http, "b")
        until(lambda: "b" in house.engines and bool(house.engines["b"].received))
        time.sleep(0.2)
        assert house.engines["b"].alive
        assert not running.done()
        house.engines["b"].open.set()
        assert running.result().status_code == 200


def test_ollamas_keep_alive_says_how_long_a_model_stays(house: House) -> None:
    def ask(**fields: Any) -> httpx.Response:
        return http.post("/api/embed", json={"model": "a:latest", "input": "the moon", **fields})

    def expires() -> str:
        (one,) = http.get("/api/ps").json()["models"]
        return str(one["expires_at"])

    with house.served(unload_after=1000) as http:
        assert [one["name"] for one in http.get("/api/tags").json()["models"]] == ["a:latest", "b:latest", "c:latest"]
        assert http.get("/api/ps").json() == {"models": []}
        reply = ask(keep_alive=-1).json()
        assert reply["load_duration"] > 0
        assert expires() == "9999-12-31T23:59:59Z"
        assert ask(keep_alive="1h30m").json()["load_duration"] == 0
        in_minutes = expires()
        assert ask().status_code == 200
        assert expires() < in_minutes
        assert ask(keep_alive=0).status_code == 200
        until(lambda: not loaded(http))
        # Without a text it loads, or unloads, and no more.
        assert ask(input="").json()["embeddings"] == []
        assert loaded(http) == {"a"}
        assert ask(input="", keep_alive=0).json()["embeddings"] == []
        until(lambda: not loaded(http))
        assert http.post("/api/embeddings", json={"model": "a", "keep_alive": 0}).json() == {"embedding": []}
        assert house.opened == ["a", "a"]
        assert (ask(keep_alive="soon").status_code, ask(keep_alive=True).status_code) == (400, 400)
        assert ask(model="nobody", keep_alive=0, input="").status_code == 404


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        (0, 0), (5, 5), (2.5, 2.5), (-1, math.inf), ("-1", math.inf), ("0", 0), ("0s", 0), ("5m", 300), ("1h30m", 5400),
        ("300ms", 0.3), ("1.5h", 5400), (".5s", 0.5), ("-1m", math.inf), ("45", 45), (1e300, math.inf),
    ],
)  # fmt: skip
def test_durations_are_read_as_ollama_reads_them(duration: float | str, seconds: float) -> None:
    assert _seconds(duration) == pytest.approx(seconds)


@pytest.mark.parametrize("duration", ["", "m", "5 m", "5x", "five", "1h-5m", "nan", "--1m"])
def test_what_is_no_duration_is_refused(duration: str) -> None:
    with pytest.raises(InvalidRequest, match="keep_alive is seconds"):
        _seconds(duration)


# --- Lists, stops ---


def test_lists_of_all_dialects_show_what_is_known(house: House) -> None:
    always = FakeEngine("always", tasks=("classify",), label_names={0: "no", 1: "yes"})
    with house.served(always) as http:
        embed(http, "b")
        cohere = {one["name"]: one for one in http.get("/cohere/v1/models").json()["models"]}
        assert list(cohere) == ["always", "a", "b", "c"]
        assert (cohere["a"]["endpoints"], cohere["a"]["context_length"]) == ([], None)
        assert (cohere["b"]["endpoints"], cohere["b"]["context_length"]) == (["embed", "rerank"], 512)
        one = http.get("/cohere/v1/models/a").json()
        assert one == cohere["a"]
        infinity = {one["id"]: one["capabilities"] for one in http.get("/infinity/models").json()["data"]}
        assert infinity == {"always": ["classify"], "a": [], "b": ["embed", "rerank"], "c": []}
        azure = [one["id"] for one in http.get("/openai/models").json()["data"]]
        assert azure == list(cohere)
        shown = [http.post("/api/show", json={"model": name}).json() for name in "ab"]
        assert [one["capabilities"] for one in shown] == [[], ["embedding"]]
        assert house.opened == ["b"]
        # Weaviate names none: the first that fits, of those that are known.
        assert http.post("/weaviate/vectors", json={"text": "x"}).status_code == 200
        assert house.opened == ["b"]


def test_several_models_in_one_body_need_room_for_one(house: House) -> None:
    with house.served(memory_limit=MEMORY, load_timeout=20) as http:
        bodies = [{"inputs": "x", "model": name} for name in "abca"]
        reply = http.post("/vertex", json={"instances": bodies})
        assert (reply.status_code, len(reply.json()["predictions"])) == (200, 4)
        assert house.opened == ["a", "b", "c", "a"]


def test_a_stop_closes_what_is_loaded_and_what_comes(house: House) -> None:
    gate = house.shut("b")
    on_demand, settings = house.on_demand(load_timeout=0.05)
    with TestClient(create_app([], settings, on_demand=on_demand)) as http:
        assert embed(http, "a").status_code == 200
        assert embed(http, "b").status_code == 503
    assert not house.engines["a"].alive
    assert on_demand.busy
    gate.set()
    until(lambda: not on_demand.busy)
    assert not house.engines["b"].alive
