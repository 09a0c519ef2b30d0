"""Random checkpoints of the shapes: read by us without a complaint, as large as they say, and written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from poolhouse import LLM
from poolhouse.bench.shapes import SHAPES, check_shape, checkpoint
from poolhouse.errors import ConfigError
from poolhouse.models.files.hub import embedded_model
from tests.bench.tiny import tiny


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_a_model_that_is_served_natively(name: str, tmp_path: Path) -> None:
    written = tiny(name, tmp_path)
    with LLM(written.folder, dtype="float32") as llm:
        sizes, facts = llm.model.facts.sizes, llm.model.facts
        assert facts.served_by.startswith("native")
        kind = SHAPES[name].kind
        if kind == "embed":
            assert llm.embed_array(["one", "two words"]).shape == (2, 32)
            assert facts.max_tokens == SHAPES[name].max_tokens
        else:
            scores = [one.outputs.score for one in llm.score("what?", ["one", "two words"], use_tqdm=False)]
            assert len(set(scores)) == 2
    # What else there is: tables, norms, biases, heads.
    rest = sizes.parameters - written.matrix_weights - sizes.vocabulary_size * sizes.hidden_size
    positions = (sizes.positions or 0) * sizes.hidden_size
    assert 0 <= rest - positions * (SHAPES[name].family in ("Bert", "XLMRoberta")) < 8000


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("minilm", 10.6),
        ("bge-base", 84.9),
        ("modernbert-base", 110.3),
        ("qwen3-0.6b", 440.4),
        ("bge-m3", 302.0),
        ("qwen3-4b", 3633.3),
    ],
)
def test_matrices_are_as_large_as_those_that_are_published(name: str, millions: float, tmp_path: Path) -> None:
    from poolhouse.bench.shapes import _matrix_weights

    assert _matrix_weights(SHAPES[name].options) / 1e6 == pytest.approx(millions, abs=0.1)


def test_the_embedded_model_is_its_own_shape(tmp_path: Path) -> None:
    assert checkpoint("minilm", tmp_path).folder == embedded_model()
    found = checkpoint(str(embedded_model()), tmp_path)
    assert (found.layers, found.matrix_weights) == (6, checkpoint("minilm", tmp_path).matrix_weights)


def test_a_checkpoint_is_written_once(tmp_path: Path) -> None:
    first = tiny("bge-base", tmp_path)
    stamp = (first.folder / "model.safetensors").stat().st_mtime_ns
    assert tiny("bge-base", tmp_path) == first
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == stamp
    # What was left half done is done anew.
    (first.folder / "written").unlink()
    tiny("bge-base", tmp_path)
    assert (first.folder / "model.safetensors").stat().st_mtime_ns != stamp


def test_what_is_no_shape_is_refused(tmp_path: Path) -> None:
    check_shape("bge-base", "embed")
    check_shape(str(embedded_model()), "embed")
    with pytest.raises(
        ConfigError, match=r"--shape is 'bge-bas'; it must be one of minilm, .* Did you mean 'bge-base'"
    ):
        check_shape("bge-bas", "embed")
    with pytest.raises(ConfigError, match="--shape is 'minilm'"):
        check_shape("minilm", "rerank")
    with pytest.raises(ConfigError, match="--layers is 7; minilm has 6"):
        checkpoint("minilm", tmp_path, 7)
