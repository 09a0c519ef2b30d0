"""`poolhouse bench serve`, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from poolhouse.cli.bench import name_comparison
from poolhouse.errors import EngineError
from poolhouse.testing import FakeEngine
from tests.bench.servers import serving


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "poolhouse.cli", "bench", "serve", *arguments],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "COLUMNS": "120"},
    )  # fmt: skip


def test_a_report_is_printed_and_written(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("one\n\ntwo words\n", encoding="utf-8")
    engine = FakeEngine("fake", dimensions=(4,))
    with serving(engine) as url:
        done = run(
            "--base-url", url, "--model", "fake", "--num-prompts", "20", "--max-concurrency", "2", "--warmup", "4",
            "--random-batch-size", "2", "--dataset-path", str(tmp_path / "texts.txt"), "--percentiles", "50,75",
            "--encoding-format", "base64", "--extra-body", '{"dimensions": 4}', "--json", str(tmp_path / "report.json"),
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in ("20 of 20", "requests/s", "items/s", "latency p75, ms", "bytes received", f"{url}/v1/embeddings"):
        assert words in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["successes"], report["failures"], report["requests"]) == (20, [], 20)
    assert (report["concurrency"], report["items_per_request"], report["request_rate"]) == (2, 2, None)
    assert list(report["latency_ms"]) == ["mean", "p50", "p75", "max"]
    assert report["latency_ms"]["p50"] <= report["latency_ms"]["p75"] <= report["latency_ms"]["max"]
    assert report["tokens"] == 20 * 3
    assert {request.prompt.text for request in engine.received} == {"one", "two words"}
    assert {request.params.dimensions for request in engine.received} == {4}
    assert len(engine.received) == 48


def test_when_every_request_fails_so_does_the_command() -> None:
    engine = FakeEngine(failure=EngineError("broken kernel"))
    with serving(engine) as url:
        done = run("--base-url", url, "--num-requests", "3", "--warmup", "1")
        assert done.returncode == 1
        assert "0 of 3" in done.stdout
        assert "3 failed, HTTP 500: broken kernel" in done.stdout
        engine.failure = None
        missing = run("--base-url", url, "--num-requests", "3", "--warmup", "0", "--endpoint", "no/such")
    assert (missing.returncode, "3 failed, HTTP 404: Not Found" in missing.stdout) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backend", "tgi"], "There is no backend 'tgi'; there are: openai-embeddings, vllm-pooling"),
        (["--base-url", "localhost:80"], "'localhost:80/v1/embeddings' is no URL"),
        (["--words", "many"], "--words is 'many'; it must be a number, a range such as 8-16, or ragged."),
        (["--words", "9-8"], "--words is '9-8'"),
        (["--words", "0"], "--words is '0'"),
        (["--request-rate", "0"], "--request-rate is 0; it must be more than 0, or inf."),
        (["--percentiles", "50,101"], "--percentiles is '50,101'"),
        (["--percentiles", "high"], "--percentiles is 'high'"),
        (["--extra-body", "{"], "--extra-body is not valid JSON"),
        (["--extra-body", "[]"], "--extra-body must be a JSON object"),
        (["--backend", "tei-embed", "--encoding-format", "base64"], "tei-embed has no base64"),
        (["--dataset", os.devnull], f"There is no text in {os.devnull}."),
    ],
)
def test_what_cannot_be_measured_is_one_clear_line(arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert words in done.stderr
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_the_client_draws_no_heavy_library() -> None:
    code = (
        "import sys; from poolhouse.cli.commands import commands\n"
        "try: commands()(['bench', 'serve', '--base-url', 'http://127.0.0.1:9', '--num-requests', '1'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'starlette', 'httpx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "1 failed, no connection" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ([], ["compare"]),
        (["path/to/model", "--texts", "8"], ["compare", "path/to/model", "--texts", "8"]),
        (["--texts", "8"], ["compare", "--texts", "8"]),
        (["compare", "--texts", "8"], ["compare", "--texts", "8"]),
        (["serve", "--seed", "1"], ["serve", "--seed", "1"]),
        (["gpu"], ["gpu"]),
        (["--help"], ["--help"]),
    ],
)
def test_bench_alone_is_the_comparison(given: list[str], named: list[str]) -> None:
    assert name_comparison(given) == named
