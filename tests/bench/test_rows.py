"""The rows of `poolhouse bench`, with sides that have no model: who takes part, who leaves, and what is reported."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from poolhouse.bench import measure, servers
from poolhouse.bench.load import Load
from poolhouse.bench.measure import Bench, Crew, recorded
from poolhouse.bench.report import Row
from poolhouse.bench.rows import gpu, latency, memory, rerank, serve, start, throughput
from poolhouse.bench.servers import BusyLoops, ServerProcess, Service
from poolhouse.bench.shapes import SHAPES, Written
from poolhouse.bench.sides import SideProcess, find_python, installed, pinned
from poolhouse.errors import ConfigError, EngineError
from poolhouse.testing import FakeEngine
from tests.bench.servers import serving

FAKE = Path(__file__).with_name("fake_side.py")
ROWS = (latency, memory, rerank, serve, start, throughput, gpu)


def fake(**told: object) -> list[str]:
    return [sys.executable, str(FAKE), json.dumps(told)]


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, dict[str, object]]:
    """What each side is told, by its library; ours is "". Its process runs `fake_side`."""
    told: dict[str, dict[str, object]] = {}

    def our_side(model: str, **_: object) -> list[str]:
        return fake(**told.get("", {}))

    def peer_side(python: Path, library: str, model: str, **options: object) -> list[str]:
        return fake(**told.get(library, {}))

    options = {"hidden_size": 8, "intermediate_size": 16}
    written = Written("minilm", tmp_path, tmp_path, 1000, 2, options)
    for module in (measure, *ROWS):
        for name, stand_in in (("our_side", our_side), ("peer_side", peer_side)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)
        if hasattr(module, "checkpoint"):
            monkeypatch.setattr(module, "checkpoint", lambda shape, *_: replaced(written, shape))
    return told


def replaced(written: Written, shape: str) -> Written:
    return replace(written, name=shape, kind=SHAPES[shape].kind)


def bench(*libraries: str, **options: Any) -> Bench:
    made = Bench(**{"rounds": 2, "texts": 8, "types": ("float32",), **options})
    made.__dict__["libraries"] = {name: (Path("python"), "1.0") for name in libraries}
    return made


@pytest.fixture
def no_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that answer at once, in 3 ms."""

    class Answering:
        start_seconds = 2.0

        def __init__(self, service: Service, cores: object = None) -> None:
            if "broken" in service.command:
                raise EngineError(f"{service.name} did not start: no words")

        def do(self, command: str, **_: object) -> dict[str, object]:
            return {"ms": [3.0] * 10}

        def close(self) -> None:
            pass

    for module in (latency, start):
        monkeypatch.setattr(module, "ServerProcess", Answering)


def names(row: Row) -> list[str]:
    return [side.name for side in row.sides]


def test_throughput_has_every_peer_of_a_type_at_its_best_setting(sides: dict[str, dict[str, object]]) -> None:
    sides |= {"": {"seconds": 0.5}, "OpenVINO": {"seconds": 0.75}}
    own = bench("sentence-transformers", "ONNX Runtime", "OpenVINO", types=("float32", "bfloat16"))
    report = throughput.throughput(own, ["minilm"], "poolhouse bench throughput")
    first, second = report.rows
    assert names(first) == [
        "Poolhouse", "sentence-transformers 1.0", "ONNX Runtime 1.0", "ONNX Runtime O3 1.0", "OpenVINO 1.0"
    ]  # fmt: skip
    assert names(second) == ["Poolhouse", "sentence-transformers 1.0", "OpenVINO 1.0"]
    assert first.ours.values == (16.0, 16.0)
    assert {side.setting for side in first.sides[1:]} == {"batch size 8"}
    assert first.best is first.sides[-1]
    assert (first.ratio, first.lowest_ratio) == (1.5, 1.5)
    # 100 GFLOP/s over 2 operations x 1,000 weights x 10 tokens.
    assert first.ceiling == pytest.approx(100e9 / (2 * 1000 * 10))
    assert (first.ours.lowest, first.ours.mean) == (pytest.approx(1.0), pytest.approx(1.0))
    assert report.ceilings is not None
    assert report.ceilings.products == {"float32": 100.0, "bfloat16": 100.0}


