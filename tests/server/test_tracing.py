"""Traces: spans of a request by OpenTelemetry, within the caller's trace, without a word of what users wrote."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.testclient import TestClient

from poolhouse import LLM
from poolhouse.engine.interface import PoolingEngine
from poolhouse.errors import ConfigError
from poolhouse.server.app import create_app
from poolhouse.server.telemetry import tracing
from poolhouse.settings import ServerSettings
from poolhouse.testing import FakeEngine
from tests.checkpoints import save_checkpoint
from tests.server.running import Running, free_port

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE, PARENT_SPAN = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331


class Traced:
    """An app whose spans are kept; `spans` ends it and gives them in order of their start."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engines: Sequence[PoolingEngine]) -> None:
        self.exported = InMemorySpanExporter()
        monkeypatch.setattr(tracing, "exporter", lambda _: self.exported)
        settings = ServerSettings(otlp_traces_endpoint="http://localhost:4318", max_body_bytes=2000)
        self.http = TestClient(create_app(engines, settings), raise_server_exceptions=False)
        self.http.__enter__()

    def spans(self) -> list[ReadableSpan]:
        self.http.__exit__()
        return sorted(self.exported.get_finished_spans(), key=lambda span: (span.start_time or 0, span.end_time or 0))


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine("fake", delay_seconds=0.05)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch, engine: FakeEngine) -> Traced:
    return Traced(monkeypatch, [engine])


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_a_request_has_a_span_and_its_steps_stand_within(traced: Traced) -> None:
    headers = {"traceparent": PARENT, "x-request-id": "order-66"}
    traced.http.post("/v1/embeddings", json={"input": ["a secret text", "b"]}, headers=headers)
    request, *steps = traced.spans()
    assert (request.name, request.kind) == ("POST /v1/embeddings", SpanKind.SERVER)
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.route": "/v1/embeddings",
        "http.response.status_code": 200,
        "gen_ai.response.model": "fake",
        "gen_ai.usage.input_tokens": 4,
        "poolhouse.items": 2,
        "poolhouse.request_id": "order-66",
    }
    assert request.status.status_code is StatusCode.UNSET
    assert request.context.trace_id == TRACE
    assert request.parent is not None
    assert request.parent.span_id == PARENT_SPAN
    assert [step.name for step in steps] == ["tokenize", "queue", "run", "serialize"]
    for step in steps:
        assert step.parent is not None
        assert step.parent.span_id == request.context.span_id
        assert (request.start_time or 0) <= (step.start_time or 0) <= (step.end_time or 0) <= (request.end_time or 0)
    assert seconds(steps[2]) == pytest.approx(0.05, abs=1e-6)
    resource = request.resource.attributes
    assert resource["service.name"] == "poolhouse"


def test_steps_follow_each_other_through_a_real_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "bert, wordpiece")
    with LLM(str(tmp_path)) as llm:
        traced = Traced(monkeypatch, [llm.engine])
        traced.http.post("/v1/embeddings", json={"input": ["the moon"] * 20})
        request, *steps = traced.spans()
    assert [step.name for step in steps] == ["tokenize", "queue", "run", "serialize"]
    assert all(seconds(step) > 0 for step in steps)
    for before, after in pairwise(steps):
        assert (before.end_time or 0) <= (after.start_time or 0)
    assert sum(map(seconds, steps)) <= seconds(request)


def test_cut_prompts_are_in_the_span(traced: Traced) -> None:
    traced.http.post("/pooling", json={"input": "one two three", "truncate_prompt_tokens": 2})
    assert attributes(traced.spans()[0])["poolhouse.truncated"] == 1


@pytest.mark.parametrize(
    ("method", "path", "body", "name", "route", "status", "kind"),
    [
        ("POST", "/v1/embeddings", {"input": "x", "dimensions": "many"}, "POST /v1/embeddings", "/v1/embeddings", 400, "Bad Request"),
        ("POST", "/v1/embeddings", {"input": "x" * 3000}, "POST /v1/embeddings", "/v1/embeddings", 413, "Request Entity Too Large"),
        ("GET", "/secret/path?q=secret", None, "GET", None, 404, "Not Found"),
        ("SECRET", "/v1/embeddings", None, "HTTP /v1/embeddings", "/v1/embeddings", 405, "Method Not Allowed"),
    ],
)  # fmt: skip
def test_what_the_client_did_wrong_is_no_error_of_ours(
    traced: Traced, method: str, path: str, body: Any, name: str, route: str | None, status: int, kind: str | None
) -> None:
    assert traced.http.request(method, path, json=body).status_code == status
    (span,) = traced.spans()
    said = attributes(span)
    assert (span.name, said.get("http.route"), said["http.response.status_code"]) == (name, route, status)
    assert said.get("error.type") == kind
    assert span.status.status_code is StatusCode.UNSET
    assert "secret" not in span.to_json().lower()


