"""Plots: rows as bars in SVG, without scripts, readable on dark and on light; a dot for each round."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from poolhouse.bench.report import Row, SideFigures, number

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
