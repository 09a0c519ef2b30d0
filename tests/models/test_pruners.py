"""Pruners from texts to sentences, against their published formulas; see `tests.models.pruners`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from poolhouse import LLM, CheckpointError, ConfigError, PruningParams
from tests.models.parity import Parity, Record, change_config, change_tensors
from tests.models.pruners import KINDS, Pruner

# Scores and probabilities of float32 models.
TOLERANCE = 1e-5
QUERY = "w1 W2, w3?"
# Each is a list of sentences; texts of them are ragged.
DOCUMENTS = [
    ["W4 W5 W6. ", "W7 W8! ", "W9 W10 W11 W12 W13."],
    ["W14."],
    ["W15 W16? ", "W17 W18。", "W19 W20\n\n", "W21 W22"],
    ["W23 W24 W25 W26 W27 W28 W29 W30 W31 W32 W33 W34. ", "W35."],
    ["W7 W8! ", "W4 W5 W6."],
]
TEXTS = ["".join(pieces) for pieces in DOCUMENTS]


def means(keep: list[list[float]]) -> list[float]:
    return [float(np.mean(own)) if own else 0.0 for own in keep]


@pytest.mark.parametrize("row", KINDS)
def test_scores_and_sentences_are_those_of_the_published_formula(
    row: str, tmp_path: Path, record_parity: Record
) -> None:
    pruner = Pruner(tmp_path, row)
    expected = [pruner.sentences(QUERY, pieces) for pieces in DOCUMENTS]
    with LLM(str(tmp_path)) as llm:
        got = llm.score(QUERY, TEXTS, prune=0.5)
        alone = [llm.score(QUERY, text, prune=0.5)[0] for text in TEXTS]
        plain = [output.outputs.score for output in llm.score(QUERY, TEXTS)]
        assert llm.model.facts.served_by.startswith("native")
        assert llm.engine.facts.labels == 1
        tasks = llm.engine.facts.tasks
    assert plain == pytest.approx([output.outputs.score for output in got], abs=1e-6)
    error = packing = 0.0
    for output, single, pieces, (score, keep) in zip(got, alone, DOCUMENTS, expected, strict=True):
        ours, theirs = output.outputs, single.outputs
        assert ours.sentences is not None
        assert theirs.sentences is not None
        text = "".join(pieces)
        assert [text[one.start : one.end] for one in ours.sentences] == pieces
        numbers = np.array([ours.score, *(one.probability for one in ours.sentences)])
        error = max(error, float(np.abs(numbers - [score, *means(keep)]).max()))
        packing = max(
            packing, float(np.abs(numbers - [theirs.score, *(s.probability for s in theirs.sentences)]).max())
        )
        votes = [float(np.mean(np.array(own) > 0.5)) for own in keep]
        kept = [value > 0.5 for value in (means(keep) if KINDS[row].wrapped else votes)]
        assert [one.kept for one in ours.sentences] == kept
        assert ours.pruned == "".join(piece for piece, stays in zip(pieces, kept, strict=True) if stays)
        assert ours.compression == pytest.approx(1 - len(ours.pruned) / len(text))
    record_parity(
        Parity(
            f"{row}: pruning",
            "native",
            "its formula over transformers",
            error,
            packing,
            KINDS[row].architecture,
            tasks,
            KINDS[row].examples,
        )
    )
    assert error < TOLERANCE
    assert packing < TOLERANCE


@pytest.mark.parametrize("row", ["provence", "xprovence", "openprovence, modernbert"])
def test_a_long_document_is_read_in_windows_of_whole_sentences(row: str, tmp_path: Path) -> None:
    pruner = Pruner(tmp_path, row)
    random = np.random.default_rng(0)
    lengths = [5, 9, 90, 3, 20, 17, 30, 1, 150, 2]
    pieces = [" ".join(f"W{n}" for n in random.integers(0, 40, length)) + ". " for length in lengths]
    with LLM(str(tmp_path)) as llm:
        (got,) = llm.score(QUERY, "".join(pieces), prune=0.5)
        asked = len(pruner.tokenize(QUERY, add_special_tokens=False)["input_ids"])
        asked -= 0 if KINDS[row].wrapped else 2  # its comma and its question mark
        room = llm.engine.facts.max_tokens - 3 - asked
    score, keep = pruner.sentences(QUERY, pieces, room)
    assert got.outputs.sentences is not None
    assert got.outputs.score == pytest.approx(score, abs=TOLERANCE)
    assert [one.probability for one in got.outputs.sentences] == pytest.approx(means(keep), abs=TOLERANCE)
    assert not got.truncated


def test_each_head_has_its_own_weights(tmp_path: Path) -> None:
    """One for both, as in a port that goes round, would answer alike here."""
    pruner = Pruner(tmp_path, "provence")
    with LLM(str(tmp_path)) as llm:
        before = llm.score(QUERY, TEXTS[0], prune=0.5)[0].outputs
    change_tensors(tmp_path, add={"token_classifier.weight": -pruner.weight, "token_classifier.bias": -pruner.bias})
    with LLM(str(tmp_path)) as llm:
        after = llm.score(QUERY, TEXTS[0], prune=0.5)[0].outputs
    assert before.sentences is not None
    assert after.sentences is not None
    assert after.score == before.score
    # Of two labels, the softmax of the negative is the other one.
    probabilities = [one.probability for one in after.sentences]
    assert probabilities == pytest.approx([1 - one.probability for one in before.sentences], abs=1e-6)
    change_tensors(tmp_path, add={"classifier.weight": torch.zeros(1, 32), "classifier.bias": torch.ones(1)})
    with LLM(str(tmp_path)) as llm:
        third = llm.score(QUERY, TEXTS[0], prune=0.5)[0].outputs
    assert third.score == 1.0
    assert third.sentences == after.sentences


def test_the_first_of_several_logits_is_the_score(tmp_path: Path) -> None:
    pruner = Pruner(tmp_path, "provence")
    weight = torch.cat([pruner.model.classifier.weight.detach(), torch.randn(1, 32)])
    bias = torch.cat([pruner.model.classifier.bias.detach(), torch.randn(1)])
    change_tensors(tmp_path, add={"classifier.weight": weight, "classifier.bias": bias})
    with LLM(str(tmp_path)) as llm:
        assert llm.score(QUERY, TEXTS[0])[0].outputs.score == pytest.approx(
            pruner.sentences(QUERY, DOCUMENTS[0])[0], abs=TOLERANCE
        )


@pytest.mark.parametrize("row", ["provence", "openprovence, modernbert"])
def test_a_checkpoint_is_read_strictly(row: str, tmp_path: Path) -> None:
    Pruner(tmp_path, row)
    keep = "pruning_head.classifier" if KINDS[row].wrapped else "token_classifier"
    change_tensors(tmp_path, add={"strange.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"strange\.weight"):
        LLM(str(tmp_path))
    change_tensors(tmp_path, drop="strange.weight")
    change_tensors(tmp_path, add={f"{keep}.weight": torch.zeros(3, 32), f"{keep}.bias": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="3 labels"):
        LLM(str(tmp_path))
    change_tensors(tmp_path, drop=f"{keep}.weight")
    with pytest.raises(CheckpointError, match=f"lacks {keep}.weight"):
        LLM(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"base_model_config": None}, "base_model_config"),
        ({"base_model_config": {"model_type": "t5"}}, "'t5'"),
        ({"num_pruning_labels": 3}, "num_pruning_labels"),
        ({"pruning_config": {"use_weighted_pooling": True}}, "use_weighted_pooling"),
        ({"mode": "pruning_only"}, "mode"),
        ({"default_threadshold": "low"}, "default_threadshold"),
    ],
)
def test_a_config_that_is_not_honoured_is_refused(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    Pruner(tmp_path, "openprovence, modernbert")
    change_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=named):
        LLM(str(tmp_path))


def test_a_pruner_is_native_and_takes_no_adapters(tmp_path: Path) -> None:
    Pruner(tmp_path, "provence")
    with pytest.raises(ConfigError, match="Provence is served by the native families alone"):
        LLM(str(tmp_path), model_impl="transformers")
    with pytest.raises(ConfigError, match="Adapters"):
        LLM(str(tmp_path), lora_modules={"a": str(tmp_path)})
    with LLM(str(tmp_path), convert="embed") as llm:
        assert "embed" in llm.engine.facts.tasks


def test_the_model_has_a_threshold_of_its_own(tmp_path: Path) -> None:
    Pruner(tmp_path, "openprovence, modernbert")
    with LLM(str(tmp_path)) as llm:
        own, named = (llm.score(QUERY, TEXTS, prune=prune) for prune in (True, 0.2))
        assert [one.outputs.pruned for one in own] == [one.outputs.pruned for one in named]
        assert llm.engine.facts.pruning is not None
        assert llm.engine.facts.pruning.threshold == 0.2


def test_logits_by_default_are_probabilities_here(tmp_path: Path) -> None:
    Pruner(tmp_path, "openprovence, modernbert")
    with LLM(str(tmp_path)) as llm:
        usual = llm.score(QUERY, TEXTS[0], prune=0.5)[0].outputs
    with LLM(str(tmp_path), pooler_config={"use_activation": False}) as llm:
        raw = llm.score(QUERY, TEXTS[0], prune=0.5)[0].outputs
    assert 1 / (1 + np.exp(-raw.score)) == pytest.approx(usual.score, abs=1e-6)
    assert raw.sentences is not None
    assert usual.sentences is not None
    theirs = [one.probability for one in usual.sentences]
    assert [one.probability for one in raw.sentences] == pytest.approx(theirs, abs=1e-6)


def test_many_callers_at_once_get_their_own(tmp_path: Path) -> None:
    Pruner(tmp_path, "provence")
    queries = [f"w{number} w{number + 1}" for number in range(24)]
    with LLM(str(tmp_path)) as llm:
        alone = [llm.score(query, TEXTS, prune=PruningParams(0.4)) for query in queries]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda query: llm.score(query, TEXTS, prune=PruningParams(0.4)), queries))
    for ours, theirs in zip(together, alone, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.outputs.pruned == other.outputs.pruned
            assert one.outputs.score == pytest.approx(other.outputs.score, abs=TOLERANCE)
