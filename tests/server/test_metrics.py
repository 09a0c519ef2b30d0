"""What Prometheus reads: requests, prompts, phases, batches, queues, and vLLM's names for them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from poolhouse import LLM
from poolhouse.server.app import create_app
from poolhouse.settings import ServerSettings
from poolhouse.testing import FakeEngine
from tests.checkpoints import save_checkpoint

Scrape = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scraped(http: TestClient) -> Scrape:
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(scrape: Scrape, name: str, **labels: str) -> float | None:
    return scrape.get((name, frozenset(labels.items())))


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine("fake", max_tokens=8)


@pytest.fixture
def http(engine: FakeEngine) -> Iterator[TestClient]:
    settings = ServerSettings(max_queued_prompts=3, request_timeout_seconds=0.2, max_body_bytes=2000)
    with TestClient(create_app([engine, FakeEngine("other")], settings)) as client:
        yield client


def test_requests_prompts_and_tokens_are_counted_by_route_model_and_task(http: TestClient) -> None:
    http.post("/v1/embeddings", json={"input": ["one two", "three"]})
    http.post("/pooling", json={"input": "one two three", "task": "token_embed", "model": "other"})
    http.post("/pooling", json={"input": "a b c d e f g h i j", "truncate_prompt_tokens": 4})
    scrape = scraped(http)
    for route, model, prompts, task in (
        ("/v1/embeddings", "fake", 2, "embed"),
        ("/pooling", "other", 1, "token_embed"),
        ("/pooling", "fake", 1, "embed"),
    ):
        assert value(scrape, "poolhouse_prompts_total", route=route, model=model, task=task) == prompts
        assert value(scrape, "poolhouse_requests_total", route=route, status="200", model=model) == 1
        assert value(scrape, "poolhouse_request_seconds_count", route=route, model=model) == 1
    assert value(scrape, "poolhouse_prompt_tokens_total", model="fake") == 3 + 4
    assert value(scrape, "poolhouse_prompt_tokens_total", model="other") == 3
    assert value(scrape, "poolhouse_truncated_prompts_total", model="fake") == 1
    assert value(scrape, "poolhouse_truncated_prompts_total", model="other") == 0
    assert value(scrape, "poolhouse_parse_seconds_count") == 3
    assert value(scrape, "poolhouse_serialize_seconds_count") == 3
    assert value(scrape, "poolhouse_requests_in_flight") == 1


@pytest.mark.parametrize(
    ("method", "path", "body", "route", "status", "kind", "model"),
    [
        ("POST", "/v1/embeddings", {"input": "x", "dimensions": "many"}, "/v1/embeddings", 400, "Bad Request", ""),
        ("POST", "/v1/embeddings", {"input": "a b c d e f g h i"}, "/v1/embeddings", 400, "BadRequestError", "fake"),
        ("POST", "/v1/embeddings", {"input": "a", "model": "x"}, "/v1/embeddings", 404, "NotFoundError", ""),
        ("POST", "/v1/embeddings", {"input": "a" * 3000}, "/v1/embeddings", 413, "Request Entity Too Large", ""),
        ("GET", "/nothing/here", None, "unknown", 404, "Not Found", ""),
    ],
)
def test_errors_are_counted_by_their_kind(
    http: TestClient, method: str, path: str, body: Any, route: str, status: int, kind: str, model: str
) -> None:
    assert http.request(method, path, json=body).status_code == status
    scrape = scraped(http)
    assert value(scrape, "poolhouse_errors_total", route=route, kind=kind) == 1
    # An empty label is none to Prometheus.
    assert value(scrape, "poolhouse_requests_total", route=route, status=str(status), model=model) == 1


def test_failures_of_the_engine_belong_to_its_model(engine: FakeEngine, http: TestClient) -> None:
    engine.failure = ZeroDivisionError("inside")
    with TestClient(http.app, raise_server_exceptions=False) as client:
        client.post("/v1/embeddings", json={"input": "one"})
        scrape = scraped(client)
    assert value(scrape, "poolhouse_errors_total", route="/v1/embeddings", kind="InternalServerError") == 1
    assert value(scrape, "poolhouse_requests_total", route="/v1/embeddings", status="500", model="fake") == 1


def test_rejections_and_time_outs_have_counters_that_begin_at_0(engine: FakeEngine, http: TestClient) -> None:
    names = [f"poolhouse_{what}_requests_total" for what in ("rejected", "timed_out", "abandoned")]
    assert [value(scraped(http), name, model=model) for name in names for model in ("fake", "other")] == [0.0] * 6
    engine.open.clear()
    waiting = threading.Thread(target=http.post, args=("/v1/embeddings",), kwargs={"json": {"input": ["a", "b"]}})
    waiting.start()
    while value(scraped(http), "poolhouse_queued_prompts", model="fake") != 2:
        time.sleep(0.005)
    assert http.post("/v1/embeddings", json={"input": ["a", "b"]}).status_code == 429
    waiting.join(10)
    engine.open.set()
    scrape = scraped(http)
    assert [value(scrape, name, model="fake") for name in names] == [1, 1, 0]
    assert value(scrape, "poolhouse_queued_prompts", model="fake") == 0


def test_a_client_that_hangs_up_is_counted() -> None:
    engine = FakeEngine("fake")
    engine.open.clear()
    app = create_app([engine])
    messages = [{"type": "http.request", "body": b'{"input": "x"}'}, {"type": "http.disconnect"}]
    scope = {
        "type": "http", "method": "POST", "path": "/v1/embeddings", "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "client": None,
    }  # fmt: skip

    async def receive() -> Any:
        return messages.pop(0)

    async def send(_: Any) -> None:
        pass

    asyncio.run(app(scope, receive, send))
    engine.open.set()
    with TestClient(app) as http:
        scrape = scraped(http)
    assert value(scrape, "poolhouse_abandoned_requests_total", model="fake") == 1
    assert value(scrape, "poolhouse_errors_total", route="/v1/embeddings", kind="Client Closed Request") == 1


def test_callers_cannot_grow_the_metrics(http: TestClient) -> None:
    def ask(number: int) -> int:
        http.get(f"/nothing/{number}")
        http.post("/v1/embeddings", json={"input": "x", "model": f"model {number}"})
        http.post("/v1/embeddings", json={"input": "x", "adapter": f"adapter {number}"})
        http.request(f"METHOD{number}", "/v1/embeddings")
        return len(scraped(http))

    ask(0)
    assert len({ask(number) for number in range(1, 5)}) == 1


def test_the_process_is_measured_too(http: TestClient) -> None:
    scrape = scraped(http)
    assert (value(scrape, "process_resident_memory_bytes") or 0) > 10_000_000
    assert (value(scrape, "process_open_fds") or 0) > 3
    names = {name for name, _ in scrape}
    assert {"process_cpu_seconds_total", "python_info", "python_gc_collections_total"} <= names


@pytest.fixture(scope="module")
def two_engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folders: list[Path] = [tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")]
    for folder in folders:
        save_checkpoint(folder, "bert, wordpiece")
    options = {"max_num_batched_tokens": 64, "overflow": "chunk"}
    with (
        LLM(str(folders[0]), served_model_name="one", **options) as one,
        LLM(str(folders[1]), served_model_name="two", **options) as two,
        TestClient(create_app([one.engine, two.engine])) as http,
    ):
        yield http


def test_engines_tell_of_their_phases_and_batches(two_engines: TestClient) -> None:
    http = two_engines
    assert value(scraped(http), "poolhouse_batch_tokens_count", model="one") == 0
    tokens = 0.0
    for _ in range(3):
        reply = http.post("/v1/embeddings", json={"input": ["the moon"] * 20, "model": "one"})
        tokens += reply.json()["usage"]["prompt_tokens"]
    scrape = scraped(http)
    # The last batch is told of after its answers.
    for _ in range(200):
        if value(scrape, "poolhouse_batch_sequences_sum", model="one") == 60:
            break
        time.sleep(0.01)
        scrape = scraped(http)
    batches = value(scrape, "poolhouse_batch_sequences_count", model="one") or 0
    assert batches >= 3
    assert value(scrape, "poolhouse_batch_sequences_sum", model="one") == 60
    assert value(scrape, "poolhouse_batch_tokens_sum", model="one") == tokens
    assert value(scrape, "poolhouse_batch_fill_sum", model="one") == pytest.approx(tokens / 64)
    assert value(scrape, "poolhouse_tokenize_seconds_count", model="one") == 3
    assert (value(scrape, "poolhouse_queue_seconds_count", model="one") or 0) >= batches
    for phase in ("tokenize", "queue", "forward", "pooling"):
        assert 0 < (value(scrape, f"poolhouse_{phase}_seconds_sum", model="one") or 0) < 60
    for phase in ("tokenize", "queue", "forward", "pooling"):
        assert value(scrape, f"poolhouse_{phase}_seconds_count", model="two") == 0


def test_vllms_names_say_what_ours_say() -> None:
    engine = FakeEngine("fake")
    engine.describe(adapters=("law",))
    with TestClient(create_app([engine])) as http:
        http.post("/v1/embeddings", json={"input": ["one two", "three"]})
        http.post("/pooling", json={"input": "four", "model": "law"})
        http.post("/pooling", json={"input": "four", "model": "none"})
        scrape = scraped(http)
    model = {"model_name": "fake", "engine": "0"}
    assert value(scrape, "poolhouse_prompts_total", route="/pooling", model="law", task="embed") == 1
    assert value(scrape, "vllm:prompt_tokens_total", **model) == 4
    assert value(scrape, "vllm:request_success_total", **model, finished_reason="stop") == 3
    latency = "vllm:e2e_request_latency_seconds"
    assert value(scrape, f"{latency}_count", **model) == value(scrape, f"{latency}_bucket", **model, le="+Inf") == 2
    ours = [value(scrape, "poolhouse_request_seconds_sum", route="/v1/embeddings", model="fake")]
    ours += [value(scrape, "poolhouse_request_seconds_sum", route="/pooling", model="law")]
    assert value(scrape, f"{latency}_sum", **model) == pytest.approx(sum(filter(None, ours)))
    buckets = [(dict(labels)["le"], count) for (name, labels), count in scrape.items() if name == f"{latency}_bucket"]
    counts = [count for _, count in sorted(buckets, key=lambda bucket: float(bucket[0]))]
    assert counts == sorted(counts)
    names = {(dict(labels)["model_name"]) for (name, labels), _ in scrape.items() if name.startswith("vllm:")}
    assert names == {"fake"}


def test_what_runs_and_what_waits_are_told_apart_as_vllm_does() -> None:
    engine = FakeEngine("fake", delay_seconds=0.3)
    engine.describe(adapters=("law",))
    model = {"model_name": "fake", "engine": "0"}
    with TestClient(create_app([engine])) as http:
        bodies = [{"input": ["a", "b"]}, {"input": "c", "model": "law"}]
        asking = [threading.Thread(target=http.post, args=("/pooling",), kwargs={"json": body}) for body in bodies]
        for thread in asking:
            thread.start()
        seen = set()
        while any(thread.is_alive() for thread in asking):
            scrape = scraped(http)
            seen.add(tuple(value(scrape, f"vllm:num_requests_{what}", **model) for what in ("running", "waiting")))
        for thread in asking:
            thread.join()
        scrape = scraped(http)
    assert (1.0, 2.0) in seen
    assert all((running or 0) <= 1 for running, _ in seen)
    assert value(scrape, "vllm:num_requests_waiting", **model) == 0


def test_an_engine_says_what_runs_on_its_device(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "bert, wordpiece")
    with LLM(str(tmp_path), max_num_batched_tokens=64, lanes=1) as llm:
        backbone, seen = llm.engine.model.backbone, []

        def watched(batch: Any) -> Any:
            seen.append((llm.engine.running, len(batch.segments)))
            return backbone(batch)

        object.__setattr__(llm.engine.model, "backbone", watched)
        llm.embed(["the moon"] * 40)
        for _ in range(200):
            if llm.engine.running == 0:
                break
            time.sleep(0.01)
        assert llm.engine.running == 0
    assert sum(running for running, _ in seen) == 40
    assert all(running == sequences for running, sequences in seen)
