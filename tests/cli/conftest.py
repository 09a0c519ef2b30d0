"""What the tests of commands share."""

from __future__ import annotations

import pytest

from tests.checkpoints import save_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny embedder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_checkpoint(folder, "bert, wordpiece")
    return str(folder)
