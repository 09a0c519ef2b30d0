"""The engine of a tiny BERT, for tests that need no other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from poolhouse import LLM
from poolhouse.engine.engine import Engine
from tests.checkpoints import save_checkpoint


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder: Path = tmp_path_factory.mktemp("bert")
    save_checkpoint(folder, "bert, wordpiece")
    with LLM(str(folder)) as llm:
        yield llm.engine
