"""Documents: what pages of Markdown say of speed, written from reports: a document with its plots, and a README's table."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from poolhouse.bench.machine import Machine
from poolhouse.bench.page import grouped, plot
from poolhouse.bench.report import Report, Row, SideFigures, number
from poolhouse.errors import ConfigError
from poolhouse.files import whole_file

BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
# What stands between these in a document is written by hand, and kept.
KEPT_BEGIN, KEPT_END = "<!-- kept:begin -->", "<!-- kept:end -->"
_INTRODUCTION = """\
# Performance

<!-- Written by `poolhouse bench report`; changes by hand are lost but for those between the marks. -->

Each figure is the median of rounds in which all sides take turns, each in a process of its own. *Better* is the median
of the ratios with the best peer, round by round; above 1 ours is better. *Lowest* is that of our worst round. Peers get
texts sorted by length and the best batch size of a short trial. A cosine compares a side's vectors with those of the
reference in float32; a side that is too far off does not count. Shapes have random weights and MiniLM's tokenizer; MiniLM
is real. Neighbours on a machine move all of it: run the commands on yours. `PEERS` is an environment with the peers.
"""
# The sections of a chapter, in this order; others come behind.
_SECTIONS = ("throughput", "latency", "rerank", "serve", "start", "memory", "extraction", "pictures", "gpu")
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
    """Write a document with all reports, a chapter per machine, and its plots into the folder of its name beside it.

    Older plots go. What stands between the marks of an older document stays.
    """
    pictures = path.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    for old in pictures.glob("*.svg"):
        old.unlink()
    by_machine: dict[tuple[object, ...], list[Report]] = {}
    for report in reports:
        by_machine.setdefault(_hardware(report.machine), []).append(report)
    parts, names = [_INTRODUCTION, _kept(path)], _Names(pictures)
    for own in by_machine.values():
        parts += _chapter(own, names)
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


def _hardware(machine: Machine) -> tuple[object, ...]:
    return machine.cpu, machine.features, machine.cores, machine.quota, machine.gpu


def _kept(path: Path) -> str:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.search(f"{KEPT_BEGIN}.*?{KEPT_END}\n", text, re.DOTALL)
    return found[0] if found else f"{KEPT_BEGIN}\n{KEPT_END}\n"


class _Names:
    """Names of plots, none of which is given twice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._given: dict[str, int] = {}

    def new(self, text: str) -> Path:
        name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
        self._given[name] = self._given.get(name, 0) + 1
        return self.folder / (f"{name}.svg" if self._given[name] == 1 else f"{name}-{self._given[name]}.svg")


def _chapter(reports: Sequence[Report], names: _Names) -> list[str]:
    """One machine: what it is, how to measure, and a section per command."""
    machine = reports[0].machine
    gpu = "" if machine.gpu is None else f", {machine.gpu}"
    parts = [f"## {machine.processor}{gpu}\n", _about(reports)]
    by_command: dict[str, list[Row]] = {}
    for row in (row for report in reports for row in report.rows):
        by_command.setdefault(row.command, []).append(row)
    for command, rows in sorted(by_command.items(), key=lambda one: _place(one[0])):
        parts += [f"### {command.capitalize()}\n", _table(rows)]
        for (_, shape), own in grouped(rows).items():
            file = names.new(f"{command}-{shape}")
            file.write_text(plot(own, f"{command}, {shape}", alone=True) + "\n", encoding="utf-8")
            parts.append(f"![{command}, {shape}]({names.folder.name}/{file.name})\n")
    return parts


def _place(command: str) -> int:
    return _SECTIONS.index(command) if command in _SECTIONS else len(_SECTIONS)


def _about(reports: Sequence[Report]) -> str:
    machine = reports[0].machine
    dates = _once(report.date for report in reports)
    versions = _once(report.machine.versions for report in reports)
    lines = [
        f"{machine.abilities}; {machine.memory_gib:.0f} GiB. {'; '.join(versions)}. Measured on {', '.join(dates)}.\n"
    ]
    products: dict[str, float] = {}
    reading: dict[str, float] = {}
    for ceilings in (report.ceilings for report in reports if report.ceilings is not None):
        # Other programs on the machine can only lower a rate.
        for found, known in ((ceilings.products, products), (ceilings.reading, reading)):
            known.update({name: max(rate, known.get(name, 0.0)) for name, rate in found.items()})
    rates = [f"products in {dtype} {number(rate)} GFLOP/s" for dtype, rate in products.items()]
    rates += [f"reading {size} MB {number(rate)} GB/s" for size, rate in reading.items()]
    lines += [f"Ceilings: {', '.join(rates)}.\n"] if rates else []
    commands = _once("\n".join([report.command, *(f"# {note}" for note in report.notes)]) for report in reports)
    return "\n".join([*lines, "```sh", *commands, "```\n"])


