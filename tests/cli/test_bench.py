"""`poolhouse bench`, as a user types it: real sides on tiny models, without peers; and what cannot be measured."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from poolhouse.bench.rows import latency
from tests.bench.tiny import tiny
from tests.cli.in_process import Run, said

__all__ = ["said"]  # a fixture


@pytest.fixture
def nobody(tmp_path: Path) -> str:
    """A Python without peers."""
    path = tmp_path / "python"
    path.write_text("#!/bin/sh\necho '{}'\n")
    path.chmod(0o755)
    return str(path)


def _shortly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "_RUNS", 5)
    monkeypatch.setattr(latency, "_SECONDS", 0.05)


def test_throughput_to_json_html_and_documents(said: Run, nobody: str, tmp_path: Path) -> None:
    model = str(tiny("bge-base", tmp_path / "cache").folder)
    out, html = tmp_path / "out.json", tmp_path / "out.html"
    done = said(
        *("bench", "throughput", "--shape", model, "--dtype", "float32", "--texts", "4", "--rounds", "1"),
        *("--peers", nobody, "--cache", tmp_path / "cache", "--json", out, "--html", html),
    )
    assert done.status == 0, done.error
    printed = done.out.decode()
    for words in ("4 ragged texts of", "texts/s", "Products in float32 alone would allow", "nothing to compare with"):
        assert words in printed
    assert "Not importable, so not compared: sentence-transformers, ONNX Runtime, OpenVINO." in printed
    facts = json.loads(out.read_text())
    (row,) = facts["rows"]
    assert [side["name"] for side in row["sides"]] == ["Poolhouse"]
    assert row["sides"][0]["median"] > 0
    assert facts["ceilings"]["products"]["float32"] > 0
    assert nobody not in facts["command"]
    ElementTree.fromstring(html.read_text().removeprefix("<!DOCTYPE html>\n"))
    docs, readme = tmp_path / "performance.md", tmp_path / "README.md"
    readme.write_text("<!-- speed:begin --><!-- speed:end -->")
    done = said("bench", "report", out, out, "--docs", docs, "--readme", readme, "--html", html)
    assert done.status == 0, done.error
    assert len(list((tmp_path / "performance").glob("*.svg"))) == 1
    assert "all-MiniLM-L6-v2 on" in readme.read_text()


@pytest.mark.parametrize(
    ("line", "units"),
    [
        ("latency --under quiet", ["ms"] * 10),
        ("start", ["s", "s"]),
        ("memory --budgets 2048 --texts 8", ["MiB", "MiB"]),
    ],
)
def test_rows_of_a_tiny_model(
    line: str, units: list[str], said: Run, nobody: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _shortly(monkeypatch)
    model = str(tiny("bge-base", tmp_path / "cache").folder)
    peers = () if line.startswith("memory") else ("--peers", nobody)
    common = ("--shape", model, "--dtype", "float32", "--rounds", "1", "--json", tmp_path / "out.json")
    done = said("bench", *line.split(), *common, *peers)
    assert done.status == 0, done.error
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["unit"] for row in rows] == units
    for row in rows:
        assert {side["name"] for side in row["sides"]} <= {"Poolhouse", "Poolhouse over HTTP"}
        assert all(side["median"] > 0 or "growth" in row["work"] for side in row["sides"])


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("cross-encoder", "minilm-reranker"), ("colbert", "minilm-colbert"), ("causal", "qwen3-reranker-small")],
)
def test_reranking_with_a_tiny_model(kind: str, shape: str, said: Run, nobody: str, tmp_path: Path) -> None:
    written = tiny(shape, tmp_path / "cache")
    done = said(
        *("bench", "rerank", "--kind", kind, "--shape", written.folder, "--texts", "4", "--rounds", "1"),
        *("--peers", nobody, "--json", tmp_path / "out.json"),
    )
    assert done.status == 0, done.error
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["sides"][0]["name"] for row in rows] == ["Poolhouse"] * (3 if kind == "causal" else 1)


def test_serve_starts_our_server_and_loads_it(said: Run, nobody: str, tmp_path: Path) -> None:
    model = str(tiny("bge-base", tmp_path / "cache").folder)
    done = said(
        *("bench", "serve", "--start", "--shape", model, "--num-requests", "8", "--warmup", "2", "--concurrency", "2"),
        *("--rounds", "1", "--peers", nobody, "--json", tmp_path / "out.json"),
    )
    assert done.status == 0, done.error
    rate, wait, _ = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [side["name"] for side in rate["sides"]] == ["Poolhouse", "Poolhouse offline"]
    assert "Not installed, so not compared: Infinity, vLLM" in done.out.decode()
    assert wait["unit"] == "ms"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("throughput --shape bge-bas", "--shape is 'bge-bas'"),
        (
            "throughput --dtype float33",
            "--dtype is 'float33'; it must be some of float32, bfloat16, int8, with commas.",
        ),
        ("throughput --peers nowhere", "--peers is 'nowhere'; it must be a Python"),
        ("throughput --layers 7", "--layers is 7; minilm has 6."),
        ("throughput --shape . --layers 1", "--shape is '.'"),
        ("latency --under noisy", "--under is 'noisy'; it must be some of quiet, busy, half"),
        ("rerank --kind cross", "--kind is 'cross'"),
        ("rerank --shape minilm-reranker", "--shape is for one --kind."),
        ("rerank --kind colbert --shape minilm", "--shape is 'minilm'"),
        ("memory --budgets many", "--budgets is 'many'"),
        ("memory --budgets 0", "--budgets is '0'"),
        ("compare nowhere", "--shape is 'nowhere'"),
        ("serve --start --base-url http://127.0.0.1:1", "leave --base-url out"),
        ("serve --html x.html", "--peers and --html belong to --start"),
        ("report nothing.json", "nothing.json is no report"),
    ],
)
def test_what_cannot_be_measured_is_one_clear_line(
    line: str, words: str, said: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = said("bench", *line.split(), *([] if "report" in line else ["--json", "out.json"]))
    assert (done.status, words in done.error) == (2, True), done.error
    assert not Path("out.json").exists()


def test_sentence_transformers_may_be_in_our_own_environment(
    said: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("bge-base", tmp_path / "cache").folder
    options = ("--dtype", "float32", "--rounds", "1", "--texts", "4", "--json", tmp_path / "out.json")
    done = said("bench", "throughput", "--shape", model, *options)
    assert done.status == 0, done.error
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {side["name"].split()[0] for side in row["sides"]} == {"Poolhouse", "sentence-transformers"}
    assert "ours is better by" in done.out.decode()


def test_what_is_measured_without_a_name(
    said: Run, nobody: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _shortly(monkeypatch)
    model = tiny("bge-base", tmp_path / "cache").folder
    done = said("bench", model, "--rounds", "1", "--texts", "4", "--peers", nobody, "--json", tmp_path / "out.json")
    assert done.status == 0, done.error
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["command"] for row in rows] == ["throughput", *["latency"] * 10, *["start"] * 2]
    assert {row["dtype"] for row in rows} == {"float32"}


def test_a_gpu_row_needs_one(said: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = said("bench", "gpu")
    assert done.status == 1
    assert "There is no CUDA device" in done.error
