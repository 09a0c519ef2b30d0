"""Report: rows of figures of all sides, what they are held against, and how that came out; a JSON file and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from poolhouse.bench.machine import Machine
from poolhouse.bench.sides import US
from poolhouse.errors import ConfigError

# Of the JSON; a reader refuses others.
FORMAT = 2
# Least lowest cosine of a side whose speed counts, by type. A random model is as sensitive as a trained one or less.
_EXACT = {"float32": 0.9999, "bfloat16": 0.98, "float16": 0.99, "int8": 0.95}


@dataclass(frozen=True, slots=True)
class SideFigures:
    """What one side did in one row.

    name: with its version. values: a figure per round, in the row's unit. setting: the best that was found, in words.
    lowest, mean: cosine of its vectors with those of the reference in float32, or for scores the correlation with them
    (`mean` alone); None where that was not compared.
    """

    name: str
    values: tuple[float, ...]
    setting: str = ""
    lowest: float | None = None
    mean: float | None = None

    @property
    def median(self) -> float:
        return median(self.values)


@dataclass(frozen=True, slots=True)
class Goal:
    """What a row is held against.

    against: "best" of the peers, or the name of a side, without its version. least: how many times better at least.
    most: instead of both, the largest figure of our own.
    """

    against: str | None = "best"
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a goal came out: in words, what was measured, and whether it was met; None where there was nothing to compare."""

    goal: str
    measured: str
    met: bool | None


@dataclass(frozen=True, slots=True)
class Row:
    """One measure of all sides; ours is the first.

    work: what was done, in words. ceiling: what the machine's products, or its memory, alone would allow, in the unit.
    notes: sides that are missing or failed, and what else must be known.
    """

    command: str
    work: str
    shape: str
    dtype: str
    unit: str
    sides: tuple[SideFigures, ...]
    higher: bool = True
    goal: Goal | None = None
    ceiling: float | None = None
    ceiling_of: str = ""
    notes: tuple[str, ...] = ()

    @property
    def ours(self) -> SideFigures:
        return self.sides[0]

    def ratios(self, other: SideFigures) -> list[float]:
        """How many times better ours is, round by round."""
        pairs = zip(self.ours.values, other.values, strict=False)
        return [us / them if self.higher else them / us for us, them in pairs]

    @property
    def peers(self) -> list[SideFigures]:
        """Sides of others, those that computed something else left out."""
        return [side for side in self.sides[1:] if US not in side.name and self.exact(side)]

    def exact(self, side: SideFigures) -> bool:
        """Whether its vectors are near enough to the reference's for its speed to count."""
        return side.lowest is None or side.lowest >= _EXACT.get(self.dtype, 0.0)

    @property
    def best(self) -> SideFigures | None:
        """The best of the peers; without peers the best other side."""
        others = self.peers or list(self.sides[1:])
        if not others:
            return None
        return (max if self.higher else min)(others, key=lambda side: side.median)

    @property
    def rival(self) -> SideFigures | None:
        """The side that the row is held against."""
        if self.goal is None or self.goal.against in (None, "best"):
            return self.best
        named = [side for side in self.sides[1:] if side.name.startswith(str(self.goal.against))]
        return named[0] if named else None

    @property
    def ratio(self) -> float | None:
        """How many times better than the rival, the median of the rounds."""
        return median(self.ratios(self.rival)) if self.rival else None

    @property
    def lowest_ratio(self) -> float | None:
        return min(self.ratios(self.rival)) if self.rival else None

    @property
    def share(self) -> float | None:
        """Which part of the ceiling is reached."""
        if self.ceiling is None:
            return None
        return self.ours.median / self.ceiling if self.higher else self.ceiling / self.ours.median

    @property
    def verdict(self) -> Verdict | None:
        """How the goal came out; None without a goal."""
        goal = self.goal
        if goal is None:
            return None
        if not self.exact(self.ours):
            return Verdict("vectors like the reference's", f"lowest cosine {self.ours.lowest:.4f}", False)
        if goal.most is not None:
            goal_text, ours = f"at most {goal.most:g} {self.unit}", self.ours.median
            return Verdict(goal_text, f"{ours:.2f} {self.unit}", ours <= goal.most)
        assert goal.least is not None
        whom = "the best peer" if goal.against == "best" else str(goal.against)
        text = f"{goal.least:g} times {whom}"
        if self.ratio is None or (goal.against == "best" and not self.peers):
            return Verdict(text, "nothing to compare with", None)
        return Verdict(text, f"{self.ratio:.2f}", self.ratio >= goal.least)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the machine can do: of products the rate by type, in GFLOP/s (int8: billions of operations per second), and
    of reading memory, in GB/s, by the size of what is read, in MB."""

    products: dict[str, float]
    reading: dict[str, float]


@dataclass(frozen=True, slots=True)
class Report:
    """What one command measured, and on what. date: of the day, UTC. notes: types that were left out, missing peers."""

    command: str
    date: str
    machine: Machine
    ceilings: Ceilings | None
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def as_json(self) -> str:
        """The report as one JSON object, what is computed of the figures included."""
        facts = {"format": FORMAT, **asdict(self)}
        for row, written in zip(self.rows, facts["rows"], strict=True):
            for side, figures in zip(row.sides, written["sides"], strict=True):
                figures["median"] = side.median
            written["best_peer"] = row.best.name if row.best else None
            written["ratio"], written["lowest_ratio"] = row.ratio, row.lowest_ratio
            written["share_of_ceiling"] = row.share
            written["verdict"] = None if row.verdict is None else asdict(row.verdict)
        return json.dumps(facts, indent=1)


def read_report(path: Path) -> Report:
    """The report of a JSON file.

    Raises:
        ConfigError: it holds none, or one of another version.
    """
    try:
        facts: Any = json.loads(path.read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise ConfigError(f"{path} has format {facts['format']}; this version reads {FORMAT}. Measure again.")
        return Report(
            command=facts["command"],
            date=facts["date"],
            machine=Machine(**facts["machine"] | {"features": tuple(facts["machine"]["features"])}),
            ceilings=None if facts["ceilings"] is None else Ceilings(**facts["ceilings"]),
            rows=tuple(_row(row) for row in facts["rows"]),
            notes=tuple(facts["notes"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no report of `poolhouse bench`: {error!r}.") from None


_COMPUTED = ("best_peer", "ratio", "lowest_ratio", "share_of_ceiling", "verdict")


def _row(facts: dict[str, Any]) -> Row:
    sides = [{name: value for name, value in side.items() if name != "median"} for side in facts["sides"]]
    plain = {name: value for name, value in facts.items() if name not in _COMPUTED}
    return Row(
        **plain
        | {
            "sides": tuple(SideFigures(**side | {"values": tuple(side["values"])}) for side in sides),
            "goal": None if facts["goal"] is None else Goal(**facts["goal"]),
            "notes": tuple(facts["notes"]),
        }
    )


def number(value: float) -> str:
    """A figure with three digits that count."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


