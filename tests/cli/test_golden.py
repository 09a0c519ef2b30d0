"""Published numbers: which checkpoint has them, and when a comparison with them fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from poolhouse import LLM
from poolhouse.cli.check import GOLDEN, compare, golden_values, measure
from tests.models.tiny import LAYERS, save, tokenizer

VALUES = GOLDEN["BAAI/bge-m3"]
EXACT = [golden.value for golden in VALUES]


@pytest.mark.parametrize(
    ("model", "path", "found"),
    [
        ("BAAI/bge-m3", "/models/anywhere", True),
        ("name", "/home/me/.cache/huggingface/hub/models--BAAI--bge-m3/snapshots/5617a9f", True),
        ("me/bge-m3", "/models/bge-m3", False),
        ("BAAI/bge-m3-retromae", "/hub/models--BAAI--bge-m3-retromae/snapshots/1", False),
        (None, "/models/all-MiniLM-L6-v2", False),
    ],
)
def test_a_checkpoint_is_known_by_its_hub_id(model: str | None, path: str, found: bool) -> None:
    assert golden_values(model, path) == (VALUES if found else ())


def test_numbers_within_a_hundredth_are_close() -> None:
    compared = compare(VALUES, [value * 1.009 for value in EXACT])
    assert compared.close
    assert compared.summary.startswith("Against 9 published numbers: largest difference 7.0e-03.")


@pytest.mark.parametrize("wrong", range(len(VALUES)))
@pytest.mark.parametrize("offset", [0.02, -0.02, float("nan")])
def test_each_number_that_is_off_is_named(wrong: int, offset: float) -> None:
    measured = [value + offset if place == wrong else value for place, value in enumerate(EXACT)]
    compared = compare(VALUES, measured)
    assert not compared.close
    assert compared.summary.count("published as") == 1
    assert f"{VALUES[wrong].label} is" in compared.summary


def test_every_number_can_be_measured(tmp_path: Path) -> None:
    tokenizer(tmp_path, "roberta")
    save(tmp_path, "XLMRobertaModel", "XLMRobertaConfig", LAYERS | {"bos_token_id": 0, "eos_token_id": 2})
    for name, width in (("sparse", 1), ("colbert", 32)):
        torch.save({"weight": torch.randn(width, 32)}, tmp_path / f"{name}_linear.pt")
    with LLM(str(tmp_path), overflow="truncate") as llm:
        measured = measure(llm, VALUES)
    assert len(measured) == len(VALUES)
    assert not compare(VALUES, measured).close
    # No word of these texts is in the tiny vocabulary, and unknown tokens weigh nothing.
    assert [value for golden, value in zip(VALUES, measured, strict=True) if golden.mode in ("sparse", "")] == [0, 0, 0]