def test_who_computes_something_else_does_not_win(sides: dict[str, dict[str, object]]) -> None:
    sides |= {"": {"seconds": 1.0}, "OpenVINO": {"seconds": 0.1, "turn": 30.0}, "ONNX Runtime": {"seconds": 2.0}}
    (row,) = throughput.throughput(bench("OpenVINO", "ONNX Runtime"), ["minilm"], "").rows
    assert row.best is not None
    assert row.best.name.startswith("ONNX Runtime")
    assert row.verdict is not None
    assert row.verdict.met is True
    wrong = {side.name: side.lowest for side in row.sides}
    assert wrong["OpenVINO 1.0"] == pytest.approx(0.866, abs=1e-3)


@pytest.mark.parametrize("when", ["start", "settings", "vectors", "throughput"])
def test_a_peer_that_dies_is_noted_and_the_others_go_on(when: str, sides: dict[str, dict[str, object]]) -> None:
    sides["OpenVINO"] = {"dies": when}
    (row,) = throughput.throughput(bench("OpenVINO", "ONNX Runtime"), ["minilm"], "").rows
    assert names(row) == ["Poolhouse", "ONNX Runtime 1.0", "ONNX Runtime O3 1.0"]
    (note,) = [note for note in row.notes if "OpenVINO" in note]
    status, said = ("3", "no such library") if when == "start" else ("4", "out of luck")
    assert note == f"OpenVINO 1.0 is left out: OpenVINO 1.0 ended with status {status}: {said}"


def test_a_peer_that_fails_says_why(sides: dict[str, dict[str, object]]) -> None:
    sides["OpenVINO"] = {"fails": "throughput"}
    (row,) = throughput.throughput(bench("OpenVINO"), ["minilm"], "").rows
    assert names(row) == ["Poolhouse"]
    assert "OpenVINO 1.0 is left out: OpenVINO 1.0: there is no such kernel" in row.notes
    assert row.verdict is not None
    assert (row.verdict.met, row.verdict.measured) == (None, "nothing to compare with")


@pytest.mark.parametrize("when", ["start", "count", "throughput"])
def test_our_own_death_is_an_error(when: str, sides: dict[str, dict[str, object]]) -> None:
    sides[""] = {"dies": when}
    with pytest.raises(EngineError, match="ended with status"):
        throughput.throughput(bench(), ["minilm"], "")