Cell = tuple[str, Literal["left", "right"]]
# The columns of tables, in the terminal, on pages and in documents.
COLUMNS: Sequence[Cell] = (
    ("side", "left"),
    ("figure", "right"),
    ("ours is better by", "right"),
    ("lowest", "right"),
    ("cosine: lowest, mean", "right"),
    ("setting", "left"),
)


def cells(row: Row) -> list[list[str]]:
    """A row's sides as cells of `COLUMNS`."""
    table = []
    for side in row.sides:
        ratios = row.ratios(side) if side is not row.ours else []
        cosine = " ".join(f"{value:.4f}" for value in (side.lowest, side.mean) if value is not None)
        if not row.exact(side):
            cosine += ", too far off to count"
        table.append(
            [
                side.name,
                number(side.median),
                f"{median(ratios):.2f}" if ratios else "",
                f"{min(ratios):.2f}" if ratios else "",
                cosine,
                side.setting,
            ]
        )
    return table


def title(row: Row) -> str:
    """What a row is, in one line."""
    return f"{row.work}, {row.shape}, {row.dtype}, {row.unit}"


def remarks(row: Row) -> list[str]:
    """What stands below a row's table: ceiling, goal, notes."""
    lines = []
    if row.ceiling is not None and row.share is not None:
        lines.append(
            f"{row.ceiling_of} alone would allow {number(row.ceiling)} {row.unit}; "
            f"Poolhouse reaches {100 * row.share:.0f} % of that."
        )
    if row.verdict is not None:
        result = {True: "met", False: "missed", None: "open"}[row.verdict.met]
        lines.append(f"Goal: {row.verdict.goal}: {result} ({row.verdict.measured}).")
    return [*lines, *row.notes]
