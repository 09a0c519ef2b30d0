"""Backbones give products one of few numbers of rows, made up once, and what fills them up changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from poolhouse import LLM
from poolhouse.layers.linear import Linear
from tests.checkpoints import KINDS, save_checkpoint

NATIVE = [kind for kind, (family, *_) in KINDS.items() if family not in ("T5",)]


@pytest.mark.parametrize("kind", NATIVE)
def test_products_get_rounded_rows_and_the_same_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    save_checkpoint(tmp_path, kind)
    seen: set[tuple[int, int]] = set()

    def watched(of: Any) -> Any:
        def call(self: Linear, *values: Any, **options: Any) -> Tensor:
            rows = max(len(value) for value in values if isinstance(value, Tensor))
            seen.add((rows, self.padded_rows(rows)))
            answer: Tensor = of(self, *values, **options)
            return answer

        return call

    texts = [f"the moon and the sea {number} " * (number % 7 + 1) for number in range(23)]
    with LLM(str(tmp_path), lanes=1, overflow="truncate") as llm:
        alone = [llm.embed_array([text]) for text in texts]
        monkeypatch.setattr(Linear, "__call__", watched(Linear.__call__))
        monkeypatch.setattr(Linear, "add_to", watched(Linear.add_to))
        together = llm.embed_array(texts)
    assert seen
    assert all(given == computed for given, computed in seen), seen
    np.testing.assert_allclose(together, np.concatenate(alone), atol=2e-6)
