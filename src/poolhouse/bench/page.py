"""Page: reports as one HTML file that asks for nothing else, and rows as bars in SVG, readable on dark and on light."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from poolhouse.bench.report import COLUMNS, Report, Row, SideFigures, cells, number, remarks, title

_PAGE_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 0.5rem 0 1rem; }
th, td { padding: 0.15rem 0.7rem; border-bottom: 1px solid color-mix(in srgb, currentColor 25%, transparent); text-align: left; }
.right { text-align: right; font-variant-numeric: tabular-nums; }
.met { font-weight: 600; color: #1a7f37; }
.missed { font-weight: 600; color: #cf222e; }
@media (prefers-color-scheme: dark) { .met { color: #3fb950; } .missed { color: #ff7b72; } }
code { white-space: pre-wrap; overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; }
""".strip()
_WIDTH, _NAMES, _FIGURES = 760, 230, 90
_LINE, _HEAD, _GAP = 24, 30, 14
# A ceiling further away than this is only told.
_FAR = 3.0
STYLE = """
.plot { font: 13px system-ui, sans-serif; --ink: #1f2328; --ours: #0969da; --theirs: #8c959f; --line: #cf222e; }
@media (prefers-color-scheme: dark) {
  .plot { --ink: #e6edf3; --ours: #58a6ff; --theirs: #6e7681; --line: #ff7b72; }
}
.plot text { fill: var(--ink); }
.plot .head { font-weight: 600; }
.plot .ours { fill: var(--ours); }
.plot .theirs { fill: var(--theirs); }
.plot .round { fill: none; stroke: var(--ink); }
.plot .ceiling { stroke: var(--line); stroke-dasharray: 4 3; }
""".strip()


def page(reports: Sequence[Report]) -> str:
    """The whole file; well-formed as XML too."""
    body = "".join(_report(report) for report in reports)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width"/><title>Poolhouse: measurements</title>'
        f"<style>{_PAGE_STYLE}\n{STYLE}</style></head><body><h1>Poolhouse: measurements</h1>{_goals(reports)}{body}</body></html>\n"
    )


def _goals(reports: Sequence[Report]) -> str:
    lines = []
    for row in (row for report in reports for row in report.rows):
        if row.verdict is None:
            continue
        name = {True: "met", False: "missed", None: "open"}[row.verdict.met]
        cells_of = (title(row), number(row.ours.median), row.verdict.goal, row.verdict.measured)
        lines.append(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells_of) + f'<td class="{name}">{name}</td></tr>'
        )
    if not lines:
        return ""
    heads = "".join(f"<th>{name}</th>" for name in ("work", "Poolhouse", "goal", "measured", "result"))
    return f"<h2>Goals</h2><table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _report(report: Report) -> str:
    parts = [
        f"<h2>{escape(report.date)}</h2><p><code>{escape(report.command)}</code></p>",
        "".join(f"<p>{escape(line)}</p>" for line in (*report.machine.lines(), *report.notes)),
    ]
    if report.ceilings is not None:
        found = [f"products in {dtype}: {number(rate)} GFLOP/s" for dtype, rate in report.ceilings.products.items()]
        found += [f"reading {size} MB: {number(rate)} GB/s" for size, rate in report.ceilings.reading.items()]
        parts.append(f"<p>{escape('; '.join(found))}</p>")
    for (command, shape), rows in grouped(report.rows).items():
        name = f"{command}, {shape}"
        parts.append(f"<h3>{escape(name)}</h3>{plot(rows, name)}")
        parts += [_table(row) for row in rows]
    return "".join(parts)


def _table(row: Row) -> str:
    heads = "".join(f'<th class="{justify}">{name}</th>' for name, justify in COLUMNS)
    lines = "".join(
        "<tr>"
        + "".join(
            f'<td class="{justify}">{escape(cell)}</td>' for cell, (_, justify) in zip(line, COLUMNS, strict=True)
        )
        + "</tr>"
        for line in cells(row)
    )
    below = "".join(f"<p>{escape(line)}</p>" for line in remarks(row))
    return f"<h4>{escape(title(row))}</h4><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>{below}"


def plot(rows: Sequence[Row], name: str, alone: bool = False) -> str:
    """One picture of rows, each with a scale of its own.

    alone: as a file, with its style; else for a page that has `STYLE`.
    """
    parts, y = [], 0
    for row in rows:
        drawn, height = _row(row, y)
        parts.append(drawn)
        y += height + _GAP
    space = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
    style = f"<style>{STYLE}</style>" if alone else ""
    return (
        f'<svg{space} class="plot" role="img" viewBox="0 0 {_WIDTH} {max(y, 1)}" width="{_WIDTH}" height="{max(y, 1)}">'
        f"<title>{escape(name)}</title>{style}{''.join(parts)}</svg>"
    )


def _row(row: Row, top: int) -> tuple[str, int]:
    largest = max(value for side in row.sides for value in side.values) or 1.0
    ceiling = row.ceiling if row.ceiling is not None and row.ceiling <= _FAR * largest else None
    scale = (_WIDTH - _NAMES - _FIGURES) / max(largest, ceiling or 0.0)
    head = f"{row.work}, {row.dtype} ({row.unit}; {'more' if row.higher else 'less'} is better)"
    parts = [f'<text class="head" x="0" y="{top + 16}">{escape(head)}</text>']
    bottom = top + _HEAD + _LINE * len(row.sides)
    for place, side in enumerate(row.sides):
        parts.append(_bar(side, top + _HEAD + place * _LINE, scale, side is row.ours))
    if ceiling is not None:
        x = _NAMES + ceiling * scale
        parts.append(f'<line class="ceiling" x1="{x:.1f}" x2="{x:.1f}" y1="{top + _HEAD - 4}" y2="{bottom}"/>')
    return "".join(parts), bottom - top


def _bar(side: SideFigures, y: int, scale: float, ours: bool) -> str:
    middle = y + _LINE / 2
    farthest = max(*side.values, side.median) * scale
    rounds = "".join(
        f'<circle class="round" cx="{_NAMES + value * scale:.1f}" cy="{middle - 2:.1f}" r="3"/>'
        for value in side.values
    )
    return (
        f'<text x="0" y="{middle + 3:.1f}">{escape(side.name)}</text>'
        f'<rect class="{"ours" if ours else "theirs"}" x="{_NAMES}" y="{y + 2}" width="{side.median * scale:.1f}" height="{_LINE - 8}"/>'
        f"{rounds}"
        f'<text x="{_NAMES + farthest + 8:.1f}" y="{middle + 3:.1f}">{number(side.median)}</text>'
    )


def grouped(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by command and shape, in their order."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.command, row.shape), []).append(row)
    return groups
