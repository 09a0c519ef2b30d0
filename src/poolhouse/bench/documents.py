"""Documents: what pages of Markdown say of speed, written from reports: a document with its plots, and a README's table."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from poolhouse.bench.page import grouped, plot
from poolhouse.bench.report import COLUMNS, Report, Row, cells, number, remarks, title
from poolhouse.errors import ConfigError
from poolhouse.files import whole_file

BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
_INTRODUCTION = """\
# Performance

<!-- Written by `poolhouse bench report`; changes by hand are lost. -->

Each figure is the median of rounds in which all sides take turns, each in a process of its own. A ratio is that of one
run; above 1 ours is better. *Lowest* is the ratio of our worst round. Peers get texts sorted by length and the best batch
size of a short trial; theirs are the versions in the tables. A cosine compares a side's vectors with those of the
reference in float32, so no side wins by being wrong. Shapes have random weights and MiniLM's tokenizer; MiniLM is real.
Neighbours on a machine move all of it: run the commands on yours. `PEERS` is an environment with the peers.
"""
# Rows of a README's table: command, and what begins the work.
_SHORT = (
    ("throughput", ""),
    ("latency", "one query of 7 words, p50"),
    ("latency", "one query of 7 words, HTTP, p50"),
    ("start", "LLM"),
    ("serve", ""),
    ("rerank", ""),
)


def write_document(reports: Sequence[Report], path: Path) -> None:
    """Write a document with all reports, and its plots into the folder of its name beside it; older plots go."""
    pictures = path.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    for old in pictures.glob("*.svg"):
        old.unlink()
    parts = [_INTRODUCTION, "## Machines and commands\n", *map(_machine, reports), "## Goals\n", _goals(reports)]
    seen: dict[str, int] = {}
    for report in reports:
        for (command, shape), rows in grouped(report.rows).items():
            name = re.sub(r"[^a-z0-9]+", "-", f"{command}-{shape}".lower()).strip("-")
            seen[name] = seen.get(name, 0) + 1
            file = pictures / (f"{name}.svg" if seen[name] == 1 else f"{name}-{seen[name]}.svg")
            file.write_text(plot(rows, f"{command}, {shape}", alone=True) + "\n", encoding="utf-8")
            parts.append(f"## {command.capitalize()}: {shape}\n\n![{command}, {shape}]({pictures.name}/{file.name})\n")
            parts += [_table(row) for row in rows]
    with whole_file(path) as part:
        part.write_text("\n".join(parts), encoding="utf-8")


def write_table(reports: Sequence[Report], path: Path, docs: Path | None = None) -> None:
    """Write the short table of a README anew, between its marks. docs: the document that it leads to.

    Raises:
        ConfigError: the file has no marks.
    """
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{path} has no marks; write {BEGIN} and {END} where the table goes.")
    more = ""
    if docs is not None:
        target = Path(os.path.relpath(docs, path.parent)).as_posix()
        more = f"\n[{target}]({target}) has all rows, goals and plots, and the commands.\n"
    with whole_file(path) as part:
        part.write_text(f"{before}{BEGIN}\n{_short(reports)}{more}{END}{after}", encoding="utf-8")


def _machine(report: Report) -> str:
    ceilings = []
    if report.ceilings is not None:
        ceilings = [f"products in {dtype} {number(rate)} GFLOP/s" for dtype, rate in report.ceilings.products.items()]
        ceilings += [f"reading {size} MB {number(rate)} GB/s" for size, rate in report.ceilings.reading.items()]
    lines = [f"```sh\n{report.command}\n```\n", f"{report.date}. {' '.join(report.machine.lines())}"]
    lines += [f"Ceilings: {', '.join(ceilings)}."] if ceilings else []
    return "\n".join([*lines, *report.notes]) + "\n"


def _goals(reports: Sequence[Report]) -> str:
    lines = [
        "| work | Poolhouse | of its ceiling | goal | measured | lowest | result |",
        "|---|---:|---:|---|---:|---:|---|",
    ]
    for row in (row for report in reports for row in report.rows):
        if row.verdict is not None:
            result = {True: "met", False: "**missed**", None: "open"}[row.verdict.met]
            lowest = "" if row.verdict.met is None or row.lowest_ratio is None else f"{row.lowest_ratio:.2f}"
            share = "" if row.share is None else f"{100 * row.share:.0f} %"
            ours = f"{number(row.ours.median)} | {share}"
            lines.append(
                f"| {title(row)} | {ours} | {row.verdict.goal} | {row.verdict.measured} | {lowest} | {result} |"
            )
    return "\n".join(lines) + "\n"


def _table(row: Row) -> str:
    heads = "| " + " | ".join(name for name, _ in COLUMNS) + " |"
    rule = "|" + "|".join("---:" if justify == "right" else "---" for _, justify in COLUMNS) + "|"
    lines = ["| " + " | ".join(line) + " |" for line in cells(row)]
    below = "\n".join(f"- {line}" for line in remarks(row))
    return "\n".join([f"**{title(row)}**\n", heads, rule, *lines, "", below]) + "\n"


def _short(reports: Sequence[Report]) -> str:
    """The table, below a line about the machine of the first report."""
    lines = [
        "| | type | Poolhouse | best peer | | times better | lowest of rounds |",
        "|---|---|---:|---:|---|---:|---:|",
    ]
    rows = [row for report in reports for row in report.rows if row.shape.startswith("minilm") and row.peers]
    for command, begin in _SHORT:
        for row in rows:
            best = row.best
            if (
                row.command != command
                or not row.work.startswith(begin)
                or best is None
                or (row.unit == "ms" and "p95" in row.work)
            ):
                continue
            ratios = sorted(row.ratios(best))
            figures = f"{number(row.ours.median)} | {number(best.median)} | {best.name}"
            middle = ratios[len(ratios) // 2]
            lines.append(f"| {row.work}, {row.unit} | {row.dtype} | {figures} | {middle:.2f} | {ratios[0]:.2f} |")
    machine = reports[0].machine
    features = ", ".join(machine.features)
    head = f"all-MiniLM-L6-v2 on {machine.cpu}, {machine.cores} cores ({features}); medians of rounds in turn:"
    return f"{head}\n\n" + "\n".join(dict.fromkeys(lines)) + "\n"
