"""The table of the leaderboard's families in docs/models.md: each is proven by a row of the measured tables, or has a reason."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import ROOT

PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
COLUMNS = 6


def rows(text: str) -> list[list[str]]:
    """The cells of each row of the tables in a text, without heads."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


FAMILIES = rows(PAGE.split("## The leaderboard's families\n")[1].split("\n## ")[0])[1:]
MEASURED = {row[0] for row in rows(PAGE.split("<!-- parity:begin -->")[1])}


@pytest.mark.parametrize("row", FAMILIES, ids=[row[0][:40] for row in FAMILIES])
def test_a_family_is_proven_by_a_measured_row_or_has_a_reason(row: list[str]) -> None:
    family, _, served, _, proof, notes = row
    assert len(row) == COLUMNS
    named = re.findall(r"`([^`]+)`", proof)
    if proof.startswith("`"):
        assert not served.startswith("not served")
        assert set(named) <= MEASURED, f"{family}: no such row of Parity"
    else:
        assert proof, f"{family}: neither a row of Parity nor a reason"
        assert notes, f"{family}: no reason"


def test_no_family_stands_twice() -> None:
    names = [name.strip() for row in FAMILIES for name in re.split(r",| and ", row[0])]
    assert len(names) == len(set(names))
