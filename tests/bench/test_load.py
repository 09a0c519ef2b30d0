"""A load on servers that answer, fail, hang and close."""

from __future__ import annotations

import socket
from dataclasses import replace

import numpy as np
import orjson
import pytest

from poolhouse.bench.load import Failures, Latency, Load, LoadReport, Outcome, Run, _dues, run_load
from poolhouse.data import short_texts
from poolhouse.errors import EngineError
from poolhouse.testing import FakeEngine
from tests.bench.servers import ScriptedServer, reply, serving

EMBEDDING = b'{"data":[{"embedding":[0.5]}],"usage":{"total_tokens":3}}'


def texts_of(engine: FakeEngine) -> list[str | None]:
    return [request.prompt.text for request in engine.received]


@pytest.mark.parametrize(
    ("backend", "encoding"),
    [("openai-embeddings", "float"), ("openai-embeddings", "base64"), ("vllm-pooling", "float")],
)
def test_every_request_is_sent_once_and_answered(backend: str, encoding: str) -> None:
    engine = FakeEngine("fake")
    texts = [f"text {number}" for number in range(66)]
    with serving(engine) as url:
        load = Load(url, backend, encoding=encoding, requests=20, warmup=2, items_per_request=3, concurrency=4)
        report = LoadReport.of(load, run_load(load, texts))
    assert sorted(map(str, texts_of(engine))) == sorted(texts)
    assert set(texts_of(engine)[:6]) == set(texts[:6]), "the warm-up comes first"
    assert (report.successes, report.failures) == (20, ())
    assert report.tokens == 2 * 60
    assert report.items_per_second == pytest.approx(3 * report.requests_per_second)
    assert report.bytes_received > 20 * 3 * 8


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_are_in_flight_than_asked_for(concurrency: int) -> None:
    with ScriptedServer([(reply(EMBEDDING), "keep")]) as server:
        load = Load(server.url, requests=30, warmup=3, concurrency=concurrency)
        assert LoadReport.of(load, run_load(load, ["x"])).successes == 30
        assert server.connections == concurrency


def test_at_a_rate_requests_come_at_random_times_that_the_seed_repeats() -> None:
    load = Load(requests_per_second=200, seed=3)
    dues = list(_dues(load, 4000))
    assert dues == list(_dues(load, 4000))
    assert dues != list(_dues(replace(load, seed=4), 4000))
    gaps = np.diff(dues)
    # Gaps of a Poisson process: the spread equals the mean; 4,000 of them are within 5 %.
    assert np.mean(gaps) == pytest.approx(0.005, rel=0.05)
    assert np.std(gaps) == pytest.approx(0.005, rel=0.05)
    assert list(_dues(Load(), 3)) == [0, 0, 0]


def test_no_request_is_sent_before_it_is_due() -> None:
    with ScriptedServer([(reply(EMBEDDING), "keep")]) as server:
        load = Load(server.url, requests=40, warmup=3, requests_per_second=100)
        run = run_load(load, ["x"])
    assert len(run.outcomes) == 40
    assert run.seconds > list(_dues(load, 40))[-1] > 0.2


def test_a_server_slower_than_the_rate_does_not_set_the_pace() -> None:
    engine = FakeEngine(delay_seconds=0.02)
    with serving(engine) as url:
        load = Load(url, requests=20, warmup=0, concurrency=1, requests_per_second=1000)
        run = run_load(load, ["x"])
    seconds = sorted(outcome.seconds for outcome in run.outcomes)
    # The last request was due at once and waited for the 19 before it.
    assert seconds[-1] > 19 * 0.02 - 0.1
    assert seconds[-1] > 4 * seconds[0]


