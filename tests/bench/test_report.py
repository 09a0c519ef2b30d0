"""Reports: what is computed of figures, JSON and back, the page, plots and documents."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from poolhouse.bench.documents import BEGIN, END, KEPT_BEGIN, KEPT_END, write_document, write_table
from poolhouse.bench.machine import Machine, this_machine
from poolhouse.bench.page import page, plot
from poolhouse.bench.report import Ceilings, Goal, Report, Row, SideFigures, cells, number, read_report, remarks
from poolhouse.errors import ConfigError
from tests.docs.pages import ROOT

MACHINE = Machine("A <CPU> & more", ("AVX2",), 2, 1.5, 24.0, None, "Linux x86_64", "3.11.7", "2.13.0", "0.1.0")
OURS = SideFigures("Poolhouse", (10.0, 12.0, 11.0), "", 1.0, 1.0)
SLOW = SideFigures("ONNX Runtime 1.32", (5.0, 4.0, 6.0), "batch size 8", 0.99999, 0.99999)
FAST = SideFigures("OpenVINO 2026", (20.0, 20.0, 20.0), "batch size 4", 0.9, 0.95)
ROW = Row(
    "throughput", "8 texts", "minilm (6 x 384)", "float32", "texts/s", (OURS, SLOW), True, Goal(least=1.6), 22.0, "Products"
)  # fmt: skip
QUERY = Row(
    "latency", "one query of 7 words, p50", "minilm (6 x 384)", "float32", "ms", (SLOW, OURS), False, Goal(least=1.0)
)
ALONE = Row(
    "memory", "peak", "minilm (6 x 384)", "float32", "MiB", (OURS,), False, Goal(None, most=5.0), notes=("a note",)
)
REPORT = Report(
    "poolhouse bench throughput", "2026-11-29", MACHINE, Ceilings({"float32": 100.0}, {"42": 9.5}), (ROW, QUERY, ALONE), ("no vLLM",)
)  # fmt: skip


def test_ratios_are_those_of_a_round() -> None:
    assert ROW.ratios(SLOW) == [2.0, 3.0, 11 / 6]
    assert (ROW.ratio, ROW.lowest_ratio) == (2.0, 11 / 6)
    assert ROW.share == pytest.approx(0.5)
    less = replace(QUERY, sides=(replace(SLOW, name="Poolhouse"), replace(OURS, name="vLLM 1")))
    assert less.ratios(less.sides[1]) == [2.0, 3.0, 11 / 6]
    assert replace(less, ceiling=2.5).share == pytest.approx(0.5)


def test_a_side_that_is_far_off_is_told_and_does_not_count() -> None:
    row = replace(ROW, sides=(OURS, SLOW, FAST))
    assert row.best is SLOW
    assert cells(row)[2][4] == "0.9000 0.9500, too far off to count"
    wrong = replace(row, sides=(replace(OURS, lowest=0.9), SLOW))
    assert wrong.verdict is not None
    assert wrong.verdict.met is False
    assert wrong.verdict.measured == "lowest cosine 0.9000"
    # int8 may differ more.
    assert replace(row, dtype="int8", sides=(OURS, replace(FAST, lowest=0.96))).peers


@pytest.mark.parametrize(
    ("goal", "sides", "met", "measured"),
    [
        (Goal(least=1.6), (OURS, SLOW), True, "2.00"),
        (Goal(least=2.5), (OURS, SLOW), False, "2.00"),
        (Goal(least=1.6), (OURS,), None, "nothing to compare with"),
        (Goal(least=1.6), (OURS, replace(SLOW, name="Poolhouse offline")), None, "nothing to compare with"),
        (Goal("Poolhouse offline", 0.85), (OURS, replace(SLOW, name="Poolhouse offline")), True, "2.00"),
        (Goal("vLLM", 3.0), (OURS, SLOW, replace(SLOW, name="vLLM 0.33")), False, "2.00"),
        (Goal("vLLM", 3.0), (OURS, SLOW), None, "nothing to compare with"),
        (Goal(None, most=11.0), (OURS,), True, "11.00 texts/s"),
        (Goal(None, most=10.9), (OURS,), False, "11.00 texts/s"),
    ],
)
def test_goals(goal: Goal, sides: tuple[SideFigures, ...], met: bool | None, measured: str) -> None:
    verdict = replace(ROW, goal=goal, sides=sides).verdict
    assert verdict is not None
    assert (verdict.met, verdict.measured) == (met, measured)


def test_remarks_say_ceiling_goal_and_notes() -> None:
    assert remarks(ROW) == [
        "Products alone would allow 22.0 texts/s; Poolhouse reaches 50 % of that.",
        "Goal: 1.6 times the best peer: met (2.00).",
    ]
    assert remarks(ALONE) == ["Goal: at most 5 MiB: missed (11.00 MiB).", "a note"]


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(REPORT.as_json())
    assert read_report(path) == REPORT
    facts = json.loads(path.read_text())
    assert set(facts) == {"format", "command", "date", "machine", "ceilings", "rows", "notes"}
    row = facts["rows"][0]
    assert set(row) == {
        "command", "work", "shape", "dtype", "unit", "sides", "higher", "goal", "ceiling", "ceiling_of", "notes",
        "best_peer", "ratio", "lowest_ratio", "share_of_ceiling", "verdict",
    }  # fmt: skip
    assert (row["best_peer"], row["ratio"]) == ("ONNX Runtime 1.32", 2.0)
    assert row["verdict"] == {"goal": "1.6 times the best peer", "measured": "2.00", "met": True}
    assert set(row["sides"][0]) == {"name", "values", "setting", "lowest", "mean", "median"}
    assert {"cpu", "features", "cores", "quota", "torch"} <= set(facts["machine"])


@pytest.mark.parametrize("text", ["", "{}", '{"format": 1}', '{"format": 2}', "[]", '{"format": 2, "machine": 3}'])
def test_what_is_no_report_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"is no report|Measure again"):
        read_report(path)
    with pytest.raises(ConfigError, match="is no report"):
        read_report(tmp_path / "none.json")


def test_the_page_is_well_formed_and_asks_for_nothing() -> None:
    text = page([REPORT, REPORT])
    root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    assert len(root.findall(".//svg")) == 6
    words = " ".join(root.itertext())
    for expected in ("A <CPU> & more", "poolhouse bench throughput", "no vLLM", "missed", "a note", "50 %"):
        assert expected in words
    tags = {element.tag for element in root.iter()}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert not re.search(r"https?:|//|url\(|@import|\b(src|href)=", text.removeprefix("<!DOCTYPE html>\n"))
    assert "prefers-color-scheme: dark" in text


def test_a_plot_stands_alone_and_keeps_within_its_frame() -> None:
    drawn = plot([ROW, QUERY], "speed", alone=True)
    root = ElementTree.fromstring(drawn)
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    bars = root.findall(f"{space}rect")
    assert len(bars) == 4
    for bar in bars:
        assert float(bar.attrib["x"]) + float(bar.attrib["width"]) <= width
        assert float(bar.attrib["y"]) + float(bar.attrib["height"]) <= height
    # Bars of a row are as long as their medians say.
    assert float(bars[0].attrib["width"]) / float(bars[1].attrib["width"]) == pytest.approx(11 / 5, abs=0.01)
    assert len(root.findall(f"{space}circle")) == 12
    assert len(root.findall(f"{space}line")) == 1
    far = ElementTree.fromstring(plot([replace(ROW, ceiling=1000.0)], "far", alone=True))
    assert not far.findall(f"{space}line")


def test_a_document_is_written_twice_the_same(tmp_path: Path) -> None:
    path = tmp_path / "docs" / "performance.md"
    path.parent.mkdir()
    (path.with_suffix("")).mkdir()
    (path.with_suffix("") / "old.svg").touch()
    (path.with_suffix("") / "kept.txt").touch()
    path.write_text(f"# Old\n\n{KEPT_BEGIN}\nby hand\n{KEPT_END}\n\n## Older\n")
    elsewhere = replace(REPORT, machine=replace(MACHINE, cores=8, gpu="A GPU"))
    write_document([REPORT, elsewhere, REPORT], path)
    first = {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    write_document([REPORT, elsewhere, REPORT], path)
    assert first == {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    text = path.read_text()
    pictures = re.findall(r"\]\((.*?\.svg)\)", text)
    assert pictures[0] == "performance/throughput-minilm-6-x-384.svg"
    assert len(set(pictures)) == len(pictures) == 6
    assert sorted(path.parent / name for name in pictures) == sorted(path.with_suffix("").glob("*.svg"))
    assert (path.with_suffix("") / "kept.txt").exists()
    assert f"{KEPT_BEGIN}\nby hand\n{KEPT_END}\n" in text
    assert "Older" not in text


def test_a_document_has_a_chapter_per_machine_and_a_table_per_command(tmp_path: Path) -> None:
    path = tmp_path / "performance.md"
    far = replace(ROW, dtype="bfloat16", sides=(OURS, SLOW, replace(FAST, lowest=0.5)), notes=("said once",))
    query = replace(QUERY, sides=(replace(SLOW, name="Poolhouse"), replace(OURS, name="vLLM 1")))
    other = Report("poolhouse bench other", "2026-11-30", replace(MACHINE, torch="2.14.0"), None, (far, far, query), ())
    write_document([REPORT, other, replace(REPORT, machine=replace(MACHINE, cores=8, quota=4.0, gpu="A GPU"))], path)
    text = path.read_text()
    heads = re.findall(r"^#+ [A-Z].*$", text, re.MULTILINE)
    sections = ["### Throughput", "### Latency", "### Memory"]
    assert heads == [
        "# Performance",
        *("## A <CPU> & more, 2 cores, quota 1.5", *sections),
        *("## A <CPU> & more, 8 cores, quota 4, A GPU", *sections),
    ]
    first, second = text.split("## A <CPU>")[1:]
    assert "torch 2.13.0, Python 3.11.7, Linux x86_64; Poolhouse 0.1.0, torch 2.14.0" in first
    assert "Measured on 2026-11-29, 2026-11-30." in first
    assert "```sh\npoolhouse bench throughput\n# no vLLM\npoolhouse bench other\n```" in first
    assert "Ceilings: products in float32 100 GFLOP/s, reading 42 MB 9.50 GB/s." in first
    assert (
        "| work | type | Poolhouse | ONNX Runtime 1.32 | OpenVINO 2026 | better | lowest | of its ceiling | goal |  |"
        in first
    )
    row = "| 8 texts, minilm (6 x 384), texts/s | float32 | 11.0 | 5.00 |  | 2.00 | 1.83 | 50 % | 1.6 times the best peer | met |"
    assert row in first
    assert "| bfloat16 | 11.0 | 5.00 | (20.0) | 2.00 |" in first
    assert "A figure in brackets does not count" in first
    assert "A figure in brackets" not in second
    assert "- Lowest cosine in bfloat16: Poolhouse 1.0000, ONNX Runtime 1.32 1.0000, OpenVINO 2026 0.5000." in first
    assert "- Settings: ONNX Runtime 1.32: batch size 8; OpenVINO 2026: batch size 4." in first
    assert first.count("said once") == 1
    assert "| peak, minilm (6 x 384), MiB | float32 | 11.0 |  |  |  | at most 5 MiB | **missed** |" in first


def test_the_page_about_speed_is_that_of_its_reports(tmp_path: Path) -> None:
    docs = ROOT / "docs"
    reports = [read_report(path) for path in sorted((docs / "performance").glob("*.json"))]
    page = tmp_path / "performance.md"
    page.write_text((docs / "performance.md").read_text())
    write_document(reports, page)
    assert page.read_text() == (docs / "performance.md").read_text()
    plots = {path.name: path.read_bytes() for path in (tmp_path / "performance").glob("*.svg")}
    assert plots == {path.name: path.read_bytes() for path in (docs / "performance").glob("*.svg")}
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    write_table(reports, readme, tmp_path / "docs" / "performance.md")
    assert readme.read_text() == (ROOT / "README.md").read_text()


def test_the_table_of_a_readme_stands_between_its_marks(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"# Before\n\n{BEGIN}\nold\n{END}\n\nbehind\n")
    write_table([REPORT], path)
    first = path.read_text()
    assert first.startswith(f"# Before\n\n{BEGIN}\nall-MiniLM-L6-v2 on A <CPU>")
    assert first.endswith(f"{END}\n\nbehind\n")
    assert "| 8 texts, texts/s | float32 | 11.0 | 5.00 | ONNX Runtime 1.32 | 2.00 | 1.83 |" in first
    assert "old" not in first
    write_table([REPORT], path)
    assert path.read_text() == first
    write_table([REPORT, replace(REPORT, machine=replace(MACHINE, cores=8))], path)
    assert path.read_text() == first
    # Of two rounds the middle lies between them, as on the page.
    two = replace(ROW, sides=(replace(OURS, values=(10.0, 12.0)), replace(SLOW, values=(5.0, 4.0))))
    write_table([replace(REPORT, rows=(two,))], path)
    assert f"| {two.ratio:.2f} | 2.00 |" in path.read_text()
    write_table([REPORT], path, tmp_path / "docs" / "performance.md")
    assert "\n[docs/performance.md](docs/performance.md) has all rows" in path.read_text()
    path.write_text("no marks")
    with pytest.raises(ConfigError, match="has no marks"):
        write_table([REPORT], path)


def test_numbers_have_three_digits_that_count() -> None:
    assert [number(value) for value in (1234.5, 100.0, 99.95, 12.345, 1.2345, 0.123)] == [
        "1,234", "100", "100.0", "12.3", "1.23", "0.12"
    ]  # fmt: skip


def test_the_machine_is_named() -> None:
    machine = this_machine()
    assert machine.cpu
    assert machine.cores >= 1
    assert machine.torch
    assert machine.cpu in machine.lines()[0]
    assert f"torch {machine.torch}" in machine.lines()[1]