def test_a_failure_of_the_engine_is_an_error(engine: FakeEngine, traced: Traced) -> None:
    engine.failure = ZeroDivisionError("a secret")
    traced.http.post("/v1/embeddings", json={"input": "a secret text"})
    (span,) = traced.spans()
    assert span.status.status_code is StatusCode.ERROR
    assert attributes(span)["error.type"] == "InternalServerError"
    assert attributes(span)["gen_ai.response.model"] == "fake"
    assert "secret" not in span.to_json()


def test_probes_and_scrapes_are_not_traced(traced: Traced) -> None:
    for path in ("/health", "/health/ready", "/ping", "/metrics"):
        assert traced.http.get(path).status_code == 200
    traced.http.get("/version")
    assert [span.name for span in traced.spans()] == ["GET /version"]


@pytest.mark.parametrize("given", ["", "nonsense", "00-0-0-01", "é"])
def test_a_broken_parent_begins_a_trace_of_its_own(traced: Traced, given: str) -> None:
    headers = [(b"traceparent", given.encode())]
    assert traced.http.post("/v1/embeddings", json={"input": "x"}, headers=headers).status_code == 200
    assert traced.spans()[0].parent is None


def test_what_the_caller_does_not_sample_is_not_sent(traced: Traced) -> None:
    headers = {"traceparent": PARENT.removesuffix("01") + "00"}
    assert traced.http.post("/v1/embeddings", json={"input": "x"}, headers=headers).status_code == 200
    assert traced.spans() == []


class Receiver:
    """An OTLP receiver: what comes to its address, read as spans."""

    def __init__(self) -> None:
        received: list[tuple[str, ExportTraceServiceRequest]] = []

        class Taking(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    raw = gzip.decompress(raw)
                received.append((self.path, ExportTraceServiceRequest.FromString(raw)))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.received = received
        self.server = HTTPServer(("127.0.0.1", 0), Taking)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


def test_spans_arrive_at_a_receiver_and_a_stop_sends_the_last(receiver: Receiver) -> None:
    server = Running(otlp_traces_endpoint=receiver.url, log_format="json").ready()
    headers = {"traceparent": PARENT}
    for _ in range(3):
        httpx.post(f"{server.url}/v1/embeddings", json={"input": "a secret"}, headers=headers, trust_env=False)
    status, log = server.stop()
    assert status == 0, log
    sent = [
        span for _, batch in receiver.received for r in batch.resource_spans for s in r.scope_spans for span in s.spans
    ]
    assert {path for path, _ in receiver.received} == {"/v1/traces"}
    assert sorted(span.name for span in sent) == sorted(
        ["POST /v1/embeddings", "tokenize", "queue", "run", "serialize"] * 3
    )
    assert {span.trace_id.hex() for span in sent} == {f"{TRACE:032x}"}
    assert all(abs(span.start_time_unix_nano / 1e9 - time.time()) < 600 for span in sent)
    assert not any(b"secret" in batch.SerializeToString() for _, batch in receiver.received)
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line.get("trace_id") for line in lines if line["logger"] == "poolhouse.access"] == [f"{TRACE:032x}"] * 3


def test_a_receiver_that_is_gone_disturbs_neither_answers_nor_the_stop() -> None:
    server = Running(otlp_traces_endpoint=f"http://127.0.0.1:{free_port()}", log_format="json").ready()
    for _ in range(20):
        reply = httpx.post(f"{server.url}/v1/embeddings", json={"input": "x"}, trust_env=False)
        assert reply.status_code == 200
    started = time.monotonic()
    status, log = server.stop()
    assert status == 0, log
    assert time.monotonic() - started < 10
    lines = [json.loads(line) for line in log.splitlines()]
    assert any(line["logger"].startswith("opentelemetry") for line in lines)


def test_an_address_with_a_path_is_taken_as_it_is(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ServerSettings(otlp_traces_endpoint=f"{receiver.url}/collect/here")
    with TestClient(create_app([FakeEngine()], settings)) as http:
        http.get("/version")
    assert {path for path, _ in receiver.received} == {"/collect/here"}


@pytest.mark.parametrize("endpoint", ["grpc://localhost:4317", "localhost:4318", "http://", ""])
def test_an_address_that_is_none_is_refused_before_models_load(endpoint: str) -> None:
    server = Running("raise AssertionError('loaded')", otlp_traces_endpoint=endpoint)
    status, log = server.ended()
    assert status == 1
    assert "poolhouse: --otlp-traces-endpoint takes OTLP over HTTP, such as http://localhost:4318/v1/traces" in log
    assert "Traceback" not in log


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(ConfigError, match=r"pip install 'poolhouse\[tracing\]'"):
        tracing.check(ServerSettings(otlp_traces_endpoint="http://localhost:4318"))


def test_without_an_address_nothing_that_sends_is_imported() -> None:
    code = """
import sys
from starlette.testclient import TestClient
from poolhouse.server.process.run import create_app
from poolhouse.testing import FakeEngine
with TestClient(create_app([FakeEngine()])) as http:
    assert http.post("/v1/embeddings", json={"input": "x"}).status_code == 200
print([name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