@pytest.mark.parametrize(
    ("sent", "then", "kind", "words"),
    [
        (reply(b'{"error":{"message":"busy"}}', 503), "keep", "HTTP 503", "busy"),
        (reply(b'{"error":"too long"}', 422), "close", "HTTP 422", "too long"),
        (b"", "hang", "timeout", "within 0.2 s"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", "hang", "timeout", "within 0.2 s"),
        (b"", "close", "broken reply", "without a reply"),
        (b"nonsense\r\n\r\n", "keep", "broken reply", "no HTTP/1.1"),
        (reply(b'{"data":[]}'), "keep", "wrong reply", "0 answers to 1 items"),
        (reply(b"<html>"), "keep", "wrong reply", "no JSON"),
    ],
)
def test_failures_are_counted_by_kind_with_what_was_said(sent: bytes, then: str, kind: str, words: str) -> None:
    with ScriptedServer([(reply(EMBEDDING), "keep"), (sent, then)]) as server:
        load = Load(server.url, requests=4, warmup=0, concurrency=1, seconds_to_wait=0.2)
        report = LoadReport.of(load, run_load(load, ["x"]))
    assert report.successes == 1
    (failed,) = report.failures
    assert (failed.kind, failed.count) == (kind, 3)
    assert words in failed.message


def test_a_failing_engine_and_a_closed_port_are_told_apart() -> None:
    with serving(FakeEngine(failure=EngineError("broken kernel"))) as url:
        load = Load(url, requests=5, warmup=0)
        assert LoadReport.of(load, run_load(load, ["x"])).failures == (Failures("HTTP 500", 5, "broken kernel"),)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    load = Load(f"http://127.0.0.1:{port}", requests=5, warmup=3)
    report = LoadReport.of(load, run_load(load, ["x"]))
    assert [(failed.kind, failed.count) for failed in report.failures] == [("no connection", 5)]
    assert report.latency_ms is None


def test_the_server_is_told_the_key_and_the_path() -> None:
    with ScriptedServer([(reply(EMBEDDING), "keep")]) as server:
        load = Load(server.url + "/", endpoint="/other", api_key="secret", requests=1, warmup=0)
        run_load(load, ["x"])
    assert server.requests[0].startswith(b"POST /other HTTP/1.1\r\n")
    assert b"\r\nAuthorization: Bearer secret\r\n" in server.requests[0]


def test_a_report_is_the_arithmetic_of_its_outcomes() -> None:
    answered = [Outcome(0.001 * number, size=10, tokens=2) for number in range(1, 102)]
    failed = [Outcome(9.0, 5, failure=("HTTP 503", "first")), Outcome(9.0, 5, failure=("HTTP 503", "second"))]
    late = Outcome(9.0, failure=("timeout", "none"))
    load = Load("http://host", requests=104, items_per_request=4)
    report = LoadReport.of(load, Run([*answered, late, *failed], 2.0, 0.5), (50, 99, 99.9))
    assert (report.successes, report.requests_per_second, report.items_per_second) == (101, 50.5, 202.0)
    assert (report.tokens, report.tokens_per_second, report.bytes_received) == (202, 101.0, 1020)
    assert report.failures == (Failures("HTTP 503", 2, "first"), Failures("timeout", 1, "none"))
    assert report.client_load == 0.25
    assert report.latency_ms is not None
    assert report.latency_ms.mean == pytest.approx(51)
    assert report.latency_ms.max == 101
    assert [value for _, value in report.latency_ms.percentiles] == pytest.approx([51, 100, 100.9])
    assert orjson.loads(report.as_json())["latency_ms"] == pytest.approx(
        {"mean": 51, "p50": 51, "p99": 100, "p99.9": 100.9, "max": 101}
    )
    assert Latency(1.0, ((50, 1.0),), 1.0) == LoadReport.of(load, Run([Outcome(0.001)], 1, 1), [50]).latency_ms


def test_short_texts_have_the_words_that_were_asked_for() -> None:
    texts = short_texts(500, 8, 16)
    assert {len(text.split(" ")) for text in texts} == set(range(8, 17))
    assert len(set(texts)) > 490
    assert texts == short_texts(500, 8, 16)
    assert texts != short_texts(500, 8, 16, seed=1)
    assert len(short_texts(1, 5000, 5000)[0].split(" ")) == 5000
