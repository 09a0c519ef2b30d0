"""Page: reports as one HTML file that asks for nothing else: machines, command lines, goals, tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from poolhouse.bench.plots import STYLE, grouped, plot
from poolhouse.bench.report import COLUMNS, Report, Row, cells, number, remarks, title

_STYLE = """
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


def page(reports: Sequence[Report]) -> str:
    """The whole file; well-formed as XML too."""
    body = "".join(_report(report) for report in reports)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width"/><title>Poolhouse: measurements</title>'
        f"<style>{_STYLE}\n{STYLE}</style></head><body><h1>Poolhouse: measurements</h1>{_goals(reports)}{body}</body></html>\n"
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