def _table(rows: Sequence[Row]) -> str:
    """A line per row, a column per side; what must be known of sides and rows stands below."""
    ours = {row.ours.name for row in rows}
    others = _once(side.name for row in rows for side in row.sides if side.name not in ours)
    heads = ["work", "type", "Poolhouse", *others, "better", "lowest", "of its ceiling", "goal", ""]
    justified = ["---", "---", *["---:"] * (len(others) + 4), "---", "---"]
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(justified)}|"]
    for row in rows:
        found = {side.name: side for side in row.sides}
        figures = [_figure(row, found.get(name)) for name in others]
        compared = row.ratio is not None and row.rival is not None and row.rival.name not in ours
        ratios = [f"{row.ratio:.2f}", f"{row.lowest_ratio:.2f}"] if compared else ["", ""]
        share = "" if row.share is None else f"{100 * row.share:.0f} %"
        cells = [f"{row.work}, {row.shape}, {row.unit}", row.dtype, number(row.ours.median), *figures, *ratios, share]
        lines.append(f"| {' | '.join([*cells, *_outcome(row)])} |")
    remarks = "\n".join(f"- {line}" for line in _remarks(rows))
    return "\n".join([*lines, "", remarks]) + "\n"


def _figure(row: Row, side: SideFigures | None) -> str:
    if side is None:
        return ""
    return number(side.median) if row.exact(side) else f"({number(side.median)})"


def _outcome(row: Row) -> tuple[str, str]:
    """The goal, and how it came out."""
    verdict = row.verdict
    if verdict is None:
        return "", ""
    return verdict.goal, {True: "met", False: "**missed**", None: "open"}[verdict.met]


def _remarks(rows: Sequence[Row]) -> list[str]:
    """Cosines by side and type, settings of sides, ceilings, and what rows say themselves."""
    lowest: dict[tuple[str, str], float] = {}
    settings: dict[str, list[str]] = {}
    for row in rows:
        for side in row.sides:
            if side.lowest is not None:
                key = side.name, row.dtype
                lowest[key] = min(side.lowest, lowest.get(key, 1.0))
            if side.setting:
                settings.setdefault(side.name, []).append(side.setting)
    lines = []
    for dtype in _once(row.dtype for row in rows):
        cosines = [f"{name} {value:.4f}" for (name, of), value in lowest.items() if of == dtype]
        if cosines:
            lines.append(f"Lowest cosine in {dtype}: {', '.join(cosines)}.")
    if settings:
        found = [f"{name}: {', '.join(_once(own))}" for name, own in settings.items()]
        lines.append(f"Settings: {'; '.join(found)}.")
    of = _once(row.ceiling_of for row in rows if row.ceiling_of and row.share is not None)
    if of:
        lines.append(f"Ceilings are those of: {', '.join(one[0].lower() + one[1:] for one in of)}, and nothing else.")
    if any(not row.exact(side) for row in rows for side in row.sides):
        lines.append("A figure in brackets does not count: its vectors are too far off.")
    return [*lines, *_once(note for row in rows for note in row.notes)]


def _once(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _short(reports: Sequence[Report]) -> str:
    """The table, of the machine of the first report, below a line about it."""
    machine = reports[0].machine
    own = [report for report in reports if _hardware(report.machine) == _hardware(machine)]
    lines = [
        "| | type | Poolhouse | best peer | | times better | lowest of rounds |",
        "|---|---|---:|---:|---|---:|---:|",
    ]
    rows = [row for report in own for row in report.rows if row.shape.startswith("minilm") and row.peers]
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
            ratios = row.ratios(best)
            figures = f"{number(row.ours.median)} | {number(best.median)} | {best.name}"
            lines.append(
                f"| {row.work}, {row.unit} | {row.dtype} | {figures} | {median(ratios):.2f} | {min(ratios):.2f} |"
            )
    features = ", ".join(machine.features)
    head = f"all-MiniLM-L6-v2 on {machine.cpu}, {machine.cores} cores ({features}); medians of rounds in turn:"
    return f"{head}\n\n" + "\n".join(dict.fromkeys(lines)) + "\n"
