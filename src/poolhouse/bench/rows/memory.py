"""Memory: what our process holds before and after loading, at its peak, and whether it grows, per budget of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from poolhouse.bench.measure import Bench, llm_options
from poolhouse.bench.report import Goal, Report, Row, SideFigures
from poolhouse.bench.shapes import checkpoint
from poolhouse.bench.sides import US, SideProcess, our_side

# Growth behind the first third of the passes that counts as flat, in MiB.
_FLAT = 32.0


def memory(bench: Bench, shapes: Sequence[str], budgets: Sequence[int], command: str) -> Report:
    """Resident MiB of a process that reads the texts `3 * rounds` times, one process per budget of tokens."""
    rows: list[Row] = []
    notes: list[str] = []
    for shape in shapes:
        written = checkpoint(shape, bench.cache, bench.layers)
        for dtype in bench.possible_types(notes):
            for budget in budgets:
                bench.progress(f"{shape}, {dtype}, packs of {budget} tokens")
                options = {**llm_options(dtype), "max_num_batched_tokens": budget}
                process = SideProcess(US, our_side(str(written.folder), **options))
                try:
                    found = process.do("memory", texts=bench.corpus, passes=3 * bench.rounds)
                finally:
                    process.close()
                passes = found["passes"]
                grown = max(passes[bench.rounds :]) - max(passes[: bench.rounds])
                note = f"{found['before']:.0f} MiB before loading, {found['loaded']:.0f} behind it."
                for work, value, goal in (
                    (f"peak, packs of {budget} tokens", found["peak"], None),
                    (
                        f"growth over {3 * bench.rounds} passes, packs of {budget} tokens",
                        max(0.0, grown),
                        Goal(None, most=_FLAT),
                    ),
                ):
                    sides = (SideFigures(US, (value,)),)
                    rows.append(Row("memory", work, written.title, dtype, "MiB", sides, False, goal, notes=(note,)))
    return bench.report(command, rows, None, notes)