def test_missing_peers_and_refused_types_are_named(
    sides: dict[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bench, "refused", lambda _: {"int8": "int8 is left out: not here"})
    own = bench("OpenVINO", types=("float32", "int8"))
    report = throughput.throughput(own, ["minilm"], "")
    assert [row.dtype for row in report.rows] == ["float32"]
    assert report.notes == (
        "Not importable, so not compared: sentence-transformers, ONNX Runtime.",
        "int8 is left out: not here",
    )


def test_a_type_that_our_side_cannot_load_is_left_out(
    sides: dict[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def our_side(model: str, dtype: str = "", **_: object) -> list[str]:
        return fake(dies="start") if dtype == "bfloat16" else fake()

    monkeypatch.setattr(measure, "our_side", our_side)
    report = throughput.throughput(bench(types=("float32", "bfloat16")), ["minilm"], "")
    assert [row.dtype for row in report.rows] == ["float32"]
    assert "minilm in bfloat16 is left out: Poolhouse ended with status 3: no such library" in report.notes


@pytest.mark.usefixtures("no_servers")
def test_latency_has_rows_for_both_queries_both_doors_and_what_is_outside(sides: dict[str, dict[str, object]]) -> None:
    sides |= {"": {"seconds": 2.0}, "ONNX Runtime": {"seconds": 2.5}}
    report = latency.latency(bench("ONNX Runtime"), ["minilm"], ["quiet"], "")
    works = [row.work for row in report.rows]
    assert works == [
        "one query of 7 words, p50", "one query of 7 words, HTTP, p50",
        "one query of 7 words, p95", "one query of 7 words, HTTP, p95",
        "one query of 32 tokens, p50", "one query of 32 tokens, HTTP, p50",
        "one query of 32 tokens, p95", "one query of 32 tokens, HTTP, p95",
        "one query of 7 words, time outside the model, p50", "one query of 32 tokens, time outside the model, p50",
    ]  # fmt: skip
    ours, http = report.rows[:2]
    assert (ours.ours.name, ours.ours.median, ours.ratio) == ("Poolhouse", 2.0, 1.25)
    assert (http.ours.name, http.ours.median, http.ratio) == ("Poolhouse over HTTP", 3.0, pytest.approx(2.5 / 3))
    # 1,000 weights of 4 bytes at 100 GB/s.
    assert ours.ceiling == pytest.approx(1000 * 4 / 1e6 / 100)
    outside = report.rows[-1].verdict
    assert outside is not None
    assert (outside.goal, outside.met) == ("at most 0.3 ms", False)


@pytest.mark.usefixtures("no_servers")
def test_busy_loops_run_while_sides_are_measured(
    sides: dict[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    begin = BusyLoops.__enter__

    def noted(loops: BusyLoops) -> BusyLoops:
        counts.append(loops.count)
        return begin(loops)

    monkeypatch.setattr(BusyLoops, "__enter__", noted)
    monkeypatch.setattr(latency, "cores", lambda: [0])
    report = latency.latency(bench(rounds=1), ["minilm"], ["busy", "half"], "")
    assert counts == [1]
    assert {row.goal.least for row in report.rows if row.goal} == {0.8}
    assert any("as many busy loops as cores" in row.work for row in report.rows)
    assert any("half the cores" in row.work for row in report.rows)


def test_busy_loops_end_with_the_block() -> None:
    with BusyLoops(2) as loops:
        processes = list(loops._processes)
        assert [process.poll() for process in processes] == [None, None]
    assert all(process.returncode for process in processes)


def test_the_long_query_has_32_tokens() -> None:
    from poolhouse.bench.rows.latency import texts_of_queries
    from tests.bench.tiny import tokens_of

    texts = texts_of_queries()
    assert len(texts["7 words"].split()) == 7
    assert tokens_of(texts["32 tokens"]) == 32


@pytest.mark.usefixtures("no_servers")
def test_start_compares_with_an_earlier_version(sides: dict[str, dict[str, object]]) -> None:
    report = start.start(bench("sentence-transformers"), ["minilm"], ["earlier"], "")
    library, server = report.rows
    assert names(library) == ["Poolhouse", "sentence-transformers 1.0"]
    assert names(server) == ["Poolhouse", "earlier Poolhouse"]
    assert server.verdict is not None
    assert (server.verdict.goal, server.ratio, server.verdict.met) == ("2 times earlier Poolhouse", 1.0, False)
    (_, alone) = start.start(bench(), ["minilm"], [], "").rows
    assert alone.verdict is not None
    assert alone.verdict.met is None
    broken = start.start(bench(), ["minilm"], ["broken"], "").rows[1]
    assert broken.notes == ("earlier Poolhouse is left out: earlier Poolhouse did not start: no words",)


def test_memory_tells_peak_and_growth(sides: dict[str, dict[str, object]]) -> None:
    report = memory.memory(bench(rounds=1), ["minilm"], [2048, 4096], "")
    assert [row.ours.median for row in report.rows] == [50.0, 2.0, 50.0, 2.0]
    growth = report.rows[1].verdict
    assert growth is not None
    assert growth.met is True
    assert "packs of 2048 tokens" in report.rows[0].work


@pytest.mark.parametrize(
    ("kind", "rivals"),
    [
        ("cross-encoder", ["CrossEncoder 1.0"]),
        ("colbert", ["MultiVectorEncoder 1.0", "PyLate 1.0"]),
        ("causal", ["the card's code 1.0"]),
    ],
)
def test_rerank_has_the_peers_of_a_kind(kind: str, rivals: list[str], sides: dict[str, dict[str, object]]) -> None:
    sides |= {"": {"seconds": 0.5}}
    report = rerank.rerank(bench("sentence-transformers", "PyLate"), [kind], None, "")
    assert len(report.rows) == (3 if kind == "causal" else 1)
    row = report.rows[0]
    assert [name for name in names(row) if "Poolhouse" not in name] == rivals
    assert {side.setting for side in row.sides[1:] if "Poolhouse" not in side.name} == {"batch size 8"}
    assert row.ratios(row.sides[-1]) == [2.0, 2.0]
    assert row.ours.mean == pytest.approx(1.0)


def test_serve_is_held_against_the_offline_engine(
    sides: dict[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(FakeEngine("measured", dimensions=(4,))) as url:

        class Running:
            def __init__(self, service: Service) -> None:
                self.url = url

            def close(self) -> None:
                pass

        monkeypatch.setattr(serve, "ServerProcess", Running)
        load = Load(requests=20, concurrency=2, warmup=2)
        report = serve.serve(bench(), "minilm", load, ["a text"] * 22, "")
    rate, wait, longest = report.rows
    assert longest.ours.median >= wait.ours.median
    assert names(rate) == ["Poolhouse", "Poolhouse offline"]
    assert rate.sides[1].values == (20.0, 20.0)
    assert rate.verdict is not None
    assert rate.verdict.goal == "0.85 times Poolhouse offline"
    assert (wait.unit, names(wait)) == ("ms", ["Poolhouse"])


def test_a_gpu_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="There is no CUDA device"):
        gpu.gpu(bench(), ["minilm"], "")


def test_gpu_rows_for_each_length(sides: dict[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "cuda_device", lambda: "a card")
    sides |= {"": {"seconds": 1.0}, "sentence-transformers": {"seconds": 1.5}}
    report = gpu.gpu(bench("sentence-transformers"), ["minilm"], "")
    assert [row.work for row in report.rows] == [
        "16384 texts of 32 tokens", "4096 texts of 128 tokens", "1024 texts of 512 tokens", "256 texts of 2048 tokens",
        "8 ragged texts",
    ]  # fmt: skip
    by_length, ragged = report.rows[2], report.rows[-1]
    assert by_length.ours.median == 2**19
    assert (by_length.ratio, by_length.verdict and by_length.verdict.met) == (1.5, True)
    assert ragged.verdict is not None
    assert ragged.verdict.met is False
    assert by_length.ceiling == pytest.approx(100e9 / (2 * 1000))
    pairs = gpu.gpu(bench("sentence-transformers"), ["bge-reranker-v2-m3"], "")
    assert [row.work for row in pairs.rows] == ["8 ragged texts"]


def test_a_server_that_ends_says_its_last_words() -> None:
    service = Service("ours", (sys.executable, "-c", "import sys; sys.exit('no such model')"))
    with pytest.raises(EngineError, match="ours did not start: no such model"):
        ServerProcess(service)


def test_servers_of_peers_are_those_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: "/opt/text-embeddings-router")
    found = servers.peer_servers(bench("Infinity", "vLLM"), "model", "float32")
    assert [service.name for service in found] == ["Infinity 1.0", "vLLM 1.0", "TEI"]
    assert not servers.missing_servers(bench("Infinity", "vLLM"))
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert servers.peer_servers(bench(), "model", "float32") == []
    (line,) = servers.missing_servers(bench())
    assert line.startswith("Not installed, so not compared: Infinity, vLLM, TEI")


def test_a_pinned_side_has_these_cores_alone() -> None:
    code = "import json, os, sys; print(json.dumps({'ready': sorted(os.sched_getaffinity(0))}), flush=True)"
    process = SideProcess("one", [sys.executable, "-c", code], [0])
    process.close()
    assert process.ready == {"ready": [0]}
    assert pinned(None) == []


def test_sides_take_turns(sides: dict[str, dict[str, object]]) -> None:
    order: list[str] = []
    with Crew(lambda _: None) as crew:
        for name in ("Poolhouse", "other"):
            crew.add(name, lambda: SideProcess("one", fake()))
        crew.rounds(2, lambda side: order.append(side.name) or [1.0], "")  # type: ignore[func-returns-value]
    assert order == ["Poolhouse", "other"] * 2


def test_where_peers_are(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho noise\necho \'{"ONNX Runtime": "9.9", "vLLM": null}\'\n')
    python.chmod(0o755)
    assert find_python(tmp_path) == find_python(python) == python
    assert find_python(None) == Path(sys.executable)
    assert installed(python) == {"ONNX Runtime": "9.9", "vLLM": None}
    for wrong in (tmp_path / "nowhere", tmp_path / "bin"):
        with pytest.raises(ConfigError, match="it must be a Python, or the folder of an environment"):
            find_python(wrong)
    python.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(ConfigError, match="does not run as a Python"):
        installed(python)


def test_the_first_environment_that_has_a_library_counts(tmp_path: Path) -> None:
    for name, version in (("a", '"1"'), ("b", '"2"')):
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\necho \'{{"PyLate": {version}, "vLLM": {"null" if name == "a" else version}}}\'\n')
        path.chmod(0o755)
    libraries = Bench(peers=(tmp_path / "a", tmp_path / "b")).libraries
    assert libraries == {"PyLate": (tmp_path / "a", "1"), "vLLM": (tmp_path / "b", "2")}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (
            "bench throughput --peers /opt/x --json r.json --texts 8",
            "poolhouse bench throughput --peers PEERS --texts 8",
        ),
        ("bench gpu --peers=/opt/x --html=r.html --cache c", "poolhouse bench gpu --peers PEERS"),
        ("bench start --earlier /opt/old/poolhouse", "poolhouse bench start"),
    ],
)
def test_a_recorded_line_has_no_path_of_the_machine(given: str, kept: str) -> None:
    assert recorded(given.split()) == kept
