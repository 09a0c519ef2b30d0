"""The walk-throughs of CONTRIBUTING.md work: what they add answers. The dialect's is in `tests/server/test_routes.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from poolhouse.models.native import families
from poolhouse.packing.pack import Segments
from poolhouse.params import PoolingParams
from poolhouse.pooling import steps
from poolhouse.pooling.rows import REDUCTIONS, Rows
from tests.docs.pages import Block, blocks
from tests.models.parity import load, packed, reference, save, worst
from tests.models.test_encoders import ROWS


def block_with(text: str) -> Block:
    (block,) = (block for block in blocks("CONTRIBUTING.md") if text in block.text)
    return block


def test_the_family_serves_a_tiny_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: dict[str, object] = {"__name__": "mpnet_example"}
    exec(block_with("MPNET = Family(").text, module)
    others = tuple(family for family in families.FAMILIES if "mpnet" not in family.model_types)
    monkeypatch.setattr(families, "FAMILIES", (*others, module["MPNET"]))
    name, options = ROWS["mpnet"]
    save(tmp_path, name, options)
    loaded = load(tmp_path)
    assert worst(packed(loaded.transformer), reference(tmp_path, name)) < 1e-5


def test_the_pooling_type_is_the_minimum_of_each_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    module: dict[str, object] = {}
    exec(block_with("def smallest(").text, module)
    monkeypatch.setitem(REDUCTIONS, "MIN", module["smallest"])  # type: ignore[arg-type]
    lengths = (3, 1, 4)
    rows = Rows(torch.randn(sum(lengths), 8), Segments(lengths), torch.arange(sum(lengths)))
    pooled = steps.Reduce(("MIN",))(rows, PoolingParams()).values
    expected = torch.stack([part.min(0).values for part in rows.values.split(lengths)])
    assert torch.equal(pooled, expected)


def test_the_rows_and_registries_that_the_page_names_are_there() -> None:
    page = (Path(__file__).parent.parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert '`"mpnet": ("MPNet", TINY),`' in page
    assert ROWS["mpnet"][0] == "MPNet"
    for path, name in (
        ("src/poolhouse/models/native/families/__init__.py", "FAMILIES"),
        ("src/poolhouse/models/roles.py", "ARCHITECTURE_HEADS"),
        ("src/poolhouse/params.py", "_SEQUENCE_POOLINGS"),
        ("src/poolhouse/models/files/sentence_transformers.py", "_POOLINGS"),
        ("tests/pooling/test_pooling.py", "test_reductions_by_hand"),
        ("tests/server/test_openapi.py", "REPLIES"),
    ):
        assert name in page
        assert name in (Path(__file__).parent.parent.parent / path).read_text(encoding="utf-8"), path
